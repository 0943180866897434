"""Training: the one place where model, data, parallelism and machines meet."""
