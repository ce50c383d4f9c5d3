"""A cell in a process of its own, waited for: what every engine runs, in a thread here or in a worker elsewhere."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Final

from chtconv.comparison import session
from chtconv.comparison.folder import FAILURE
from chtconv.comparison.outcome import Outcome, Task
from chtconv.errors import ConfigurationError
from chtconv.files import LOCK, StorageError, locked, write_json

TIME_IS_UP: Final = Outcome("stopped", "the time is up")
INTERRUPTED: Final = Outcome("stopped", "interrupted")
TERMINATED: Final = Outcome("stopped", "its process was asked to end (SIGTERM)")

_LOOK_EVERY: Final = 0.5  # seconds between two looks at whether anybody still waits
_GRACE: Final = 5.0  # seconds that a process has to end before it is killed
# What died with its machine's worker ends within a second; a worker that is told to close takes half a minute.
_PATIENCE: Final = 60.0
_SHOWN: Final = 4000  # bytes of standard error that are kept of a failure
# The path first: the child must find the same modules as this process, from wherever this one was started, and none in
# the folder that it runs in, which -c puts first.
_CHILD: Final = (
    "import sys; sys.path[:] = filter(None, sys.path); import json; sys.path[:] = json.loads(sys.stdin.readline()); "
    "from chtconv.comparison.worker import main; sys.exit(main())"
)


class _OutOfTime(Exception):  # noqa: N818 - an event, not a mistake in the program
    """The deadline passed while a cell was being trained."""


def run_cell(task: Task) -> Outcome:
    """Train a cell in a process of its own, and wait for it.

    The process ends with this one, with the session, and when it is done. Whatever goes wrong is an outcome; the run
    folder then holds ``failure.json`` with the reason, until the next attempt.
    """
    if task.deadline is not None and time.time() >= task.deadline:
        return TIME_IS_UP
    printed = ""
    try:
        with session.marked(task.session, Path(task.out).name) as mark:
            outcome, printed = _attempt(task, mark)
    except session.SessionEnded:
        return INTERRUPTED
    except _OutOfTime:
        return TIME_IS_UP
    except (ConfigurationError, StorageError) as error:
        outcome = Outcome("failed", str(error))
    except Exception as error:
        outcome = Outcome("failed", f"{type(error).__name__}: {error}")
    if outcome.state == "failed":
        write_failure(Path(task.out), outcome.reason, printed)
    return outcome


def write_failure(folder: Path, reason: str, printed: str = "") -> None:
    """Leave a note of a failure in the run folder, with the end of what the process printed."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content = {"reason": reason, "at": now} | ({"printed": printed} if printed.strip() else {})
    # The disk may be what failed, and a machine that does not see the comparison must make no folder of its own.
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
        write_json(folder / FAILURE, content)


def _attempt(task: Task, mark: session.Mark) -> tuple[Outcome, str]:
    """The outcome, and the end of what the process printed."""
    folder = Path(task.out)
    (folder / FAILURE).unlink(missing_ok=True)
    _wait_for_lock(folder, mark)
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, task.out],  # the folder is for people who look at lists of processes
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=task.cwd if task.cwd and os.path.isdir(task.cwd) else None,
            start_new_session=True,  # Ctrl-C on the terminal is for the coordinator alone
        )
        try:
            _send(process, task)
            answer = _wait(process, mark, task.deadline)
            printed = _end_of(errors)
            return _outcome(process.returncode, answer, printed), printed
        finally:
            _stop(process)


def _wait_for_lock(folder: Path, mark: session.Mark) -> None:
    """Give the process before this one, whose worker died, time to leave the run folder; the child says who stays."""
    until = time.monotonic() + _PATIENCE
    while (folder / LOCK).exists() and time.monotonic() < until:
        with contextlib.suppress(ConfigurationError), locked(folder):
            return
        mark.look()
        time.sleep(_LOOK_EVERY)


def _send(process: "subprocess.Popen[bytes]", task: Task) -> None:
    path = [entry or os.getcwd() for entry in sys.path]
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it is dead already: its exit code and what it printed say why
        process.stdin.write((json.dumps(path) + "\n" + task.to_line()).encode())
        process.stdin.flush()


def _wait(process: "subprocess.Popen[bytes]", mark: session.Mark, deadline: float | None) -> bytes:
    while True:
        if deadline is not None and time.time() >= deadline:
            raise _OutOfTime  # in its first epoch, of which nobody knew how long it would be
        try:
            process.wait(_LOOK_EVERY)
        except subprocess.TimeoutExpired:
            mark.look()
        else:
            assert process.stdout is not None
            return process.stdout.read()


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _outcome(code: int, answer: bytes, printed: str) -> Outcome:
    if code == -signal.SIGTERM:
        return TERMINATED
    lines = answer.decode(errors="replace").splitlines()
    with contextlib.suppress(ValueError):
        if code == 0 and lines:
            return Outcome.from_line(lines[-1])
    return Outcome("failed", _crash(code, printed))


def _crash(code: int, printed: str) -> str:
    r"""Why a process ended that gave no answer.

    >>> _crash(-9, "")
    'killed by signal 9 (SIGKILL), as the system does when memory runs out'
    >>> _crash(1, "Traceback ...\nImportError: libcudart.so.12")
    'ended with code 1: ImportError: libcudart.so.12'
    """
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    last = f": {lines[-1]}" if lines else ""
    if code == -signal.SIGKILL:
        return "killed by signal 9 (SIGKILL), as the system does when memory runs out"
    if code < 0:
        names = {int(each): each.name for each in signal.Signals}
        return f"killed by signal {-code} ({names.get(-code, 'unknown')}){last}"
    return f"ended with code {code}{last}"


def _end_of(errors: IO[bytes]) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - _SHOWN))
    return errors.read().decode(errors="replace")
