"""Cannistraci-Hebb link predictors: how much a node of the local community speaks for a link.

For a pair ``(u, v)`` that is not linked, the local community is every node on a path of length three between
them. The *internal* degree ``i`` of such a node counts its links to the community, the *external* degree ``e``
its links to nodes that are neither in the community nor the pair itself. A node-based predictor (L3n) is the sum
over the community of a weight that depends on ``i`` and ``e``; each function here is one such weight.

References:
    [1] Muscoloni, Michieli, Zhang, Cannistraci. Adaptive network automata modelling of complex networks. 2022.
    [2] Zhang et al. Brain network science modelling of sparse neural networks. arXiv 2501.19107, 2025.
"""

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from chtconv.errors import ConfigurationError

# Internal and external degrees, floating point of one shape, whole numbers from 0, which are not to be written into ->
# a finite weight from 0 for each, also for pairs of degrees that no node has; or one number for all.
Predictor: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def ch2_l3n(internal: Tensor, external: Tensor) -> Tensor:
    """CH2-L3n: ``(1 + i) / (1 + e)``, rewarding internal and penalising external links [1].

    Args:
        internal: internal degrees, any shape, floating point.
        external: external degrees, the same shape.

    >>> ch2_l3n(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0]))
    tensor([2., 1.])
    """
    return (1 + internal) / (1 + external)


def ch3_l3n(internal: Tensor, external: Tensor) -> Tensor:
    """CH3-L3n: ``1 / (1 + e)``, penalising external links only; the predictor of CHT and CHTs [1, 2].

    Args:
        internal: internal degrees, any shape, floating point.
        external: external degrees, the same shape.

    >>> ch3_l3n(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0]))
    tensor([1.0000, 0.2500])
    """
    return 1 / (1 + external)


def cn_l3n(internal: Tensor, external: Tensor) -> Tensor:
    """CN-L3n: 1, the number of nodes in the local community; what the others refine.

    >>> cn_l3n(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0]))
    tensor([1., 1.])
    """
    return torch.ones_like(external)


def ra_l3n(internal: Tensor, external: Tensor) -> Tensor:
    """RA-L3n: ``1 / (1 + i + e)``, resource allocation: one over the degree of the node.

    >>> ra_l3n(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
    tensor([0.5000, 0.2500])
    """
    return 1 / (1 + internal + external)


PREDICTORS: dict[str, Predictor] = {"ch3_l3n": ch3_l3n, "ch2_l3n": ch2_l3n, "ra_l3n": ra_l3n, "cn_l3n": cn_l3n}


# Degrees up to which a predictor is tried.
_TRIED = 64


def community_weight(predictor: Predictor, common: Tensor, degree: Tensor) -> Tensor:
    """The weight of a node ``z`` in the community of ``(u, v)``: 0 where it shares no neighbour with ``u``.

    Args:
        predictor: one of :data:`PREDICTORS`.
        common: number of neighbours that ``z`` has in common with ``u``, which is its internal degree.
        degree: degree of ``z``. Its link to ``v`` is neither internal nor external, so ``e = degree - common - 1``.
    """
    # A pair that is linked already has degree - common = 0; it is never asked for, and must not become infinite.
    external = (degree - common - 1).clamp_min_(0)
    weight = torch.as_tensor(predictor(common, external), dtype=common.dtype, device=common.device)
    return weight.expand_as(common).contiguous().mul_(common > 0)


def predictor_of(name: str) -> Predictor:
    """The predictor with this name.

    Raises:
        ConfigurationError: it gives something else than finite weights from 0.
    """
    predictor = PREDICTORS[name]
    _try(name, predictor)
    return predictor


@cache
def _try(name: str, predictor: Predictor) -> None:
    degrees = torch.arange(_TRIED, dtype=torch.float64, device="cpu")
    internal, external = torch.meshgrid(degrees, degrees, indexing="ij")
    weight = predictor(internal.clone(), external.clone())
    shape = getattr(weight, "shape", ()) if isinstance(weight, (Tensor, int, float)) else None
    if shape not in ((), internal.shape):
        given = type(weight).__name__ if shape is None else f"a tensor of shape {list(shape)}"
        raise ConfigurationError(
            f"predictor {name!r} gave {given} for degrees of shape {list(internal.shape)}; accepted is a tensor of "
            "their shape, or a number."
        )
    tried = torch.as_tensor(weight, dtype=torch.float64, device=internal.device).expand_as(internal)
    wrong = ~((tried >= 0) & tried.isfinite())
    if wrong.any():
        i, e = wrong.nonzero()[0].tolist()
        raise ConfigurationError(
            f"predictor {name!r} gave {tried[i, e].item()} for internal degree {i} and external degree {e}; accepted "
            "are finite numbers from 0."
        )
