"""The preregistered tests, fixed and committed before their runs: one variant against all others, paired by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from layout import ROOT

from chtconv.comparison.grid import grid_from, read_toml
from chtconv.comparison.result import identity, read_lines
from chtconv.comparison.rows import Row, rows
from chtconv.comparison.statistics import Paired, holm, paired


@dataclass(frozen=True)
class Difference:
    """The variant of a test minus another one.

    Attributes:
        other: how the table calls the other one.
        sparsity: of both.
        paired: in points of test accuracy.
        p: adjusted (Holm) for all differences of the test; None where there is none.
    """

    other: str
    sparsity: float
    paired: Paired
    p: float | None


@dataclass(frozen=True)
class PreregisteredTest:
    """A test.

    Attributes:
        about: what it is about, in few words.
        variant: the one that the test is about; p values are adjusted (Holm) for all of its differences together.
        files: in results/, of its runs and those of the others.
        unsaid: parts of the names of variants that are left out.
    """

    about: str
    variant: str
    files: Sequence[str]
    unsaid: Sequence[str] = ()

    @cached_property
    def rows(self) -> list[Row]:
        """All variants at the sparsities that the test is about."""
        found = rows(self._lines)
        sparsities = {row.sparsity for row in found if row.variant == self.variant}
        return [row for row in found if row.sparsity in sparsities]

    @cached_property
    def missing(self) -> int:
        """How many of its runs are still to be made: it counts once there are none."""
        plans = [grid_from(read_toml(ROOT / "experiments" / f"{Path(name).stem}.toml")) for name in self.files]
        there = [identity(line["config"]) for line in self._lines]
        return sum(identity(cell.config.to_dict()) not in there for plan in plans for cell in plan.cells())

    @property
    def sparsities(self) -> list[float]:
        """Those that the test is about, in order."""
        return sorted({row.sparsity for row in self.rows})

    @cached_property
    def differences(self) -> list[Difference]:
        """Of the variant to each of the others, by sparsity."""
        mine = {row.sparsity: row for row in self.rows if row.variant == self.variant}
        others = [row for row in self.rows if row.variant != self.variant]
        found = [paired(mine[row.sparsity].accuracies, row.accuracies) for row in others]
        return [
            Difference(self.called(row.variant), row.sparsity, each, p)
            for row, each, p in zip(others, found, holm([each.p for each in found]), strict=True)
        ]

    @cached_property
    def _lines(self) -> list[Mapping[str, Any]]:
        files = [file for name in self.files if (file := ROOT / "results" / name).exists()]
        return [line for file in files for line in read_lines(file)]

    def called(self, variant: str) -> str:
        """A variant without the parts of its name that are left out."""
        return ", ".join(part for part in variant.split(", ") if part not in self.unsaid)


_MOVING = ("allocation layer", "all windows", "kernel shares links")
_FALLING = ("density cubic", "all windows")

# By the name of their tables.
PREREGISTERED_TESTS = {
    "confirmation_paper": PreregisteredTest("the paper's comparison, small", "CHT", ["confirmation-paper.jsonl"]),
    "confirmation": PreregisteredTest(
        "constant sparsity, links move in a layer",
        "CHTs, allocation layer, all windows, kernel shares links",
        ["confirmation.jsonl"],
        _MOVING,
    ),
    "confirmation_smoothing": PreregisteredTest(
        "constant sparsity, links move in a layer",
        "CHTs, allocation layer, all windows, smoothing 0.5",
        ["confirmation.jsonl", "confirmation-smoothing.jsonl"],
        _MOVING,
    ),
    "confirmation_density": PreregisteredTest(
        "sparsity rises from 50 %, the same in every layer",
        "CHTs, density cubic, all windows",
        ["confirmation-density.jsonl"],
        _FALLING,
    ),
    "confirmation_density_90": PreregisteredTest(
        "sparsity rises from 50 %, the same in every layer",
        "CHTs, density cubic, all windows",
        ["confirmation-density-90.jsonl"],
        _FALLING,
    ),
    "confirmation_model": PreregisteredTest(
        "sparsity rises from 50 %, global pruning",
        "CHTs, density cubic, allocation model, all windows, smoothing 0.5",
        ["confirmation-model.jsonl"],
        ("density cubic", "allocation model", "all windows"),
    ),
}
