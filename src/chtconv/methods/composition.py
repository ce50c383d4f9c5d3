"""The methods of sparse training: each is a removal, a regrowth and a density schedule, and nothing else.

`docs/methods.md` has the table with the sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from chtconv.errors import ConfigurationError, check_name, unknown
from chtconv.methods.regrowth import PRIOR, REGROWTHS, SHARES
from chtconv.methods.removal import REMOVALS
from chtconv.methods.schedule import DECAYS, DENSITIES
from chtconv.scores.api import SCORES


@dataclass(frozen=True)
class Method:
    """A method of sparse training.

    Attributes:
        removal: which links go: a name in :data:`chtconv.methods.removal.REMOVALS`, or None.
        regrowth: which links come: a name in :data:`chtconv.methods.regrowth.REGROWTHS`, or None where none ever come.
        density: how the number of links goes from its first to its last value: a name in
            :data:`chtconv.methods.schedule.DENSITIES`.
        initial_sparsity: sparsity before training; None where it is constant.
        zeta_schedule: how the drop fraction falls; None for the default of :func:`chtconv.sparsify`.
        predictor: the only link score that the method is defined with; None for any.
        temperature: power of the scores in sampling, an inverse temperature: 1 as published, towards 0 more even,
            above 1 sharper.
        explore: share of the probability of sampling that is spread evenly; 0 as published.
        smoothing: share of a kernel's scores that goes by the links of the slices instead, see
            :func:`chtconv.methods.regrowth.smoothed`; 0 as published.
        kernel_shares: where links compete within a layer, what the share of a kernel in its regrowth goes by: its
            ``"scores"`` as they are, its ``"links"``, or ``"equal"`` shares; None for
            :func:`chtconv.methods.regrowth.usual_shares`.
        redistribute: whether regrowth moves links between layers, to those with the larger mean momentum.
        prune_dead: whether removal goes on along the chain of layers: links of channels that lost all links on one
            side go too, as in CHT.
        early_stop: a layer stops evolving when at least this share of what it removes is chosen again; None for never.
        summary: one line for people.
    """

    removal: str | None = "magnitude"
    regrowth: str | None = "uniform"
    density: str = "constant"
    initial_sparsity: float | None = None
    zeta_schedule: str | None = None
    predictor: str | None = None
    temperature: float = 1.0
    explore: float = 0.0
    smoothing: float = 0.0
    kernel_shares: str | None = None
    redistribute: bool = False
    prune_dead: bool = False
    early_stop: float | None = None
    summary: str = ""

    def __post_init__(self) -> None:
        for kind, name, table in (
            ("removal", self.removal, REMOVALS),
            ("regrowth", self.regrowth, REGROWTHS),
            ("zeta schedule", self.zeta_schedule, DECAYS),
            ("predictor", self.predictor, SCORES),
            ("kernel_shares", self.kernel_shares, SHARES),
        ):
            if name is not None:
                check_name(kind, name, table)
        check_name("density schedule", self.density, DENSITIES)
        if self.removal is None and self.regrowth is not None:
            raise ConfigurationError(
                f"regrowth {self.regrowth!r} without a removal: what regrows replaces what was removed; "
                f"accepted removals are {', '.join(map(repr, REMOVALS))}."
            )
        if self.removal is None and self.density != "constant":
            raise ConfigurationError(f"the density schedule {self.density!r} needs a removal.")
        for field in ("redistribute", "prune_dead"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigurationError(f"{field}={getattr(self, field)!r}: accepted are True and False.")
        for field in ("temperature", "explore", "smoothing", "early_stop", "initial_sparsity"):
            value, optional = getattr(self, field), field in ("early_stop", "initial_sparsity")
            if not (isinstance(value, int | float) or (value is None and optional)):
                raise ConfigurationError(f"{field}={value!r}: accepted are numbers{', or None' if optional else ''}.")
        if self.initial_sparsity is not None and not 0 <= self.initial_sparsity < 1:
            raise ConfigurationError(
                f"initial_sparsity={self.initial_sparsity!r}: accepted are numbers from 0 up and below 1, or None."
            )
        if not self.temperature >= 0:
            raise ConfigurationError(f"temperature={self.temperature!r}: accepted are numbers from 0 up.")
        for field in ("explore", "smoothing"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigurationError(f"{field}={getattr(self, field)!r}: accepted are numbers from 0 to 1.")
        if self.early_stop is not None and not 0 < self.early_stop <= 1:
            raise ConfigurationError(f"early_stop={self.early_stop!r}: accepted are numbers above 0 and up to 1.")
        if self.redistribute and self.worth != "momentum":
            raise ConfigurationError("redistribute=True goes by momentum; accepted is regrowth='momentum'.")
        if self.redistribute and self.density != "constant":
            raise ConfigurationError(
                f"redistribute=True keeps the number of links; accepted is density='constant', not {self.density!r}."
            )
        if self.prune_dead and self.regrowth is None:
            raise ConfigurationError("prune_dead=True needs a regrowth, for as many links as it removes.")

    @property
    def ignored(self) -> tuple[str, ...]:
        """Fields with a value of their own of which its rules take no notice.

        >>> method("cht", explore=0.3).ignored, method("chts", explore=0.3).ignored
        (('explore',), ())
        """
        usual = Method.__dataclass_fields__
        return tuple(name for name in self.unnoticed if getattr(self, name) != usual[name].default)

    @property
    def unnoticed(self) -> tuple[str, ...]:
        """Fields of which its rules take no notice, whatever their values.

        >>> method("gmp").unnoticed
        ('temperature', 'explore', 'smoothing', 'kernel_shares', 'early_stop')
        """
        sampled = self.regrowth is not None and REGROWTHS[self.regrowth].sampled
        noticed = {
            "temperature": sampled, "explore": sampled, "smoothing": self.uses_scores and self.predictor != PRIOR,
            "kernel_shares": self.uses_scores, "early_stop": self.regrowth is not None,
        }  # fmt: skip
        return tuple(name for name, used in noticed.items() if not used)

    @property
    def evolves(self) -> bool:
        """Whether the topology ever changes.

        >>> method("gmp").evolves, method("gmp", density="constant").evolves
        (True, False)
        """
        return self.removal is not None and (self.regrowth is not None or self.density != "constant")

    @property
    def moves_links(self) -> bool:
        """Whether links move between kernels, so that these cannot all have the same number."""
        return self.redistribute or self.prune_dead

    @property
    def allocation(self) -> str:
        """Within what links compete where nobody says it."""
        return "layer" if self.moves_links else "kernel"

    @property
    def worth(self) -> str:
        """What regrowth goes by, see :class:`chtconv.methods.regrowth.Regrowth`."""
        return REGROWTHS[self.regrowth].worth if self.regrowth else "nothing"

    @property
    def uses_scores(self) -> bool:
        """Whether it needs link prediction."""
        return self.worth in ("scores", "scores_and_gradient")

    @property
    def needs_dense_gradients(self) -> bool:
        """Whether it looks at gradients of disabled links."""
        return self.worth in ("gradient", "momentum", "scores_and_gradient")


METHODS: Mapping[str, Method] = MappingProxyType({
    "static": Method(None, None, summary="a random sparse topology that never changes"),
    "set": Method(summary="Sparse Evolutionary Training: links regrow at random"),
    "rigl": Method(regrowth="gradient", summary="RigL: the links of largest gradient regrow"),
    "snfs": Method(
        regrowth="momentum", redistribute=True,
        summary="sparse networks from scratch: momentum says which links regrow, and in which layer",
    ),
    "mest": Method(
        "magnitude_and_gradient", zeta_schedule="linear",
        summary="MEST with elastic mutation: magnitude and gradient say what goes, links regrow at random",
    ),
    "gmp": Method(
        regrowth=None, density="cubic", initial_sparsity=0.0, summary="gradual magnitude pruning, from a dense model"
    ),
    "granet": Method(
        regrowth="gradient", density="cubic", initial_sparsity=0.5,
        summary="GraNet: gradual pruning with regrowth by gradient; published with allocation='model' and ERK",
    ),
    "cht": Method(
        regrowth="highest_score", summary="Cannistraci-Hebb Training: the links of highest score regrow"
    ),
    "chts": Method(
        regrowth="sampled_by_score", summary="CHT with soft regrowth: links are sampled by their score"
    ),
    "chtss": Method(
        "soft_magnitude", "sampled_by_score", density="sigmoid", initial_sparsity=0.5,
        summary="CHTs with soft removal and a density that falls along a sigmoid",
    ),
    "cht_gradient": Method(
        regrowth="score_times_gradient",
        summary="the highest products of link score and gradient regrow: not gradient-free any more",
    ),
    "random_turnover": Method(
        regrowth="random_at_turnover", summary="control: random links, as many new ones as CHTs would bring"
    ),
    "shuffled": Method(
        regrowth="shuffled_scores", summary="control: CHTs with the scores of a kernel dealt out anew at random"
    ),
    "occupancy": Method(
        regrowth="sampled_by_score", predictor="occupancy", summary="control: sampled by the links of the slice"
    ),
    "input_degree": Method(
        regrowth="sampled_by_score", predictor="input_degree",
        summary="control: sampled by the links of the input channel",
    ),
    "in_bounds": Method(
        regrowth="sampled_by_score", predictor="in_bounds",
        summary="control: sampled by the share of windows in which padding leaves the position",
    ),
})  # fmt: skip


def method(name: str | Method, **changes: Any) -> Method:
    """The method with this name, with some of its parts changed.

    Args:
        name: a name in :data:`METHODS`, or a method.
        changes: fields of :class:`Method`.

    Raises:
        ConfigurationError: no such method or field, or a value that it does not take.

    >>> method("chts", removal="soft_magnitude", temperature=4).uses_scores
    True
    """
    if not isinstance(name, Method):
        check_name("method", name, METHODS)
        name = METHODS[name]
    for field in changes:
        if field not in Method.__dataclass_fields__:
            raise unknown("field of a method", field, Method.__dataclass_fields__)
    return replace(name, **changes)
