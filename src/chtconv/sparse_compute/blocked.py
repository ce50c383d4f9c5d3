"""Activations in the blocked layout, in which sparse convolutions are fast; see :class:`Blocked`."""

from chtconv.sparse_compute import blocked_normalisation, blocked_operations, blocked_pooling
from chtconv.sparse_compute.blocked_tensor import Blocked, as_blocks, to_blocked, to_dense

__all__ = ["Blocked", "as_blocks", "to_blocked", "to_dense"]

# Importing them enters their operations in the table.
_OPERATIONS = (blocked_operations, blocked_normalisation, blocked_pooling)
