"""Memory for activations and gradients that is used again.

A large block of memory that is given back to the system costs a page fault for every 4 KiB when it is asked for
again: a tenth of a dense training step, and a third of a sparse one. So what tensors of this package leave is kept for
the next ones of the same size, in huge pages where the system has them.

What is kept and in use together is never more than twice the most that tensors had at once. The tensors of a training
step, which have the same sizes every time, need less; where that is not enough, smaller tensors share the blocks of
larger ones.
"""

import contextlib
import itertools
import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Below this, the allocator of torch keeps memory by itself.
SMALLEST = 1 << 20
_STEP = 1 << 16


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
    pages = _pool.take(size)
    view = memoryview(pages)
    # The tensor owns the view; when its storage ends, the view does, and nothing else refers to the pages.
    weakref.finalize(view, _pool.give_back, size, pages).atexit = False
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
    return _pool.release()


class _Pool:
    """Blocks of memory, in use and free.

    Tensors can end at any moment in any thread, also while this thread is in here: their blocks wait in a queue, which
    takes no lock, until the next call looks at it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._left: deque[tuple[int, mmap.mmap]] = deque()
        # By size, each with its turn: the first is the one that has been free for longest.
        self._free: dict[int, deque[tuple[int, mmap.mmap]]] = {}
        self._turns = itertools.count()
        # Bytes: of free blocks, of blocks in use, and what tensors asked for of these, now and at most.
        self._kept = self._used = self._asked = self._most = 0

    def take(self, size: int) -> mmap.mmap:
        """A block of at least this size."""
        with self._lock:
            self._collect()
            most = max(self._most, self._asked + size)
            pages = self._popped(size)
            if pages is None and self._kept + self._used + size > 2 * most:
                pages = self._popped(self._larger(size, most))
            if pages is None:
                while self._free and self._kept + self._used + size > 2 * most:
                    self._drop_oldest()
                pages = self._new(size)
            self._used += len(pages)
            self._asked, self._most = self._asked + size, most
            return pages

    def give_back(self, size: int, pages: mmap.mmap) -> None:
        """Of a tensor that was this large."""
        self._left.append((size, pages))

    def release(self) -> int:
        """Drops all free blocks, and forgets how much was in use at most."""
        with self._lock:
            self._collect()
            kept, self._kept, self._most = self._kept, 0, self._asked
            self._free.clear()
        return kept

    def _collect(self) -> None:
        while self._left:
            size, pages = self._left.popleft()
            self._asked -= size
            self._used -= len(pages)
            self._kept += len(pages)
            self._free.setdefault(len(pages), deque()).append((next(self._turns), pages))

    def _larger(self, size: int, most: int) -> int:
        """The least size of a larger free block; this one where there is none.

        Blocks in use, which are counted whole, remain within ``most``: what is taken later has its own size and is no
        more than that again, so that twice as much is enough for all.
        """
        return min((each for each in self._free if size < each <= most - self._used), default=size)

    def _popped(self, size: int) -> mmap.mmap | None:
        """The block of exactly this size that was used last."""
        return self._removed(size, deque.pop) if size in self._free else None

    def _drop_oldest(self) -> None:
        self._removed(min(self._free, key=lambda size: self._free[size][0][0]), deque.popleft)

    def _removed(self, size: int, end: Callable[[deque[tuple[int, mmap.mmap]]], tuple[int, mmap.mmap]]) -> mmap.mmap:
        blocks = self._free[size]
        _, pages = end(blocks)
        if not blocks:
            del self._free[size]
        self._kept -= size
        return pages

    def _new(self, size: int) -> mmap.mmap:
        try:
            # Private: what a process that is forked writes is its own.
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            if not self.release():
                raise MemoryError(f"no memory for {size / 2**20:.0f} MiB.") from None
            return self._new(size)
        advice = getattr(mmap, "MADV_HUGEPAGE", None)
        if advice is not None:
            with contextlib.suppress(OSError):
                pages.madvise(advice)
        return pages


_pool = _Pool()
