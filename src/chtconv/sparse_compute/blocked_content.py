"""What aliases of one activation in the blocked layout share: its numbers, or how to compute them."""

import weakref
from typing import Any, Protocol

from torch import Tensor

from chtconv.sparse_compute import layout


class Pending(Protocol):
    """What can be computed when it is known what for."""

    def evaluate(self) -> Tensor:
        """The blocks."""


class Content:
    """What aliases of one activation share: its numbers, in one of three forms.

    Attributes:
        pending: how to compute the numbers, where that is not done yet.
        dense: NCHW memory of the numbers, once a view into it has been handed out; from then on it holds the truth.
        origin: of a rectified batch normalisation what it was made of, for as long as it is that.
        changes: counts what was done in place.
        watched: whether versions tell of every change through views.
    """

    __slots__ = (
        "__weakref__",
        "_blocks",
        "_dependents",
        "_version",
        "changes",
        "dense",
        "origin",
        "pending",
        "watched",
    )

    def __init__(self, blocks: Tensor | None, pending: Pending | None = None) -> None:
        self._blocks = blocks
        self.pending = pending
        self.dense: Tensor | None = None
        self.origin: Any = None
        self.changes = 0
        self.watched = True
        self._version: int | None = None
        self._dependents: list[weakref.ref[Content]] | None = None

    def blocks(self, alias: Tensor | None = None) -> Tensor:
        """The blocks, evaluated. By the version of ``alias`` it is known whether a view has been written to."""
        if self._blocks is None or self.dense is not None:
            if self.pending is not None:
                self._blocks, self.pending = self.pending.evaluate(), None
            elif self.dense is not None:
                version = self._seen(alias)
                if self._blocks is None or version is None or version != self._version:
                    self._blocks, self._version, self.origin = layout.to_blocks(self.dense), version, None
        assert self._blocks is not None
        return self._blocks

    def fill(self, blocks: Tensor, origin: Any = None) -> None:
        """Other numbers from now on. Call :meth:`change` first."""
        self._blocks, self.pending, self.origin = blocks, None, origin

    def defer(self, pending: Pending, *needed: "Content") -> None:
        """Numbers that are computed later, from other contents that evaluate this before they change."""
        self._blocks, self.pending = None, pending
        for other in needed:
            if other.dense is not None:
                # Whoever writes to its views does not tell.
                self.blocks()
                return
        for other in needed:
            if other._dependents is None:
                other._dependents = []
            other._dependents.append(weakref.ref(self))

    def reveal(self, batch: int, alias: Tensor | None = None) -> Tensor:
        """Memory in NCHW of which views may be handed out."""
        if self.dense is None:
            self._evaluate_dependents()
            self.dense = layout.to_strided(self.blocks(), batch)
            self._version = self._seen(alias)
        return self.dense

    def change(self) -> None:
        """To be called before the numbers change: evaluates all that still needs them."""
        self.changes += 1
        self.origin = self._version = None
        self._evaluate_dependents()

    def _evaluate_dependents(self) -> None:
        dependents, self._dependents = self._dependents, None
        for each in dependents or ():
            content = each()
            if content is not None and content.pending is not None:
                content.blocks()

    def _seen(self, alias: Tensor | None) -> int | None:
        return None if alias is None or not self.watched or alias.is_inference() else alias._version
