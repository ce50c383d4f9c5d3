"""``chtconv compare`` and ``chtconv table1``: the missing runs of a grid, then its tables.

The exit code is 0 if every run of the grid is done, 1 if some failed (each is named) or were stopped by something else
than the clock, 2 if the command was refused, 3 if the time limit came first, 130 after Ctrl-C. The same command goes on
in any of these cases.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NoReturn

from chtconv.comparison.grid import DEFAULT_AXES, PLURALS, Grid, grid_from, read_toml
from chtconv.comparison.live import say
from chtconv.comparison.rendering import text
from chtconv.comparison.study import Study
from chtconv.comparison.table import tables
from chtconv.comparison.table1 import AXES as TABLE1_AXES
from chtconv.comparison.table1 import DATASETS, table1
from chtconv.errors import ConfigurationError
from chtconv.extras import need
from chtconv.training.config import SECTIONS, SETTINGS
from chtconv.training.options import add_settings, given
from chtconv.training.recipes import RECIPES, recipe
from chtconv.training.setting import whole

_SEVERAL: Final = {name: name for name in SECTIONS["topology"]} | {one: many for many, one in PLURALS.items()}
_UNITS: Final = {"s": 1, "m": 60, "h": 3600}


def add_commands(commands: Any) -> None:
    """Adds ``compare`` and ``table1`` to the commands of the command line; a value that was not given is absent."""
    again = "Runs that are done are not run again, and the others go on from their last epoch: give the same command."
    command = commands.add_parser(
        "compare",
        help="train a grid of runs and compare them",
        description=f"Train every combination of the values given, each once, and compare the results. {again} "
        "In brackets, what is taken where an option is not given.",
        allow_abbrev=False,
    )
    command.add_argument("grid", nargs="?", metavar="FILE", help="TOML file with these options; those given here win")
    command.add_argument("--recipe", metavar="NAME", help=f"where values come from: {', '.join(RECIPES)} (quick)")
    _add_engine(command, "runs/compare")
    add_settings(command, recipe("quick").to_dict() | dict(DEFAULT_AXES), several=_SEVERAL)
    command = commands.add_parser(
        "table1",
        help="reproduce Table 1 of the paper",
        description=f"Train the runs of the paper's Table 1, or others of its form, and show them beside the paper's. "
        f"{again} In brackets, the paper's values, for CIFAR-10 where the data sets differ.",
        allow_abbrev=False,
    )
    names = " ".join(DATASETS)
    command.add_argument("--datasets", nargs="+", default=list(DATASETS), metavar="NAME", help=f"({names})")
    command.add_argument("--data", metavar="DIR", help=f"folder with the folders {names} (the Hugging Face Hub)")
    _add_engine(command, "runs/table1")
    add_settings(command, recipe("paper-cifar10").to_dict() | dict(TABLE1_AXES), several=_SEVERAL, without=("dataset",))


def _add_engine(command: Any, out: str) -> None:
    group = command.add_argument_group("how it is run")
    group.add_argument("--out", metavar="DIR", default=out, help=f"folder of the run folders ({out})")
    group.add_argument("--jobs", metavar="N", default="1", help="runs at once on this machine, sharing its cores (1)")
    group.add_argument("--scheduler", metavar="ADDRESS", help="run on the workers of this Dask scheduler instead")
    group.add_argument("--time-limit", metavar="TIME", help="stop in time, as 90s, 45m, 2h or 1:30:00 (none)")
    group.add_argument(
        "--results", metavar="FILE", help="a line a run; runs that have one here are done (DIR/results.jsonl)"
    )
    group.add_argument(
        "--only",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="only what is called so in the table, where * stands for any letters (all)",
    )
    group.add_argument("--list", action="store_true", help="only list the runs and how far they are")


def seconds(text: str) -> float:
    """The length of time that ``text`` stands for.

    Raises:
        ConfigurationError: naming the text and what is accepted.

    >>> seconds("90s"), seconds("1.5h"), seconds("1:30:00"), seconds("45:00")
    (90.0, 5400.0, 5400.0, 2700.0)
    """
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text):
        return float(match[1]) * _UNITS[match[2]]
    if re.fullmatch(r"\d+(:[0-5]?\d){1,2}", text):
        return float(sum(int(part) * 60**power for power, part in enumerate(reversed(text.split(":")))))
    raise ConfigurationError(f"time-limit={text!r}: accepted are times such as 90s, 45m, 2h, 1:30:00 or 45:00.")


def compare_command(options: argparse.Namespace) -> int:
    """Runs ``chtconv compare`` or ``chtconv table1``.

    Raises:
        ConfigurationError: naming what cannot be used.
        StorageError: a file cannot be written.
    """
    began, out, jobs = time.time(), Path(options.out), _jobs(options)
    limit = None if options.time_limit is None else seconds(options.time_limit)
    _check_given(options)
    grids = {out / name if name else out: grid for name, grid in _grids(options).items()}
    studies = [Study(path, grid, options.results) for path, grid in grids.items()]
    for problem in dict.fromkeys(problem for study in studies for problem in study.problems):
        say(f"chtconv: passed over: {problem}", sys.stderr)
    if options.list:
        for study in studies:
            print("\n".join(study.listed()))
        return 0
    if any(len({cell.seed for cell in grid.cells()}) > 1 for grid in grids.values()):
        need("a comparison over several seeds", "scipy", extra="compare")
    with contextlib.ExitStack() as stack:
        for study in studies:
            stack.enter_context(study.opened())
        engine = stack.enter_context(_engine(options, jobs))
        deadline = None if limit is None else began + limit
        try:
            stack.enter_context(_interrupted_by_sigterm())
            for study in studies:
                study.run(engine, deadline=deadline, threads=_threads(options, jobs), stream=sys.stderr)
        except KeyboardInterrupt:
            say("chtconv: interrupted; whole epochs are kept, and the same command goes on", sys.stderr)
            return 130
        lines = [line for study in studies for line in study.lines()]
    if lines:
        print(text(tables(lines)))
    left = [study.ending() for study in studies]
    print("\n".join(words for words, _ in left))
    codes = {code for _, code in left}
    return 1 if 1 in codes else max(codes)  # a failure is never out of sight behind another data set's time limit


def _check_given(options: argparse.Namespace) -> None:
    """Refuse empty text, as a variable of a shell leaves it that is not set: it stands for no file and no address."""
    for name, value in vars(options).items():
        if value == "" and name not in SETTINGS:
            raise ConfigurationError(f"{name.replace('_', '-')}='': accepted is text, not empty.")


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Take SIGTERM, which batch systems send, for Ctrl-C: runs elsewhere are told to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _grids(options: argparse.Namespace) -> dict[str, Grid]:
    """The grids by the folder below --out that they lie in; the only one of ``compare`` in --out itself."""
    values = given(options)
    if options.command == "table1":
        grids = table1(options.datasets, data=options.data, **values)
    else:
        table = read_toml(Path(options.grid)) if options.grid else {}
        table |= {"recipe": options.recipe} if options.recipe else {}
        grids = {"": grid_from(table, **values)}
    return {name: grid.only(options.only) for name, grid in grids.items()} if options.only else grids


def _jobs(options: argparse.Namespace) -> int:
    setting = whole("runs at once", 1)
    jobs = setting.parse("jobs", options.jobs)
    setting.check("jobs", jobs)
    assert isinstance(jobs, int)
    if options.scheduler and jobs != 1:
        raise ConfigurationError("--jobs is for runs on this machine; with --scheduler its workers say how many.")
    return jobs


@contextlib.contextmanager
def _engine(options: argparse.Namespace, jobs: int) -> Iterator[Executor]:
    if options.scheduler:
        from chtconv.comparison.cluster import cluster_executor

        with cluster_executor(options.scheduler) as executor:
            yield executor
    else:
        with ThreadPoolExecutor(jobs) as executor:
            yield executor


def _threads(options: argparse.Namespace, jobs: int) -> int | None:
    """CPU threads of each of several runs at once: the cores of this machine shared out; None where it is not ours."""
    if options.scheduler:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)
