"""The record of a topology: one row a layer and evolution."""

from typing import Any

import torch
from torch import Tensor

from chtconv.evolution import Evolved
from chtconv.layers import SparseLayer
from chtconv.metrics import empty_slices


class Record:
    """Rows of plain Python, counted on the device and fetched from it only when somebody asks.

    A row has the keys ``evolution`` and ``step`` (both counted from the start), ``layer``, ``links`` (active links),
    ``removed`` (links removed), ``rechosen`` (of those, chosen again in the same evolution), ``new`` (links that were
    not there before), ``overlap`` (rechosen / removed: near 1 in an epitopological local minimum), ``zero_scores``
    (share of the disabled positions with score 0, which is all of them without link prediction) and ``empty_slices``.
    """

    def __init__(self, rows: list[dict[str, Any]] | None = None) -> None:
        self._rows = list(rows or [])
        self._pending: list[tuple[dict[str, Any], Tensor, int]] = []

    def add(self, evolution: int, step: int, layer: SparseLayer, evolved: Evolved) -> None:
        """Adds the row of a layer that has just evolved."""
        mask = evolved.mask
        removed = evolved.removed.count_nonzero()
        rechosen = (evolved.removed & mask).count_nonzero()
        positive = (evolved.scores > 0).count_nonzero()
        empty = empty_slices(mask.view(layer.weight.shape))
        numbers = torch.stack([removed.double(), rechosen.double(), positive.double(), empty.double()])
        key = {"evolution": evolution, "step": step, "layer": layer.name, "links": layer.links * len(mask)}
        self._pending.append((key, numbers, mask.numel()))

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, oldest first."""
        if self._pending:
            values = torch.stack([numbers for _, numbers, _ in self._pending]).tolist()
            for (key, _, size), (removed, rechosen, positive, empty) in zip(self._pending, values, strict=True):
                self._rows.append(_row(key, size, int(removed), int(rechosen), int(positive), empty))
            self._pending.clear()
        return self._rows

    def last(self) -> list[dict[str, Any]]:
        """The rows of the latest evolution."""
        rows = self.rows()
        return [row for row in rows if row["evolution"] == rows[-1]["evolution"]]


def _row(key: dict[str, Any], size: int, removed: int, rechosen: int, positive: int, empty: float) -> dict[str, Any]:
    disabled = size - key["links"] + removed
    return key | {
        "removed": removed,
        "rechosen": rechosen,
        "new": removed - rechosen,
        "overlap": rechosen / removed if removed else 0.0,
        "zero_scores": 1 - positive / disabled if disabled else 0.0,
        "empty_slices": empty,
    }
