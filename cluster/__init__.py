"""The machines: hardware facts, topology and health."""
