"""Who waits for whom, and where that ends. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

Node = TypeVar("Node")


def roots(edges: Mapping[Node, Iterable[Node]]) -> list[list[Node]]:
    """Where following the edges ends: nodes that wait for nobody, each alone, and circles that nothing leaves.

    Strongly connected components without an edge to another one (R. Tarjan, Depth-first search and linear graph
    algorithms, 1972), without recursion.
    """
    graph = {node: list(targets) for node, targets in edges.items()}
    for target in [target for targets in graph.values() for target in targets]:
        graph.setdefault(target, [])
    component: dict[Node, int] = {}
    components: list[list[Node]] = []
    for node in graph:
        if node not in component:
            _search(node, graph, component, components)
    leaving = {component[node] for node in graph for target in graph[node] if component[target] != component[node]}
    return [members for index, members in enumerate(components) if index not in leaving]


def _search(
    start: Node, graph: Mapping[Node, list[Node]], component: dict[Node, int], components: list[list[Node]]
) -> None:
    """Adds the components that can be reached from `start` and are not known yet."""
    order: dict[Node, int] = {start: 0}
    low: dict[Node, int] = {start: 0}
    open_nodes = [start]
    path = [(start, iter(graph[start]))]
    while path:
        node, targets = path[-1]
        target = next(targets, None)
        if target is not None:
            if target not in order and target not in component:
                order[target] = low[target] = len(order)
                open_nodes.append(target)
                path.append((target, iter(graph[target])))
            elif target not in component:
                low[node] = min(low[node], order[target])
            continue
        path.pop()
        if path:
            low[path[-1][0]] = min(low[path[-1][0]], low[node])
        if low[node] == order[node]:
            members = [open_nodes.pop()]
            while members[-1] != node:
                members.append(open_nodes.pop())
            component.update(dict.fromkeys(members, len(components)))
            components.append(members)
