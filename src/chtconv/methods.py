"""The methods of dynamic sparse training: they differ in nothing but how regrowth chooses."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from chtconv import regrowth
from chtconv.errors import unknown

Regrowth = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        regrowth: turns the scores of the disabled positions into keys; None where the topology never changes.
        uses_scores: whether it needs link prediction.
        summary: one line for people.
    """

    regrowth: Regrowth | None
    uses_scores: bool
    summary: str


METHODS: dict[str, Method] = {
    "static": Method(None, False, "a random sparse topology that never changes"),
    "set": Method(regrowth.uniform, False, "Sparse Evolutionary Training: links regrow at random"),
    "cht": Method(regrowth.highest_score, True, "Cannistraci-Hebb Training: the links of highest score regrow"),
    "chts": Method(regrowth.sampled_by_score, True, "CHT with soft regrowth: links are sampled by their score"),
}


def find_method(name: str) -> Method:
    """The method with this name.

    Raises:
        ConfigurationError: there is none; the message gives the nearest match.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
