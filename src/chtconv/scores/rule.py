"""What is scored, and in which arithmetic."""

from typing import NamedTuple

import torch
from torch import Tensor

from chtconv.layers.geometry import Geometry

_GRID = 2.0**30


class Rule(NamedTuple):
    """A geometry, a predictor and an arithmetic: all that scores depend on beside the mask.

    Attributes:
        geometry: the geometry of the layer, with the size of its input.
        predictor: a name in :data:`chtconv.scores.predictors.PREDICTORS`.
        dtype: floating point type of the computation.
        exact: round every mean weight to a multiple of 2^-30, so that all later sums are exact in float64 and do
            not depend on their order: the same scores with any number of threads.
    """

    geometry: Geometry
    predictor: str
    dtype: torch.dtype = torch.float32
    exact: bool = False

    def rounded(self, weights: Tensor) -> Tensor:
        """The weights on the grid, where the rule is exact; they are overwritten."""
        return weights.mul_(_GRID).round_().div_(_GRID) if self.exact else weights
