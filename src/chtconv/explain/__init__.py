"""Understanding link scores: what they reward, how often they tie, and how far they are from choosing at random.

In a notebook, :func:`score_statistics` for a mask and :func:`explain` for a model with masks; on the command line,
``chtconv explain``.
"""

from chtconv.explain.distribution import Spread
from chtconv.explain.layers import explain
from chtconv.explain.statistics import ScoreStatistics, score_statistics
from chtconv.explain.variance import Explained

__all__ = ["Explained", "ScoreStatistics", "Spread", "explain", "score_statistics"]
