"""One run of a comparison: its configuration, how people call it, and where it lies."""

import hashlib
import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from chtconv.training.config import DENSE, SECTIONS, Config

METHOD_NAMES: Final = MappingProxyType(
    {
        "dense": "dense",
        "static": "static",
        "set": "SET",
        "rigl": "RigL",
        "snfs": "SNFS",
        "mest": "MEST",
        "gmp": "GMP",
        "granet": "GraNet",
        "cht": "CHT",
        "chts": "CHTs",
        "chtss": "CHTss",
        "cht_gradient": "CHT x gradient",
        "random_turnover": "random, CHTs' turnover",
        "shuffled": "shuffled scores",
        "occupancy": "slice occupancy",
        "input_degree": "input degree",
        "in_bounds": "share of windows",
    }
)

_LONGEST: Final = 255  # characters of a file name


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        variant: how people call what is compared: ``"SET"``, ``"CHTs, layer graph"``.
        config: everything that decides the run.
    """

    variant: str
    config: Config

    @property
    def method(self) -> str:
        """The name of the method."""
        return self.config.topology.method

    @property
    def sparsity(self) -> float:
        """Share of the links that is absent; 0 for a dense run."""
        return 0.0 if self.method == DENSE else self.config.topology.sparsity

    @property
    def seed(self) -> int:
        """The seed of everything random."""
        return self.config.machine.seed

    @property
    def name(self) -> str:
        """The name of its run folder.

        >>> Cell("CHTs, layer graph", Config().replace(seed=14)).name
        'chts-layer-graph-0.9-seed14'
        """
        sparsity = "" if self.method == DENSE else f"-{self.sparsity:g}"
        end = f"{sparsity}-seed{self.seed}"
        return f"{_fitting(slug(self.variant), _LONGEST - len(end))}{end}"


def one_line(name: str) -> str:
    r"""The name of a variant as it lies in one line of a table, whatever spaces it has.

    >>> one_line(" CHTs,  layer\n graph ")
    'CHTs, layer graph'
    """
    return " ".join(name.split())


def slug(text: str) -> str:
    """Text as a part of a file name: small letters, digits and points, the rest hyphens.

    Text without any of these has a digest instead.

    >>> slug("RigL, ERK (layers features.[!0]*)")
    'rigl-erk-layers-features.-0'
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or f"variant-{_digest(text)}"


def _fitting(name: str, limit: int) -> str:
    """A file name of at most ``limit`` characters; two that differ stay different."""
    if len(name) <= limit:
        return name
    digest = _digest(name)
    return f"{name[: limit - 1 - len(digest)]}-{digest}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def shortened(text: str, limit: int) -> str:
    """Text of at most ``limit`` characters, without its middle: names of variants differ at their ends.

    >>> shortened("CHTs, layer graph, temperature 4", 24)
    'CHTs, layer…emperature 4'
    """
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return f"{text[:head]}…{text[-(limit - 1 - head) :]}"


def variant_name(config: Config, usual: Config) -> str:
    """How a configuration is called: its method, and where its evolution differs from the ``usual`` one.

    >>> variant_name(Config().replace(method="chts", graph="layer", temperature=4.0), Config())
    'CHTs, layer graph, temperature 4'
    """
    mine, theirs = config.to_dict(), usual.to_dict()
    different = [name for name in SECTIONS["topology"] if mine[name] != theirs[name]]
    parts = [words(name, mine[name]) for name in different if name not in ("method", "sparsity")]
    return ", ".join([METHOD_NAMES.get(config.topology.method, config.topology.method), *parts])


def words(name: str, value: Any) -> str:
    """A value of the configuration as a part of a variant's name.

    >>> words("graph", "layer"), words("zeta", 0.5), words("prune_dead", True)
    ('layer graph', 'zeta 0.5', 'prune dead')
    """
    if name == "graph":
        return f"{value} graph"
    if name == "windows":
        return f"{value.replace('_', ' ')} windows"
    if isinstance(value, bool):
        return name.replace("_", " ") if value else f"no {name.replace('_', ' ')}"
    return f"{name.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}"
