"""When the topology evolves, and how much of it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Final, TypeAlias

from chtconv.errors import ConfigurationError, check_name

Decay: TypeAlias = Callable[[float], float]


def constant(progress: float) -> float:
    """The same fraction from the first evolution to the last."""
    return 1.0


def cosine(progress: float) -> float:
    """From all of it to nothing along half a cosine: many changes early, few late.

    >>> [round(cosine(progress), 2) for progress in (0, 0.5, 1)]
    [1.0, 0.5, 0.0]
    """
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def linear(progress: float) -> float:
    """From all of it to nothing along a straight line."""
    return 1 - min(progress, 1.0)


# One of your own gives numbers from 0 to 1, too.
DECAYS: dict[str, Decay] = {"constant": constant, "cosine": cosine, "linear": linear}
# Where it is known when evolution stops, and the method has none of its own.
USUAL_DECAY: Final = "cosine"


def cubic(progress: float) -> float:
    """Share of the way from the first to the last density: fast at first (Zhu and Gupta 2017, equation 1).

    >>> [cubic(progress) for progress in (0, 0.5, 1)]
    [0, 0.875, 1]
    """
    return 1 - (1 - min(progress, 1.0)) ** 3


def sigmoid(progress: float, steepness: float = 6.0) -> float:
    """Share of the way from the first to the last density: slow, fast, slow (CHTss), scaled to hit both ends.

    >>> [round(sigmoid(progress), 3) for progress in (0, 0.25, 0.5, 1)]
    [0.0, 0.149, 0.5, 1.0]
    """
    low, here, high = (1 / (1 + math.exp(-steepness * (each - 0.5))) for each in (0.0, min(progress, 1.0), 1.0))
    return (here - low) / (high - low)


# How far the density has come from its first value to its last: numbers from 0 to 1.
DENSITIES: dict[str, Decay] = {"constant": lambda progress: 1.0, "cubic": cubic, "sigmoid": sigmoid}


def density_between(first: float, last: float, course: str, progress: float) -> float:
    """The density on its way from the first to the last.

    Args:
        first: density before training.
        last: density at the end.
        course: a name in :data:`DENSITIES`.
        progress: of the evolution, from 0 to 1.

    Raises:
        ConfigurationError: a course that gave something else than a number from 0 to 1.

    >>> density_between(1.0, 0.5, "cubic", progress=0.5)
    0.5625
    """
    return first + (last - first) * _share("density schedule", course, DENSITIES, progress)


def _share(kind: str, name: str, table: Mapping[str, Decay], progress: float) -> float:
    share = table[name](progress)
    if not isinstance(share, Real) or not 0 <= share <= 1:
        raise ConfigurationError(
            f"{kind} {name!r} gave {share!r} at progress {progress:.3g}: accepted are numbers from 0 to 1."
        )
    return float(share)


@dataclass(frozen=True)
class Schedule:
    """Evolution times and the drop fraction zeta at each of them.

    Attributes:
        zeta: fraction of the links of a kernel that an evolution removes, in (0, 1].
        decay: how zeta falls: a name in :data:`DECAYS`. Every decay but ``"constant"`` needs ``stop``.
        interval: optimizer steps between two evolutions.
        stop: there is no evolution at this step or after it; None for never.
    """

    zeta: float = 0.3
    decay: str = "constant"
    interval: int = 100
    stop: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.zeta, Real) or not 0 < self.zeta <= 1:
            raise ConfigurationError(f"zeta={self.zeta!r}: accepted are numbers above 0 and up to 1.")
        check_name("zeta schedule", self.decay, DECAYS)
        if not isinstance(self.interval, int) or isinstance(self.interval, bool) or self.interval < 1:
            raise ConfigurationError(f"interval={self.interval!r}: accepted is a whole number of optimizer steps.")
        if self.stop is not None and (not isinstance(self.stop, int) or self.stop < 0):
            raise ConfigurationError(f"stop={self.stop!r}: accepted is a whole number of optimizer steps, or None.")
        if self.stop is None and self.decay != "constant":
            raise ConfigurationError(
                f"the zeta schedule {self.decay!r} needs an end: give stop or total_steps, or use 'constant'."
            )

    def evolves_at(self, step: int) -> bool:
        """Whether the topology evolves after this many optimizer steps."""
        return step % self.interval == 0 and (self.stop is None or step < self.stop)

    def progress(self, step: int) -> float:
        """How much of the evolution lies behind this step, from 0 to 1 at the last one; 0 where there is no end."""
        if self.stop is None:
            return 0.0
        last = (self.stop - 1) // self.interval * self.interval
        return min(1.0, step / last) if last > 0 else 1.0

    def zeta_at(self, step: int) -> float:
        """The drop fraction after this many optimizer steps."""
        if self.stop is None:
            return self.zeta
        passed = min(1.0, step / self.stop) if self.stop else 1.0
        return self.zeta * _share("zeta schedule", self.decay, DECAYS, passed)
