"""The decoder and everything that trains, converts and samples it."""
