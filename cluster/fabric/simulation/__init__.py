"""Fabrics that no test machine has: the same diagnosis on simulated fat-trees and rails with injected faults."""
