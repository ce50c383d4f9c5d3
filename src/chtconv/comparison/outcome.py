"""What is to be done for a cell, and what became of it: plain values that travel between processes and machines."""

import dataclasses
import json
from typing import Any, Literal

State = Literal["done", "stopped", "failed"]


@dataclasses.dataclass(frozen=True)
class Task:
    """The training of one cell.

    Attributes:
        out: its run folder, an absolute path.
        config: the values of its configuration.
        deadline: seconds of :func:`time.time` at which it must have ended; None for no end.
        threads: CPU threads; None leaves them to torch and the environment.
        session: folder of the session that it belongs to, see :mod:`chtconv.comparison.session`; None for no session.
        cwd: folder that relative paths in the configuration start at; None for that of the process.
    """

    out: str
    config: dict[str, Any]
    deadline: float | None = None
    threads: int | None = None
    session: str | None = None
    cwd: str | None = None

    def to_line(self) -> str:
        """One line of JSON.

        >>> Task.from_line(Task("/runs/a", {"lr": 0.1}).to_line())
        Task(out='/runs/a', config={'lr': 0.1}, deadline=None, threads=None, session=None, cwd=None)
        """
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Task":
        """The task that :meth:`to_line` wrote."""
        return cls(**json.loads(line))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a cell: done, stopped (it can go on from its last whole epoch), or failed.

    Attributes:
        state: which of them.
        reason: why, where it is not done.
        warnings: what this package warned of meanwhile.
    """

    state: State
    reason: str = ""
    warnings: tuple[str, ...] = ()

    def to_line(self) -> str:
        """One line of JSON.

        >>> Outcome.from_line(Outcome("failed", "the disk is full").to_line())
        Outcome(state='failed', reason='the disk is full', warnings=())
        """
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Outcome":
        """The outcome that :meth:`to_line` wrote.

        Raises:
            ValueError: if it did not.
        """
        try:
            found = cls(**json.loads(line))
            return dataclasses.replace(found, warnings=tuple(found.warnings))
        except TypeError as error:
            raise ValueError(f"no outcome: {line!r}") from error
