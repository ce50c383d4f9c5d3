"""The constants of a geometry: which pairs of positions meet in the community, and how often.

Both sums of an L3n score (over windows and over activations) run over translated copies of few distinct cases.
A case says which pairs of kernel positions are common neighbours of two nodes and which positions are links of
the second one; its weight says what share of the windows of a position it stands for. Cases of an axis are found
by looking at every window that can differ from the others; those of several axes are Kronecker products, because
being in bounds, sharing an activation and the averages over windows all factorise.
"""

from collections.abc import Callable, Iterator
from functools import reduce
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from chtconv.geometry import Axis, Geometry

Pairs: TypeAlias = frozenset[tuple[int, int]]
Links: TypeAlias = frozenset[int]
Community: TypeAlias = Iterator[tuple[int, Pairs, Links]]


class Cases(NamedTuple):
    """N distinct cases of a geometry with K positions.

    Attributes:
        pairs_NKK: 1 where position ``r`` of the first node and ``t`` of the second one meet in a common neighbour.
        links_NK: 1 where position ``t`` of the second node is a link in bounds: its degree counts those.
        weight_NKK: share of the windows in which ``p`` is in bounds where this case links ``p`` to ``q``.
    """

    pairs_NKK: Tensor
    links_NK: Tensor
    weight_NKK: Tensor


def window_cases(geometry: Geometry) -> Cases:
    """Cases of the sum over windows: the second node is a window that sees the same activation at ``q``."""
    return _cases(geometry, _windows_of_activation)


def activation_cases(geometry: Geometry) -> Cases:
    """Cases of the sum over activations: the second node is an activation that the same window sees at ``q``."""
    return _cases(geometry, _activations_of_window)


def _cases(geometry: Geometry, community: Callable[[Axis, int, int], Community]) -> Cases:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    by_axis = [_axis_cases(axis, community) for axis in geometry.axes]
    return reduce(lambda a, b: Cases(*map(torch.kron, a, b)), by_axis, Cases(one, one[0], one))


def _axis_cases(axis: Axis, community: Callable[[Axis, int, int], Community]) -> Cases:
    in_bounds = [0] * axis.kernel
    count: dict[tuple[Pairs, Links], dict[tuple[int, int], int]] = {}
    for window, multiplicity in axis.window_classes:
        for p in axis.sees(window):
            in_bounds[p] += multiplicity
            for q, pairs, links in community(axis, window, p):
                entry = count.setdefault((pairs, links), {})
                entry[p, q] = entry.get((p, q), 0) + multiplicity
    cases = Cases(
        torch.zeros(len(count), axis.kernel, axis.kernel, dtype=torch.float64),
        torch.zeros(len(count), axis.kernel, dtype=torch.float64),
        torch.zeros(len(count), axis.kernel, axis.kernel, dtype=torch.float64),
    )
    for n, ((pairs, links), entry) in enumerate(count.items()):
        for r, t in pairs:
            cases.pairs_NKK[n, r, t] = 1
        for t in links:
            cases.links_NK[n, t] = 1
        for (p, q), times in entry.items():
            cases.weight_NKK[n, p, q] = times / in_bounds[p]
    return cases


def _nearby(axis: Axis, window: int) -> dict[int, dict[int, int]]:
    """What the windows within reach see: window -> position -> coordinate."""
    first, last = max(0, window - axis.reach), min(axis.windows - 1, window + axis.reach)
    return {other: axis.sees(other) for other in range(first, last + 1)}


def _windows_of_activation(axis: Axis, window: int, p: int) -> Community:
    nearby = _nearby(axis, window)
    own = nearby[window]
    for other in nearby.values():
        pairs = frozenset((r, t) for r, x in own.items() for t, y in other.items() if x == y)
        yield from ((q, pairs, frozenset(other)) for q, x in other.items() if x == own[p])


def _activations_of_window(axis: Axis, window: int, p: int) -> Community:
    nearby = _nearby(axis, window)
    own = nearby[window]
    for q, y in own.items():
        seen_from = [(_position_of(own[p], other), _position_of(y, other)) for other in nearby.values()]
        pairs = frozenset((r, t) for r, t in seen_from if r is not None and t is not None)
        yield q, pairs, frozenset(t for _, t in seen_from if t is not None)


def _position_of(coordinate: int, seen: dict[int, int]) -> int | None:
    return next((t for t, x in seen.items() if x == coordinate), None)
