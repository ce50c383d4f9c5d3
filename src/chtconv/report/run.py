"""What the page knows of a run and of a comparison: values that may be missing, and never a NaN that is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from chtconv.comparison.cell import METHOD_NAMES
from chtconv.comparison.rows import natural
from chtconv.training.config import DENSE

State = Literal["done", "running", "stopped", "failed", "waiting", "unreadable"]
Row: TypeAlias = Mapping[str, Any]
_LARGEST: Final = 1e30
BASELINES: Final = (DENSE, "set", "rigl")


def number(row: Row, key: str) -> float | None:
    """A finite number of a row that others wrote; None for anything else.

    >>> number({"overlap": 0.5}, "overlap"), number({"overlap": "high"}, "overlap"), number({}, "overlap")
    (0.5, None, None)
    """
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Larger ones are damage, and nothing that can be drawn or squared.
    return float(value) if abs(value) < _LARGEST else None


def table(row: Row, key: str) -> Row:
    """A table within a row; an empty one for anything else.

    >>> table({"hardware": {"cpu": "fast"}}, "hardware"), table({"hardware": None}, "hardware")
    ({'cpu': 'fast'}, {})
    """
    value = row.get(key)
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Run:
    """One run folder as far as it could be read.

    Attributes:
        name: of its folder.
        path: its folder.
        state: how far it is.
        reason: why it is not done; empty where there is nothing to say.
        variant: how people call what was trained.
        config: its configuration; empty where there is none.
        summary: what came out; empty unless it is done.
        metrics: a row an epoch.
        records: a row a layer and evolution.
        from_line: whether nothing is left of it but its line of results, which is its summary.
    """

    name: str
    path: Path
    state: State
    reason: str = ""
    variant: str = ""
    config: Row = field(default_factory=dict)
    summary: Row = field(default_factory=dict)
    metrics: Sequence[Row] = ()
    records: Sequence[Row] = ()
    from_line: bool = False

    @property
    def method(self) -> str:
        """The name of the method, empty where it is not known."""
        return str(self.config.get("method", ""))

    @property
    def sparsity(self) -> float | None:
        """Share of the links that is absent; 0 for a dense run."""
        return 0.0 if self.method == DENSE else number(self.config, "sparsity")

    @property
    def seed(self) -> int | None:
        """The seed of everything random."""
        found = number(self.config, "seed")
        return None if found is None else int(found)

    @property
    def steps_per_epoch(self) -> float | None:
        """Optimizer steps an epoch; None before the first epoch."""
        for row in self.metrics:
            steps, epoch = number(row, "steps"), number(row, "epoch")
            if steps and epoch:
                return steps / epoch
        return None


@dataclass(frozen=True)
class Group:
    """The runs of one variant at one sparsity, which differ in their seeds."""

    variant: str
    sparsity: float
    runs: Sequence[Run]

    @property
    def done(self) -> list[Run]:
        """Those that are complete."""
        return [run for run in self.runs if run.state == "done"]

    @property
    def has_begun(self) -> bool:
        """Whether any of them has something to show."""
        return any(run.state == "done" or run.metrics for run in self.runs)

    @property
    def is_baseline(self) -> bool:
        """Whether others are judged by it: dense, SET or RigL, in their plain form."""
        method = self.runs[0].method
        return method in BASELINES and self.variant == METHOD_NAMES[method]


@dataclass(frozen=True)
class Comparison:
    """Runs that share everything but topology and seed.

    Attributes:
        title: what people call it.
        runs: all of them, in whatever state.
        notes: what the reader should know about the reading, such as a file that could not be read.
    """

    title: str
    runs: Sequence[Run]
    notes: Sequence[str] = ()

    @property
    def done(self) -> list[Run]:
        """The complete runs."""
        return [run for run in self.runs if run.state == "done"]

    @property
    def measure(self) -> str:
        """Which accuracy is compared: that on held-out images where there are any, as in a screening."""
        known = [run for run in self.runs if run.config]
        held_out = all(number(run.config, "validation") for run in known)
        return "validation_accuracy" if known and held_out else "test_accuracy"

    @property
    def variants(self) -> list[str]:
        """The names of what is compared, in the order of the tables: by method, the plain variant first."""
        methods = {run.variant: run.method for run in reversed(self.runs) if run.config}
        return sorted(methods, key=lambda name: _place(methods[name], name))

    @property
    def layers(self) -> dict[str, int]:
        """The sparse layers by name, counted from 1 at the input; variants may leave out some of them."""
        found = [_layers(run) for run in self.runs]
        names = dict.fromkeys(name for layers in sorted(found, key=len, reverse=True) for name in layers)
        return {name: number for number, name in enumerate(names, 1)}

    @property
    def groups(self) -> list[Group]:
        """The runs by sparsity and variant, those of unknown configuration left out."""
        sparsities = sorted({run.sparsity for run in self.runs if run.sparsity is not None})
        found = [
            Group(variant, sparsity, [run for run in self.runs if (run.variant, run.sparsity) == (variant, sparsity)])
            for sparsity in sparsities
            for variant in self.variants
        ]
        return [group for group in found if group.runs]


def _place(method: str, variant: str) -> tuple[Any, ...]:
    methods = list(METHOD_NAMES)
    rank = methods.index(method) if method in methods else len(methods)
    return rank, variant != METHOD_NAMES.get(method), natural(variant)


def _layers(run: Run) -> list[str]:
    names = list(table(run.summary, "layers")) or [str(row.get("layer")) for row in run.records]
    return list(dict.fromkeys(name.removesuffix(".weight") for name in names))
