"""Random generators that share nothing: one for each purpose, evolution and layer of a run.

Two methods of one seed see the same initial weights, initial masks and batches because no draw of one
purpose moves the generator of another; a resumed run needs no replay; every rank of a distributed run draws
the same numbers.
"""

import hashlib
import operator
from collections.abc import Iterable

import torch


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose of a run: a hash, stable across processes, machines and versions of Python.

    Equal whole numbers are the same seed, of whatever type: ``range`` and ``numpy.arange`` give the same runs.

    >>> derived_seed(14, "order", 0) == derived_seed(14, "order", 0)
    True
    >>> derived_seed(14, "order", 0) == derived_seed(14, "order", 1)
    False
    """
    text = "/".join(map(repr, (int(operator.index(seed)), *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on ``device`` for one purpose of the run with this ``seed``.

    Args:
        seed: the seed of the run.
        purpose: what is drawn, from the general to the particular: ``"evolution", 3, "features.0.weight"``.
        device: where the numbers will be drawn.
    """
    return torch.Generator(device=device).manual_seed(derived_seed(seed, *purpose))


def unwrapped(name: str) -> list[str]:
    """A name of a parameter with less and less of what wrappers put before it, the whole name first.

    >>> unwrapped("module._orig_mod.head.weight")
    ['module.head.weight', 'head.weight']
    """
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    leading = next((index for index, part in enumerate(parts) if part != "module"), len(parts))
    return [".".join(parts[start:]) for start in range(min(leading, len(parts) - 1) + 1)]


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Names of parameters without what wrappers put before them: ``torch.compile`` (anywhere) and DDP (before all).

    >>> canonical_names(["module.features.0.weight", "module._orig_mod.head.weight"])
    {'module.features.0.weight': 'features.0.weight', 'module._orig_mod.head.weight': 'head.weight'}
    >>> canonical_names(["module.0.weight", "stem.weight"])
    {'module.0.weight': 'module.0.weight', 'stem.weight': 'stem.weight'}
    """
    short = {name: [part for part in name.split(".") if part != "_orig_mod"] for name in names}
    while short and all(len(parts) > 2 and parts[0] == "module" for parts in short.values()):
        short = {name: parts[1:] for name, parts in short.items()}
    return {name: ".".join(parts) for name, parts in short.items()}
