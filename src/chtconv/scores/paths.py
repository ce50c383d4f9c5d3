"""Path-based predictors L3p: a sum over the paths of length three themselves, instead of over their nodes.

A path ``u - y - z - v`` counts the product of a term of each of its two inner nodes. For CH3-L3p the term is
``1 / sqrt(1 + e)``, for CH2-L3p ``sqrt(1 + i) / sqrt(1 + e)``, with the degrees of
:mod:`chtconv.scores.predictors`. This is the predictor of the first CHT; on a bipartite graph it takes a matrix product
for each node of the larger side, of as many rows and columns as the smaller one has.

Shapes: A nodes on one side, B on the other.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def _ch3(internal: Tensor, external: Tensor) -> Tensor:
    return (1 + external).rsqrt()


def _ch2(internal: Tensor, external: Tensor) -> Tensor:
    return ((1 + internal) / (1 + external)).sqrt()


PATH_PREDICTORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ch3_l3p": _ch3, "ch2_l3p": _ch2}


def l3p(linked_AB: Tensor, predictor: str, *, chunk: int = 2**24) -> Tensor:
    """Path-based score of every pair of a bipartite graph; meaningless for pairs that are linked already.

    Args:
        linked_AB: biadjacency matrix, floating point, 0 or 1.
        predictor: ``"ch3_l3p"`` or ``"ch2_l3p"``.
        chunk: numbers held at once beside the terms, which are as many as the square of the larger side; nodes of that
            side are taken in chunks.

    Returns:
        Shape [A, B], of the type of the matrix.

    >>> linked = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    >>> l3p(linked, "ch3_l3p")[0, 2], l3p(linked, "ch3_l3p")[1, 0]
    (tensor(1.), tensor(1.))
    """
    A, B = linked_AB.shape
    if A < B:
        # A path from v to u is one from u to v.
        return l3p(linked_AB.mT, predictor, chunk=chunk).mT
    term = PATH_PREDICTORS[predictor]
    term_AA = _terms(linked_AB, term)
    term_BB = _terms(linked_AB.mT, term)
    rows = max(1, chunk // max(1, A * B))
    return torch.cat([_of_rows(linked_AB, u, term_AA, term_BB) for u in torch.arange(A, device="cpu").split(rows)])


def _of_rows(linked_AB: Tensor, u: Tensor, term_AA: Tensor, term_BB: Tensor) -> Tensor:
    """``sum over y in N(u), z in N(v), y - z linked`` of the two terms, for some nodes ``u``."""
    inner_UBB = (linked_AB.mT * term_AA[u][:, None]) @ linked_AB
    return (linked_AB[u][:, :, None] * term_BB.mT * inner_UBB).sum(1)


def _terms(linked_AB: Tensor, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Term of node ``z`` (columns) on a path from ``u`` (rows) of the same side."""
    common_AA = linked_AB @ linked_AB.mT
    external_AA = (linked_AB.sum(1) - common_AA - 1).clamp_min(0)
    return term(common_AA, external_AA)
