"""Constants kept on disk between runs, in the cache folder of the platform; only ever a shortcut.

Whatever is wrong with a file (cut short, of another key, type or shape, changed, unreadable) or with the folder (not
there, read-only, full), the constant is built as if there were no cache. Set ``CHTCONV_CACHE`` to another folder, or to
nothing to do without.
"""

import contextlib
import hashlib
import importlib.resources
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import platformdirs
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from chtconv.files import PARTIAL, write_atomically

_LIMIT = 2**29  # bytes


def cached(key: str, shape: Sequence[int], dtype: torch.dtype, build: Callable[[], Tensor]) -> Tensor:
    """The constant with this key, from the disk where a sound file holds it, else built and written there.

    Args:
        key: everything that the constant depends on, as text.
        shape: the shape that it must have.
        dtype: the type that it must have.
        build: makes it.

    Returns:
        The constant, on the CPU where it was read, else wherever ``build`` made it.
    """
    path = _path(key)
    if path is None:
        return build()
    stored = _read(path, key)
    if stored is not None and stored.shape == torch.Size(shape) and stored.dtype == dtype:
        return stored
    constant = build()
    _write(path, key, constant)
    return constant


def sources(*packages: str) -> str | None:
    """A digest of the source files of packages, as a part of keys: what other code has built is not read.

    Args:
        packages: their names; the packages within them do not count.

    Returns:
        The digest; None where sources cannot be read, as in a frozen program: then nothing says what code there is.
    """
    digest = hashlib.blake2b(digest_size=16)
    for package in packages:
        try:
            files = [file for file in importlib.resources.files(package).iterdir() if file.name.endswith(".py")]
            contents = [(file.name, file.read_bytes()) for file in sorted(files, key=lambda file: file.name)]
        except (OSError, TypeError, ValueError):
            return None
        if not contents:
            return None
        digest.update(repr((package, contents)).encode())
    return digest.hexdigest()


def _path(key: str) -> Path | None:
    folder = os.environ.get("CHTCONV_CACHE", platformdirs.user_cache_dir("chtconv", appauthor=False))
    digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    return Path(folder) / f"{digest}.safetensors" if folder else None


def _read(path: Path, key: str) -> Tensor | None:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            constant: Tensor = file.get_tensor("constant")
            metadata = file.metadata() or {}
    except (OSError, ValueError, safetensors.SafetensorError):
        return None
    sound = metadata.get("key") == key and metadata.get("digest") == _digest(constant)
    return constant if sound else None


def _write(path: Path, key: str, constant: Tensor) -> None:
    stored = constant.cpu().contiguous()
    content = safetensors.torch.save({"constant": stored}, {"key": key, "digest": _digest(stored)})
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
        _prune(path.parent)


def _digest(constant: Tensor) -> str:
    return hashlib.blake2b(constant.view(torch.uint8).numpy().data, digest_size=16).hexdigest()


def _prune(folder: Path) -> None:
    """Deletes the files that were not written for the longest time, beyond half a gigabyte."""
    with contextlib.suppress(OSError):
        written = itertools.chain(folder.glob("*.safetensors"), folder.glob(f".*{PARTIAL}"))
        files = sorted(written, key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > _LIMIT:
                path.unlink()
