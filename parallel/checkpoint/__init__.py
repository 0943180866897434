"""Sharded checkpoints: `directory` (what is on disk, without torch), `store` (save and load; with `agreement`, `staging`
and `fit`), `training_state`."""
