"""Dynamic sparse training of convolutional networks, with the topology evolved by link prediction (CHT-Conv)."""

from chtconv import checkpoint, tensorboard
from chtconv.errors import ChtconvWarning, ConfigurationError
from chtconv.flops import count_flops
from chtconv.methods import METHODS, Method, method
from chtconv.scores import link_scores
from chtconv.sparse_compute import accelerate, compile_sparse, load_compiled
from chtconv.topology import Topology, sparsify

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "ChtconvWarning",
    "ConfigurationError",
    "Method",
    "Topology",
    "__version__",
    "accelerate",
    "checkpoint",
    "compile_sparse",
    "count_flops",
    "link_scores",
    "load_compiled",
    "method",
    "sparsify",
    "tensorboard",
]
