"""Link scores of a layer: how strongly the topology itself speaks for each link that is not there."""

from chtconv.scores.api import link_scores
from chtconv.scores.explicit import explicit_scores

__all__ = ["explicit_scores", "link_scores"]
