"""Memory of large tensors that the C library keeps instead of giving it back to the system.

glibc maps every block above 32 MiB anew and unmaps it when it is freed; the system then clears each of its pages once
more, at a page fault for every 4 KiB. In training the same blocks come again in every step. No number changes.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Final

# Of malloc.h; the values of a process that has freed large blocks are those that glibc arrives at by itself.
_TRIM_THRESHOLD: Final = -1
_MMAP_MAX: Final = -4
_NEVER: Final = -1
_USUAL: Final = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 64 * 2**20}
# Whoever sets one of these has decided already.
_CHOICES: Final = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


@contextlib.contextmanager
def keeping_memory() -> Iterator[bool]:
    """Keeps freed memory in the process as long as this lasts, and gives it back in the end.

    Nothing happens where the C library is another one than glibc, or the environment tunes it already.

    Yields:
        Whether memory is kept.

    Example:
        >>> with keeping_memory() as kept:
        ...     tensor = bytearray(1 << 20)
    """
    library = None if _is_tuned() else _glibc()
    if library is None:
        yield False
        return
    try:
        yield bool(library.mallopt(_MMAP_MAX, 0)) and bool(library.mallopt(_TRIM_THRESHOLD, _NEVER))
    finally:
        for option, value in _USUAL.items():
            library.mallopt(option, value)
        library.malloc_trim(0)


def _is_tuned() -> bool:
    return any(name in os.environ for name in _CHOICES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None
