"""Diagnosis of fabrics that are too wide to measure every pair: a dozen rounds for any number of hosts."""
