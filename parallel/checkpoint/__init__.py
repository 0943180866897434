"""Sharded checkpoints: `directory` (what is on disk, without torch), `store` (save and load), `training_state`."""
