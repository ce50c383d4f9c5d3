"""Convolutions that compute only what is on the mask, on CPUs; see :func:`chtconv.accelerate`."""

from chtconv.sparse_compute.acceleration import Backend, accelerate, backends

__all__ = ["Backend", "accelerate", "backends"]
