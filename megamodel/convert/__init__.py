"""Weights to and from other formats."""
