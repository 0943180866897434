"""Text to tokens to shards to batches; knows ranks only as integers."""
