"""Text from a trained decoder: key-value cache and sampling."""
