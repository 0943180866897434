"""Worlds of ranks, data parallelism and sharded checkpoints, for any torch module."""
