"""Sharded checkpoints: `directory` (what is on disk, without torch), `store` (save and load; with `agreement`, `pieces`,
`shares`, `staging`, `transfer` and `fit`), `training_state`, `reshard`."""
