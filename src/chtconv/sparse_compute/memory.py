"""Memory for activations and gradients that is used again.

A large block of memory that is given back to the system costs a page fault for every 4 KiB when it is asked for
again: a tenth of a dense training step, and a third of a sparse one. So what tensors of this package leave is kept for
the next ones of the same size, in huge pages where the system has them.
"""

import contextlib
import math
import mmap
import threading
import weakref
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

# Below this, the allocator of torch keeps memory by itself.
SMALLEST = 1 << 20
_STEP = 1 << 16
_free: defaultdict[int, list[mmap.mmap]] = defaultdict(list)
_lock = threading.RLock()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor on the CPU, in memory that an earlier one left where there is some.

    Args:
        shape: of the tensor.
        dtype: any type of fixed width.

    Raises:
        MemoryError: there is none.

    Example:
        >>> empty((2, 3), torch.float32).shape
        torch.Size([2, 3])
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    size = -(-size // _STEP) * _STEP
    with _lock:
        kept = _free[size]
        pages = kept.pop() if kept else None
    if pages is None:
        pages = _new(size)
    view = memoryview(pages)
    # The tensor owns the view; when its storage ends, the view does, and nothing else refers to the pages.
    weakref.finalize(view, _give_back, pages, size).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=count).view(tuple(shape))


def release_memory() -> int:
    """Gives what is kept, and not in use, back to the system.

    Returns:
        How many bytes that was.

    Example:
        >>> tensor = empty((1 << 20,), torch.float32)
        >>> del tensor
        >>> release_memory() >= 1 << 22
        True
    """
    with _lock:
        size = sum(each * len(pages) for each, pages in _free.items())
        _free.clear()
    return size


def _give_back(pages: mmap.mmap, size: int) -> None:
    with _lock:
        _free[size].append(pages)


def _new(size: int) -> mmap.mmap:
    try:
        # Private: what a process that is forked writes is its own.
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        if not release_memory():
            raise MemoryError(f"no memory for {size / 2**20:.0f} MiB.") from None
        return _new(size)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        with contextlib.suppress(OSError):
            pages.madvise(advice)
    return pages
