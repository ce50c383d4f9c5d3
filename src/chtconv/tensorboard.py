"""The numbers of a topology as curves in TensorBoard."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from torch.utils.hooks import RemovableHandle

from chtconv.errors import ConfigurationError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Evolving(Protocol):
    """What is asked of a :class:`chtconv.Topology`."""

    @property
    def records(self) -> list[dict[str, Any]]:
        """Rows of all evolutions, see :mod:`chtconv.topology.record`."""

    def stats(self) -> dict[str, Any]:
        """Numbers of the whole, and of each layer under ``"layers"``."""

    def on_evolution(self, callback: Callable[[Any], None]) -> RemovableHandle:
        """Has a function called after every evolution."""


Scalars: TypeAlias = Iterator[tuple[str, float]]

# Where something is, not how much of it there is.
COORDINATES = {"evolution", "step", "layer"}


def log_to(
    topology: Evolving, writer: "SummaryWriter | str | PathLike[str]", *, prefix: str = "topology"
) -> RemovableHandle:
    """Writes every number that a topology knows of itself after each of its evolutions, from now on.

    The curves of the whole are ``topology/density`` and the like, those of the layers
    ``topology.density/features.0.weight``, so that TensorBoard shows one section for each number. They are all that
    ``topology.stats()`` and the latest row of each layer in ``topology.records`` hold, over optimizer steps.

    Args:
        topology: what :func:`chtconv.sparsify` returned.
        writer: a ``SummaryWriter``, or the folder for a new one, which is closed when the topology ceases to be.
        prefix: what the tags begin with.

    Returns:
        The handle whose ``remove()`` ends it.

    Raises:
        ConfigurationError: a folder is given but ``tensorboard`` is not installed, or ``writer`` is neither.

    Example:
        .. code-block:: python

            topology = chtconv.sparsify(model, optimizer)
            chtconv.tensorboard.log_to(topology, "runs/first")
    """
    if isinstance(writer, (str, PathLike)):
        writer = _new_writer(fspath(writer))
        weakref.finalize(topology, writer.close)
    elif not callable(getattr(writer, "add_scalar", None)):
        raise ConfigurationError(f"writer={writer!r}: accepted is a SummaryWriter, or the path of a folder.")
    board = writer

    def write(evolved: Evolving) -> None:
        stats = evolved.stats()
        for tag, value in _scalars(stats, evolved.records, prefix):
            board.add_scalar(tag, value, stats["step"])
        board.flush()

    return topology.on_evolution(write)


def _scalars(stats: dict[str, Any], records: list[dict[str, Any]], prefix: str) -> Scalars:
    """All numbers of the whole and of each layer with their tags; a number of the stats goes before one recorded."""
    overall = {key: value for key, value in stats.items() if key != "layers"}
    yield from ((f"{prefix}/{name}", value) for name, value in _numbers(overall))
    latest = {row["layer"]: row for row in records}
    for layer, numbers in stats["layers"].items():
        for name, value in _numbers(latest.get(layer, {}) | numbers):
            yield f"{prefix}.{name}/{layer}", value


def _numbers(values: Mapping[str, Any], path: str = "") -> Scalars:
    """The numbers in a nested dict, each with its path in it.

    >>> dict(_numbers({"links": 3, "shape": [3, 1], "flops": {"dense": 8.0}, "exact": True, "step": 2}))
    {'links': 3.0, 'flops.dense': 8.0}
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}{key}.")
        elif isinstance(value, Real) and not isinstance(value, bool) and key not in COORDINATES:
            yield f"{path}{key}", float(value)


def _new_writer(folder: str) -> "SummaryWriter":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigurationError(
            f"writer={folder!r} needs TensorBoard, which cannot be imported ({error}): "
            "pip install 'chtconv[tensorboard]'"
        ) from error
    return SummaryWriter(folder)
