"""Where waiting ends."""

from __future__ import annotations

import random

import pytest

from cluster.fabric.watch.waits_for import roots


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ({1: [2], 2: [3]}, [[3]]),
        ({1: [2], 2: [1]}, [[1, 2]]),
        ({1: [2], 2: [3], 3: [2], 4: [1]}, [[2, 3]]),
        ({1: [2], 3: [4]}, [[2], [4]]),
        ({1: [1]}, [[1]]),
        ({1: [2, 3], 2: [1], 3: []}, [[3]]),
        ({}, []),
    ],
)
def test_roots(edges: dict[int, list[int]], expected: list[list[int]]) -> None:
    assert sorted(sorted(root) for root in roots(edges)) == expected


def test_roots_of_drawn_graphs_are_what_reachability_says() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        nodes = range(rng.randint(1, 9))
        edges = {node: [other for other in nodes if rng.random() < 0.2] for node in nodes}
        reach = {node: {node} for node in nodes}
        for _ in nodes:
            for node in nodes:
                reach[node] |= {far for near in edges[node] for far in reach[near]}
        expected = {frozenset(reach[node]) for node in nodes if all(node in reach[far] for far in reach[node])}
        assert {frozenset(root) for root in roots(edges)} == expected, f"seed {seed}"


def test_a_long_chain_needs_no_recursion() -> None:
    assert roots({node: [node + 1] for node in range(50_000)}) == [[50_000]]
