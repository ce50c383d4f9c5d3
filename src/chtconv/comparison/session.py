"""A session: the time in which one process has cells of a comparison trained, anywhere.

It is a folder that all processes see, on whatever machine: ``.open`` is there as long as the session lasts, and beside
it a mark with the name of each cell that is being trained. So every engine tells in the same way what runs, and what
runs learns in the same way that nobody waits for it any more, also after the coordinator was killed.
"""

import contextlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from chtconv.errors import ConfigurationError

PREFIX: Final = ".session-"
_OPEN: Final = ".open"
# What still runs when a session ends looks every half second; a shared file system may show it later.
_PATIENCE: Final = 10.0
_RENEW_EVERY: Final = 10.0
_STALE_AFTER: Final = 60.0


class SessionEnded(Exception):  # noqa: N818 - an event, not a mistake in the program
    """The session is over, so that nobody waits for the cell."""


class Session:
    """A session as its coordinator sees it, in the folder ``path``."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self._seen: dict[str, tuple[int, float]] = {}

    def running(self) -> set[str]:
        """The names of the cells that are being trained: those whose marks were renewed within the last minute.

        The mark of a worker that was killed stays. Only changes of its time are looked at, because clocks of machines
        differ.
        """
        now, marks = time.monotonic(), _marks(self.path)
        for name, renewed in marks.items():
            if self._seen.get(name, (None,))[0] != renewed:
                self._seen[name] = (renewed, now)
        return {name for name in marks if now - self._seen[name][1] < _STALE_AFTER}


class Mark:
    """The mark of a cell that is being trained; without a session there is none, and nothing ends it."""

    def __init__(self, session: str | None, name: str) -> None:
        self._session = session
        self._path = Path(session) / name if session is not None else None
        self._renewed = time.monotonic()

    def look(self) -> None:
        """Renew the mark, if the session lasts.

        Raises:
            SessionEnded: if it does not.
        """
        if not is_open(self._session):
            raise SessionEnded
        if self._path is not None and time.monotonic() - self._renewed > _RENEW_EVERY:
            self._renewed = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self._path)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Session]:
    """A new session in the folder of a comparison, whose lock must be held; all earlier ones end.

    On leaving, the session ends, and cells that still run have a few seconds to stop.
    """
    for old in folder.glob(PREFIX + "*"):
        _end(old, patience=0.0)
    path = folder / f"{PREFIX}{uuid.uuid4().hex[:8]}"
    path.mkdir()
    (path / _OPEN).touch()
    try:
        yield Session(path)
    finally:
        _end(path, patience=_PATIENCE)


def is_open(session: str | None) -> bool:
    """Whether the session lasts: only a file that is known to be absent ends one, never a file system that stutters."""
    if session is None:
        return True
    try:
        os.stat(Path(session) / _OPEN)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def marked(session: str | None, name: str) -> Iterator[Mark]:
    """Say in the session that the cell ``name`` is being trained, by which process of which machine.

    Raises:
        SessionEnded: if the session is over.
        ConfigurationError: if this machine does not see the folder of the comparison at all.
    """
    if session is None:
        yield Mark(session, name)
        return
    path, machine = Path(session) / name, socket.gethostname()
    if not path.parent.parent.is_dir():
        folder = path.parent.parent
        raise ConfigurationError(f"{machine} does not see {folder}: it must be on storage that all workers share")
    if not is_open(session):
        raise SessionEnded
    try:
        path.write_text(f"{machine} {os.getpid()}\n")
    except FileNotFoundError:
        raise SessionEnded from None
    try:
        yield Mark(session, name)
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _marks(path: Path) -> dict[str, int]:
    """When each mark was renewed."""
    marks = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
        for entry in entries:
            if entry.name != _OPEN:
                with contextlib.suppress(OSError):
                    marks[entry.name] = entry.stat().st_mtime_ns
    return marks


def _end(path: Path, patience: float) -> None:
    (path / _OPEN).unlink(missing_ok=True)
    until = time.monotonic() + patience
    while _marks(path) and time.monotonic() < until:
        time.sleep(0.1)
    shutil.rmtree(path, ignore_errors=True)
