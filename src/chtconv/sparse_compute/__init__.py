"""Convolutions that compute only what is on the mask, on CPUs; see :func:`chtconv.accelerate`."""

from chtconv.sparse_compute.acceleration import Backend, accelerate, backends
from chtconv.sparse_compute.inference import SparseModel, compile_sparse, load_compiled
from chtconv.sparse_compute.memory import release_memory

__all__ = ["Backend", "SparseModel", "accelerate", "backends", "compile_sparse", "load_compiled", "release_memory"]
