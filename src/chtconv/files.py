"""Files that are whole or absent, and a lock on a folder."""

import contextlib
import errno
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from chtconv.errors import ConfigurationError

# How the names of files end that are there only while something is being written: locks, and what is not whole yet.
LOCK: Final = ".lock"
PARTIAL: Final = ".partial"


class StorageError(OSError):
    """A file could not be written; what was there before is untouched."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, which is replaced at once or, if anything goes wrong, not at all.

    A link stays one, and what it leads to is replaced; the permissions stay those of the file that was there.

    Raises:
        StorageError: naming the file and the cause (a full disk, a missing permission).
    """
    target = Path(os.path.realpath(path))
    # A name of its own: two processes that write the same file write each a whole one.
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(target, partial)
        os.replace(partial, target)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {_cause(error)}") from error
    finally:
        # Left by any exception between the two calls, a signal's included.
        with contextlib.suppress(OSError):
            partial.unlink()


def remove_partial(folder: Path, name: str = "*") -> None:
    """Delete what killed processes left of files of this name in a folder, to which nobody writes now."""
    for partial in folder.glob(f".{name}.{'[0-9a-f]' * 8}{PARTIAL}"):
        with contextlib.suppress(OSError):
            partial.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON; NaN and infinities are refused, because JSON has none."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the operating system takes back if the process dies.

    Raises:
        ConfigurationError: if another process holds it, naming the process.
    """
    with holding(folder / LOCK):
        yield


@contextlib.contextmanager
def holding(path: Path, *, patient: bool = False) -> Iterator[None]:
    """Hold a lock file, which is gone afterwards.

    Args:
        path: of the lock, in a folder that exists.
        patient: wait until nobody else holds it.

    Raises:
        ConfigurationError: if another process holds it and this is not patient, naming the process.
    """
    if sys.platform == "win32":  # pragma: no cover - no advisory locks of this kind there
        yield
        return
    descriptor = _acquire(path, patient)
    try:
        try:
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        except OSError as error:
            raise StorageError(f"cannot write {path}: {_cause(error)}") from error
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _cause(error: OSError) -> str:
    return "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)


def _acquire(path: Path, patient: bool) -> int:
    import fcntl

    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StorageError(f"cannot write to the folder {path.parent}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if patient else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise ConfigurationError(f"{path.parent} is in use by another run (process {holder})") from None
        except OSError as error:
            os.close(descriptor)
            raise StorageError(
                f"cannot lock {path}: {error.strerror}; accepted is a folder on a file system with locks (flock)"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        if _still_there(path, descriptor):
            return descriptor
        # The holder before us removed its file between our open and our lock: that lock guards nothing.
        os.close(descriptor)


def _still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
