"""The monitor of a run in training: how long collectives take, who is late to them, and what that costs."""
