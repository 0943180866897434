"""The network between ranks: measured, diagnosed, watched while a run trains, compared with what was predicted."""
