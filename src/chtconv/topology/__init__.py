"""The masks of a model: how they start, evolve and are recorded."""

from chtconv.topology.sparsification import sparsify
from chtconv.topology.topology import Topology

__all__ = ["Topology", "sparsify"]
