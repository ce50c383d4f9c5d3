"""Which layers compute sparsely: each is measured both ways on its own input, and the whole network weighed up.

A sparse layer among dense ones converts its activations, so that the choice is one for all layers: that with the least
sum of measured seconds, conversions included.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import torch

_LOG = logging.getLogger(__name__)
# Sparse layers must be faster by more than the clock is wrong.
_MARGIN: Final = 1.05
# Sizes and densities that differ by less are measured once.
_STEP: Final = math.log(1.3)
# The least and most repetitions of a measurement, and the seconds after which no more are begun.
_LEAST: Final = 2
_MOST: Final = 5
_BUDGET: Final = 0.01


class Case(NamedTuple):
    """What a layer computes, as far as its speed depends on it.

    Attributes:
        training: whether the module is in training mode.
        alone: whether it gets and gives ordinary tensors, as in a compiled graph.
        blocked: whether the batch is large enough for the blocked layout.
        work: size of the input over batch and space, in steps of 1.3.
        density: share of active links, in steps of 1.3.
        passes: "f" forward, "i" gradient of the input, "w" gradient of the weight.
        dense_type: what dense layers compute in.
        threads: of torch.
        isa: instruction set of the kernels.
    """

    training: bool
    alone: bool
    blocked: bool
    work: int
    density: int
    passes: str
    dense_type: str
    threads: int
    isa: str


class Measurement(NamedTuple):
    """Seconds of all passes of a layer, sparse and dense, and of the conversions at one of its ends."""

    sparse: float
    dense: float
    conversion: float


def in_steps(value: float) -> int:
    """A positive number in steps of 1.3.

    >>> in_steps(100) - in_steps(100 / 1.3), in_steps(100) - in_steps(99)
    (1, 0)
    """
    return round(math.log(value) / _STEP)


def fastest(*ways: Callable[[], object]) -> list[float]:
    """Seconds of each way of doing something: of its fastest repetition, all of them taken in turn."""
    for way in ways:
        way()
    best = [math.inf] * len(ways)
    began = time.perf_counter()
    for repetition in range(_MOST):
        for index, way in enumerate(ways):
            start = time.perf_counter()
            way()
            best[index] = min(best[index], time.perf_counter() - start)
        if repetition + 1 >= _LEAST and time.perf_counter() - began > _BUDGET:
            break
    return best


def cheapest(layers: Sequence[Measurement], apart: Sequence[bool] = ()) -> list[bool]:
    """Which of these layers, each of which feeds the next, are to be sparse so that all take the least time.

    What comes before the first and after the last is dense.

    Args:
        layers: what was measured of them.
        apart: whether what comes before a layer gives it an ordinary tensor even where the layer before is sparse.

    >>> fast, even, slow = Measurement(1, 4, 1), Measurement(2, 2, 1), Measurement(9, 2, 1)
    >>> cheapest([fast, even, fast]), cheapest([fast, slow, fast]), cheapest([even])
    ([True, True, True], [True, False, True], [False])
    >>> cheapest([fast, even, fast], apart=[False, True, True])
    [True, False, True]
    """
    if not layers:
        return []
    # Of the layers so far, with the last of them dense and sparse: the least seconds, and who is sparse then.
    dense: _Way = (0.0, [])
    sparse: _Way = (math.inf, [])
    for each, is_apart in itertools.zip_longest(layers, apart, fillvalue=False):
        assert isinstance(each, Measurement)
        to_dense = min(dense, _dearer(sparse, each.conversion), key=_seconds)
        to_sparse = min(
            _dearer(sparse, 2 * each.conversion if is_apart else 0.0), _dearer(dense, each.conversion), key=_seconds
        )
        dense = (to_dense[0] + each.dense, [*to_dense[1], False])
        sparse = (to_sparse[0] + each.sparse * _MARGIN, [*to_sparse[1], True])
    return min(dense, _dearer(sparse, layers[-1].conversion), key=_seconds)[1]


_Way: TypeAlias = tuple[float, list[bool]]


def _dearer(way: _Way, seconds: float) -> _Way:
    return way[0] + seconds, way[1]


def _seconds(way: _Way) -> float:
    return way[0]


class Tuner:
    """The choices for the layers of a topology.

    A case that is met for the first time is measured, and computed densely. In training, the choice is made at the next
    optimizer step, so that a recomputation in the backward pass computes what the forward pass did; in evaluation,
    when the layer is called again. One step later it is reviewed: what lies between two sparse layers may not know
    their layout, so that both have to convert.

    Attributes:
        choices: layer and case -> whether it is sparse.
        measured: layer and case -> seconds.
    """

    # Networks repeat layers, and people networks: by shape of the layer and case.
    _known: Final[dict[tuple[Any, ...], Measurement]] = {}

    def __init__(self) -> None:
        self.choices: dict[tuple[str, Case], bool] = {}
        self.measured: dict[tuple[str, Case], Measurement] = {}
        # In training and evaluation: the last case of each layer, in the order in which layers are called.
        self._last: dict[bool, dict[str, Case]] = {True: {}, False: {}}
        # Whether there is something new to choose by, and whether a choice has to be reviewed.
        self._open = {True: False, False: False}
        self._new = {True: False, False: False}
        # Sparse layers since then: whether their input came in the blocked layout. Layers whose input never does.
        self._came: dict[bool, dict[str, bool]] = {True: {}, False: {}}
        self._apart: set[str] = set()

    def sparse(
        self, name: str, case: Case, shape: tuple[Any, ...], came: bool, measure: Callable[[], Measurement | None]
    ) -> bool:
        """Whether a layer computes this case sparsely.

        Args:
            name: of the layer.
            case: what it computes.
            shape: all that is constant of the layer; layers of one shape are measured once.
            came: whether its input came in the blocked layout.
            measure: takes the time, or returns None where it cannot.
        """
        training = case.training
        if not training and self._new[False] and name in self._came[False]:
            self._review(False)
        choice = self.choices.get((name, case))
        if choice is None:
            if (name, case) in self.measured:
                if training:
                    return False
                self._choose(False)
                return self.choices[name, case]
            found = self._known.get((shape, case)) or measure()
            if found is None:
                return False
            self._known[shape, case] = self.measured[name, case] = found
            self._open[training] = True
            choice = False
        self._last[training][name] = case
        if self._new[training]:
            self._came[training][name] = came or not choice
        return choice

    def stepped(self) -> bool:
        """After an optimizer step: chooses where something new was found, and says whether."""
        if self._open[True]:
            self._choose(True)
            return True
        return self._new[True] and self._review(True)

    def sparse_in_graphs(self, name: str, density: int) -> bool:
        """Whether a layer of this density may be sparse in a compiled graph, as far as was measured."""
        found = [choice for (each, case), choice in self.choices.items() if each == name and case.alone]
        known = [case for (each, case) in self.choices if each == name and case.alone and case.density == density]
        return any(found) or not known

    def _choose(self, training: bool) -> None:
        """Chooses for all cases of training or evaluation that were measured."""
        self._open[training], self._new[training] = False, True
        self._came[training].clear()
        chain = self._chain(training)
        apart = [name in self._apart for name, _ in chain]
        chosen = dict(zip(chain, cheapest([self.measured[each] for each in chain], apart), strict=True))
        # A copy: another thread may be measuring.
        for each, found in list(self.measured.items()):
            name, case = each
            if case.training is training and (each in chosen or each not in self.choices):
                choice = chosen[each] if each in chosen else cheapest([found])[0]
                if self.choices.get(each) is not choice:
                    _LOG.info("%s", _line(name, case, found, choice))
                self.choices[each] = choice

    def _chain(self, training: bool) -> list[tuple[str, Case]]:
        last = list(self._last[training].items())
        return [(name, case) for name, case in last if not case.alone and (name, case) in self.measured]

    def _review(self, training: bool) -> bool:
        """Chooses again if sparse layers do not hand each other what they compute; says whether."""
        self._new[training] = False
        sparse = [(name, self.choices.get((name, case), False)) for name, case in self._chain(training)]
        apart = {
            name
            for (_, before), (name, itself) in itertools.pairwise(sparse)
            if before and itself and not self._came[training].get(name, True)
        }
        found = bool(apart - self._apart)
        self._apart |= apart
        if found:
            self._choose(training)
        return found

    def last(self, name: str) -> Case | None:
        """The last case of a layer in training, else in evaluation, that was chosen for."""
        for training in (True, False):
            case = self._last[training].get(name)
            if case is not None and (name, case) in self.choices:
                return case
        return None

    def state_dict(self) -> dict[str, Any]:
        """Choices and what they went by: plain Python. Chooses first for what was measured since."""
        for training in (True, False):
            if self._open[training]:
                self._choose(training)
        rows = [
            [name, list(case), choice, list(self.measured[name, case])] for (name, case), choice in self.choices.items()
        ]
        return {"choices": rows, "apart": sorted(self._apart), "new": [self._new[True], self._new[False]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Chooses as before, without measuring."""
        for name, case, choice, seconds in state["choices"]:
            key = (name, Case(*case))
            self.choices[key], self.measured[key] = bool(choice), Measurement(*seconds)
        self._apart = set(state["apart"])
        self._new = dict(zip((True, False), state["new"], strict=True))


def _line(name: str, case: Case, found: Measurement, choice: bool) -> str:
    return (
        f"{name.removesuffix('.weight')}: {'sparse' if choice else 'dense'} in "
        f"{'training' if case.training else 'evaluation'}; sparse takes {found.sparse * 1000:.3g} ms, dense "
        f"{found.dense * 1000:.3g} ms, conversion {found.conversion * 1000:.3g} ms"
    )


def dense_type(dtype: torch.dtype) -> torch.dtype:
    """What a dense layer computes in, under the autocast at hand."""
    if dtype is torch.float32 and torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return dtype
