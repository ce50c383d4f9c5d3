"""Which C sources a library of kernels was built from; ``setup.py`` runs this file by itself, without the package."""

import hashlib
from pathlib import Path


def digest(folder: Path) -> str:
    """Of the names and bytes of all C files in a folder.

    Args:
        folder: with the files, as ``csrc``.

    Returns:
        64 digits, the same in whatever order the system lists the files; empty where there are none.

    Example:
        >>> digest(Path("nowhere"))
        ''
    """
    files = sorted((path.name, path.read_bytes()) for path in folder.glob("*.[ch]"))
    found = hashlib.sha256()
    for name, content in files:
        found.update(f"{name} {len(content)} ".encode() + content)
    return found.hexdigest() if files else ""
