"""The record of a topology: one row a layer and evolution."""

from typing import Any

import torch
from torch import Tensor

from chtconv.layers.matrix import positions_of
from chtconv.selection import count_true
from chtconv.topology.evolution import Evolved
from chtconv.topology.metrics import empty_slices


class Record:
    """Rows of plain Python, counted on the device and fetched from it only when somebody asks.

    A row has the keys

    * ``evolution`` and ``step``, both counted from the start, and ``layer``;
    * ``links``, ``size`` and ``density``: active links, positions, and their ratio;
    * ``removed``: links removed; ``rechosen``: of those, chosen again in the same evolution; ``new``: links that were
      not there before;
    * ``overlap``: rechosen / removed, near 1 in an epitopological local minimum;
    * ``turnover``: new / links, the true turnover;
    * ``survival``: share of the new links of the evolution before that are still active; None where
      that brought none, and in the first;
    * ``itop``: share of all links that were ever active (in-time over-parametrisation);
    * ``slices``: (kernel, input channel) pairs; ``empty_slices``: share of them without a link;
    * ``zero_scores``: share of the disabled positions with score 0, and ``tied_scores``, share of them whose score is
      positive and equal to another one of their kernel (in up to 8 kernels); None without link prediction.
    """

    def __init__(self, rows: list[dict[str, Any]] | None = None) -> None:
        self._rows = list(rows or [])
        self._pending: list[tuple[dict[str, Any], Tensor, bool]] = []

    def add(self, evolution: int, step: int, evolved: Evolved, newest: Tensor, explored: Tensor) -> None:
        """Adds the row of a layer that has just evolved.

        Args:
            evolution: index of the evolution.
            step: optimizer steps so far.
            evolved: what became of the layer.
            newest: bool [O, I], links that the evolution before brought.
            explored: bool, links that were ever active, up to now.
        """
        mask, layer = evolved.mask, evolved.layer
        scored = evolved.scored is not None
        scores = evolved.scored if evolved.scored is not None else torch.zeros(2, device=mask.device)
        positive, tied = scores.to(mask.device)
        numbers = torch.stack([
            number.double()
            for number in (
                count_true(mask),
                count_true(evolved.removed),
                count_true(evolved.removed & mask),
                count_true(evolved.new),
                positive,
                empty_slices(mask, layer.module),
                tied,
                count_true(newest),
                count_true(newest & mask),
                count_true(explored),
            )
        ])  # fmt: skip
        key = {"evolution": evolution, "step": step, "layer": layer.name, "size": mask.numel()}
        key["slices"] = mask.numel() // positions_of(layer.module)
        self._pending.append((key, numbers, scored))

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, oldest first."""
        if self._pending:
            values = torch.stack([numbers for _, numbers, _ in self._pending]).tolist()
            for (key, _, scored), numbers in zip(self._pending, values, strict=True):
                self._rows.append(_row(key, scored, *numbers))
            self._pending.clear()
        return self._rows

    def last(self) -> list[dict[str, Any]]:
        """The rows of the latest evolution."""
        rows = self.rows()
        return [row for row in rows if row["evolution"] == rows[-1]["evolution"]]


def _row(
    key: dict[str, Any],
    scored: bool,
    links: float,
    removed: float,
    rechosen: float,
    new: float,
    positive: float,
    empty: float,
    tied: float,
    newest: float,
    survived: float,
    explored: float,
) -> dict[str, Any]:
    disabled = key["size"] - links + rechosen + new
    return key | {
        "links": int(links),
        "density": links / key["size"],
        "removed": int(removed),
        "rechosen": int(rechosen),
        "new": int(new),
        "overlap": rechosen / removed if removed else 0.0,
        "turnover": new / links if links else 0.0,
        "survival": survived / newest if newest else None,
        "itop": explored / key["size"],
        "empty_slices": empty,
        "zero_scores": (1 - positive / disabled if disabled else 0.0) if scored else None,
        "tied_scores": tied if scored else None,
    }
