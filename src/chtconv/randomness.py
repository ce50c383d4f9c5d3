"""Random generators that share nothing: one for each purpose, evolution and layer of a run.

Two methods of one seed see the same initial weights, initial masks and batches because no draw of one
purpose moves the generator of another; a resumed run needs no replay; every rank of a distributed run draws
the same numbers.
"""

import hashlib

import torch

_WRAPPERS = ("_orig_mod", "module")


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose of a run: a hash, stable across processes, machines and versions of Python.

    >>> derived_seed(14, "order", 0) == derived_seed(14, "order", 0)
    True
    >>> derived_seed(14, "order", 0) == derived_seed(14, "order", 1)
    False
    """
    text = "/".join(map(repr, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on ``device`` for one purpose of the run with this ``seed``.

    Args:
        seed: the seed of the run.
        purpose: what is drawn, from the general to the particular: ``"evolution", 3, "features.0.weight"``.
        device: where the numbers will be drawn.
    """
    return torch.Generator(device=device).manual_seed(derived_seed(seed, *purpose))


def canonical_name(name: str) -> str:
    """The name of a parameter without the prefixes that wrappers (``torch.compile``, DDP) put before it.

    >>> canonical_name("module._orig_mod.features.0.weight")
    'features.0.weight'
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(part for part in parts if part != "_orig_mod")
