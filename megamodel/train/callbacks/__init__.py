"""Everything optional around the training loop: progress, records. Each is a `Callback`."""
