"""The process that trains one cell: a line of JSON in, a line of JSON out.

A process a cell, because a crash, a kill or an exhausted memory then ends one cell and no other, and because each has
its own number of threads and its own deterministic algorithms.
"""

import os
import sys
import threading
import traceback

import torch

from chtconv.comparison.outcome import Outcome, State, Task
from chtconv.comparison.result import same_run
from chtconv.errors import ConfigurationError, telling
from chtconv.files import StorageError
from chtconv.training import Config, OutOfTime, RunFolder, TrainingDiverged, train
from chtconv.training.device import resolve


def main() -> int:
    """Read a task from standard input, train its cell, and write the outcome to standard output."""
    line = sys.stdin.readline()
    if not line:
        return 1
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else prints must not spoil the answer
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    outcome = train_cell(Task.from_line(line))
    os.write(answer, outcome.to_line().encode())
    return 0


def train_cell(task: Task) -> Outcome:
    """Train a cell from its last whole epoch, if it has one, and say what became of it."""
    told: list[str] = []
    with telling(told.append):
        state, reason = _train_cell(task)
    return Outcome(state, reason, tuple(dict.fromkeys(told)))


def _train_cell(task: Task) -> tuple[State, str]:
    try:
        if task.threads is not None:
            torch.set_num_threads(task.threads)
        config = Config.from_dict(task.config)
        if config.machine.threads is None:
            # Whoever goes on with it has to know.
            config = config.replace(threads=torch.get_num_threads())
        folder = RunFolder(task.out)
        resume = folder.holds_run()
        train(_as_begun(folder, config), folder.path, resume=resume, deadline=task.deadline)
    except OutOfTime as error:
        return "stopped", str(error)
    except (ConfigurationError, TrainingDiverged, StorageError) as error:
        return "failed", str(error)
    except Exception as error:
        traceback.print_exc()
        return "failed", _reason(error)
    return "done", ""


def _as_begun(folder: RunFolder, config: Config) -> Config:
    """The configuration that the same run was begun with, by whatever version, on the data set where it lies now.

    It ends with the bits that it would have had: threads and kernels stay what they were.

    Raises:
        ConfigurationError: it was begun on another device than the one that is asked for.
    """
    try:
        stored = folder.stored_config()
    except ConfigurationError:
        return config  # there is none, or training names what is wrong with it
    if not same_run(stored.to_dict(), config.to_dict()):
        return config
    begun, asked = stored.machine.device, config.machine.device
    if _kind(begun) != _kind(asked):
        raise ConfigurationError(
            f"device={asked!r}: {folder.path} was begun with {begun!r}; accepted is that, "
            f"and without {folder.path} the run starts anew"
        )
    return stored.replace(dataset=config.data.dataset)


def _kind(device: str) -> str:
    return resolve(device).type if device == "auto" else device


def _leave_with_the_parent() -> None:
    # The system closes the pipe of a parent that dies, however it dies; every file is whole or absent at any moment.
    while os.read(0, 1024):
        pass
    os._exit(1)


def _reason(error: Exception) -> str:
    # torch raises a plain RuntimeError where the memory of the CPU does not suffice.
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
        return "the memory does not suffice: fewer cells at a time, a smaller network or batch need less"
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
