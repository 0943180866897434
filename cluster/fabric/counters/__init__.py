"""Counters of a host, read beside a measurement: what they are, by how much they grew, and what that says of a finding."""

from cluster.fabric.counters.citation import Citation, cite, mean
from cluster.fabric.counters.read import read_counters
from cluster.fabric.counters.snapshot import Count, Snapshot, growth

__all__ = ["Citation", "Count", "Snapshot", "cite", "growth", "mean", "read_counters"]
