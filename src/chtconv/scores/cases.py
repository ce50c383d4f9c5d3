"""The constants of a geometry: which pairs of positions meet in the community, and how often.

Both sums of an L3n score (over outputs and over inputs) run over translated copies of few distinct cases. A case
says which pairs of kernel positions are common neighbours of two nodes and which positions are links of the second
one; its weight says what share of the windows of a position it stands for. Cases of an axis are found by looking at
every window that can differ from the others; those of several axes are Kronecker products, because being in bounds,
sharing an activation and the averages over windows all factorise.

Shapes: K positions, N cases, X pairs of nodes of any kind.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, reduce
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from chtconv.layers.geometry import Axis, Geometry
from chtconv.scores.predictors import community_weight, predictor_of
from chtconv.scores.rule import Rule

Pairs: TypeAlias = tuple[tuple[int, int], ...]
Links: TypeAlias = tuple[int, ...]
# Positions p and q, and the case in which p is linked to q there.
Community: TypeAlias = Iterator[tuple[int, int, Pairs, Links]]

# Numbers held at once by the sums over cases: 16 MB in float32, about what the caches hold.
CHUNK = 2**22


class Cases(NamedTuple):
    """N distinct cases of a geometry with K positions, as sparse matrices: few of their entries are not 0.

    Attributes:
        pairs: [N, K · K], how often positions ``r`` of the first node and ``t`` of the second meet in a common
            neighbour.
        links: [N, K], how often position ``t`` of the second node is a link in bounds: its degree counts those.
        weight: [K · K, N], share of the windows in which ``p`` is in bounds where this case links ``p`` to ``q``.
        trivial: whether there is one case and one position, and all three are 1, as in a linear layer.
    """

    pairs: Tensor
    links: Tensor
    weight: Tensor
    trivial: bool = False


def mean_weights(gram_LX: Tensor, degree_KX: Tensor, cases: Cases, rule: Rule) -> Tensor:
    """Mean weight of the second node of each pair in the community of the first one, by the positions that link them.

    Args:
        gram_LX: how many neighbours the two nodes have in common when they see them at positions ``r`` and ``t``, for
            each of the L = K · K pairs of positions and pairs of nodes in any number of dimensions.
        degree_KX: links of the second node at each position, broadcast to the pairs of nodes.
        cases: the cases of the geometry.
        rule: the predictor and the arithmetic.

    Returns:
        The shape of ``gram_LX``: the mean over the windows in which ``p`` is in bounds, for each (p, q).

    Raises:
        ConfigurationError: a predictor that gives something else than finite weights from 0.
    """
    predictor = predictor_of(rule.predictor)
    if cases.trivial:
        return rule.rounded(community_weight(predictor, gram_LX, degree_KX))
    shape = gram_LX.shape
    gram_LX, degree_KX = gram_LX.flatten(1), degree_KX.expand(-1, *shape[1:]).flatten(1)
    mean_LX = torch.empty_like(gram_LX)
    step = max(1, CHUNK // max(1, len(cases.links)))
    for start in range(0, gram_LX.shape[1], step):
        columns = slice(start, start + step)
        common_NX = cases.pairs @ gram_LX[:, columns]
        weight_NX = community_weight(predictor, common_NX, cases.links @ degree_KX[:, columns])
        mean_LX[:, columns] = cases.weight @ weight_NX
    return rule.rounded(mean_LX).view(shape)


def output_cases(geometry: Geometry) -> Cases:
    """Cases of the sum over outputs: the second node is another output that sees the same input, at ``q``."""
    return _cases(geometry, _activations_of_window if geometry.transposed else _windows_of_activation)


def input_cases(geometry: Geometry) -> Cases:
    """Cases of the sum over inputs: the second node is another input that the same output sees, at ``q``."""
    return _cases(geometry, _windows_of_activation if geometry.transposed else _activations_of_window)


@lru_cache(maxsize=256)
def constants(
    which: Callable[[Geometry], Cases], geometry: Geometry, device: torch.device, dtype: torch.dtype
) -> Cases:
    """The output or input cases of a geometry, where and how they are used; built once."""
    with warnings.catch_warnings():
        # torch calls sparse rows a beta; products with dense matrices are all that is used here.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        matrices = [matrix.to(device, dtype).to_sparse_csr() for matrix in which(geometry)[:3]]
    trivial = all(matrix.shape == (1, 1) and matrix.values().eq(1).all() for matrix in matrices)
    return Cases(matrices[0], matrices[1], matrices[2], bool(trivial))


def _cases(geometry: Geometry, community: Callable[[Axis, int], Community]) -> Cases:
    """Kronecker products of the cases of the axes."""
    one = torch.ones(1, 1, 1, dtype=torch.float64, device="cpu")
    nothing = (one.to_sparse(), one[0].to_sparse(), one.to_sparse())
    by_axis = [_axis_cases(axis, community) for axis in geometry.axes]
    pairs, links, weight = (reduce(_kronecker, parts) for parts in zip(nothing, *by_axis, strict=True))
    return Cases(_as_matrix(pairs), links, _as_matrix(weight).t().coalesce())


def _kronecker(a: Tensor, b: Tensor) -> Tensor:
    """``torch.kron`` of sparse tensors with the same number of dimensions."""
    a, b = a.coalesce(), b.coalesce()
    size_b = torch.tensor(b.shape, device="cpu")[:, None, None]
    indices = a.indices()[:, :, None] * size_b + b.indices()[:, None]
    values = a.values()[:, None] * b.values()
    shape = [m * n for m, n in zip(a.shape, b.shape, strict=True)]
    return torch.sparse_coo_tensor(indices.flatten(1), values.flatten(), shape, check_invariants=True, device="cpu")


def _as_matrix(cases_NKK: Tensor) -> Tensor:
    """A sparse [N, K, K] as [N, K · K]."""
    n, k, _ = cases_NKK.shape
    case, row, column = cases_NKK.coalesce().indices()
    indices = torch.stack([case, row * k + column])
    values = cases_NKK.coalesce().values()
    return torch.sparse_coo_tensor(indices, values, [n, k * k], check_invariants=True, device="cpu").coalesce()


def _axis_cases(axis: Axis, community: Callable[[Axis, int], Community]) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs [N, K, K], links [N, K] and weights [N, K, K] of the distinct cases of an axis, sparse float64."""
    in_bounds = [0] * axis.kernel
    count: dict[tuple[Pairs, Links], dict[tuple[int, int], int]] = {}
    for window, multiplicity in axis.window_classes:
        for p in axis.sees(window):
            in_bounds[p] += multiplicity
        for p, q, pairs, links in community(axis, window):
            entry = count.setdefault((pairs, links), {})
            entry[p, q] = entry.get((p, q), 0) + multiplicity
    # Without a common neighbour the weight is 0, whatever the rest.
    distinct = [(pairs, links, entry) for (pairs, links), entry in count.items() if pairs]
    K = axis.kernel
    pairs_NKK, links_NK, weight_NKK = (
        torch.zeros(len(distinct), *shape, dtype=torch.float64, device="cpu") for shape in ((K, K), (K,), (K, K))
    )
    for n, (pairs, links, entry) in enumerate(distinct):
        for r, t in pairs:
            pairs_NKK[n, r, t] += 1
        for t in links:
            links_NK[n, t] += 1
        for (p, q), times in entry.items():
            weight_NKK[n, p, q] = times / in_bounds[p]
    return pairs_NKK.to_sparse(), links_NK.to_sparse(), weight_NKK.to_sparse()


def _windows_of_activation(axis: Axis, window: int) -> Community:
    nearby = axis.nearby(window)
    own = _positions(nearby[window])
    for seen in nearby.values():
        pairs = tuple((own[x], t) for t, x in seen.items() if x in own)
        links = tuple(seen)
        yield from ((p, q, pairs, links) for p, q in pairs)


def _activations_of_window(axis: Axis, window: int) -> Community:
    nearby = axis.nearby(window)
    positions = [_positions(seen) for seen in nearby.values()]
    # For each position of the window, where the windows nearby see the same activation.
    seen_from = {p: [at.get(x) for at in positions] for p, x in nearby[window].items()}
    links = {q: tuple(sorted(t for t in there if t is not None)) for q, there in seen_from.items()}
    for p, here in seen_from.items():
        for q, there in seen_from.items():
            pairs = sorted((r, t) for r, t in zip(here, there, strict=True) if r is not None and t is not None)
            yield p, q, tuple(pairs), links[q]


def _positions(seen: dict[int, int]) -> dict[int, int]:
    """The position that sees each coordinate."""
    return {x: p for p, x in seen.items()}
