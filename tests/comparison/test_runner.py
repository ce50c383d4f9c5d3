"""A session: each cell becomes what it becomes, no other suffers, and nothing that was trained is trained again."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from comparison_cells import cell, epochs_kept, is_alive, trainers_of, until

from chtconv.comparison import process, runner
from chtconv.comparison.board import Board
from chtconv.comparison.cell import Cell
from chtconv.comparison.live import View
from chtconv.comparison.outcome import Outcome
from chtconv.comparison.process import TIME_IS_UP
from chtconv.comparison.runner import GIVEN_BACK, run_cells
from chtconv.training import train

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="there is no /proc here to look at processes in")

DIVERGES, CELL = cell(seed=1, lr=1e30), cell(seed=2, epochs=6)


class _Noted(View):
    def __init__(self, cells: list[Cell], folder: Path) -> None:
        super().__init__(Board(cells, folder))
        self.lines: list[tuple[str, str]] = []

    def started(self, cell: Cell, entry: Any) -> None:
        self.lines.append((cell.name, f"started after {entry.done}"))

    def finished(self, cell: Cell, entry: Any) -> None:
        self.lines.append((cell.name, entry.state))


def session(cells: list[Cell], folder: Path, **options: Any) -> tuple[dict[str, Outcome], _Noted]:
    view = _Noted(cells, folder)
    with ThreadPoolExecutor(1) as engine:
        return run_cells(cells, folder, engine, view, threads=1, **options), view


class Story(NamedTuple):
    """What a cell went through in three sessions; ``kept`` are its metrics after each."""

    folder: Path
    trainer: int
    second: tuple[dict[str, Outcome], _Noted]
    failures: dict[str, str]
    third: tuple[dict[str, Outcome], _Noted]
    kept: list[str]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The coordinator is killed, then the cell itself; at last nothing happens to it."""
    folder = tmp_path_factory.mktemp("comparison")
    run = folder / CELL.name
    program = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
        "from pathlib import Path; from concurrent.futures import ThreadPoolExecutor\n"
        "from comparison_cells import cell\n"
        "from chtconv.comparison.board import Board; from chtconv.comparison.live import View\n"
        "from chtconv.comparison.runner import run_cells\n"
        "cells, folder = [cell(seed=2, epochs=6)], Path(sys.argv[2])\n"
        "run_cells(cells, folder, ThreadPoolExecutor(1), View(Board(cells, folder)), threads=1)"
    )
    coordinator = subprocess.Popen([sys.executable, "-c", program, json.dumps(sys.path), str(folder)])
    try:
        until(lambda: epochs_kept(run), seconds=120)
        (trainer,) = trainers_of(run)
    finally:
        coordinator.kill()
        coordinator.wait()
    until(lambda: not is_alive(trainer))
    kept = [(run / "metrics.jsonl").read_text()]

    killer = threading.Thread(target=kill_after_an_epoch, args=[run, epochs_kept(run)])
    killer.start()
    second = session([DIVERGES, CELL], folder)
    killer.join()
    failures = {path.parent.name: json.loads(path.read_text())["reason"] for path in folder.glob("*/failure.json")}
    kept.append((run / "metrics.jsonl").read_text())

    third = session([CELL], folder)
    kept.append((run / "metrics.jsonl").read_text())
    return Story(folder, trainer, second, failures, third, kept)


def kill_after_an_epoch(run: Path, known: int) -> None:
    until(lambda: epochs_kept(run) > known, seconds=120)
    for pid in trainers_of(run):
        os.kill(pid, signal.SIGKILL)


def test_a_cell_dies_with_a_coordinator_that_is_killed_and_leaves_its_epochs(story: Story) -> None:
    assert not is_alive(story.trainer)
    assert 1 <= len(story.kept[0].splitlines()) < 6
    assert list(story.folder.glob(".session-*")) == []


def test_cells_that_fail_are_named_and_the_others_go_on(story: Story) -> None:
    outcomes, view = story.second
    assert view.lines[0] == (DIVERGES.name, "started after 0")
    assert view.lines[-1] == (CELL.name, "failed")
    assert (CELL.name, f"started after {len(story.kept[0].splitlines())}") in view.lines
    assert {outcome.state for outcome in outcomes.values()} == {"failed"}
    assert story.failures == {name: outcome.reason for name, outcome in outcomes.items()}
    assert story.failures[DIVERGES.name].startswith("the loss is not finite in epoch 1, step 2 of 6; no epoch")
    assert story.failures[CELL.name].startswith("killed by signal 9 (SIGKILL)")


def test_a_cell_that_was_killed_goes_on_after_its_last_epoch(story: Story) -> None:
    outcomes, view = story.third
    assert outcomes == {CELL.name: Outcome("done")}
    assert view.lines == [(CELL.name, f"started after {len(story.kept[1].splitlines())}"), (CELL.name, "done")]
    assert not (story.folder / CELL.name / "failure.json").exists()


def test_no_epoch_is_trained_twice(story: Story) -> None:
    """Among the values of an epoch are the seconds that it took: another attempt would have others."""
    assert len(story.kept[2].splitlines()) == 6
    for earlier, later in itertools.pairwise(story.kept):
        assert 1 <= len(earlier.splitlines()) < len(later.splitlines())
        assert later.startswith(earlier)


def test_a_cell_that_was_killed_twice_ends_with_the_bits_of_one_that_was_not(story: Story, tmp_path: Path) -> None:
    train(CELL.config.replace(threads=1), tmp_path / "whole")
    for name in ("model.safetensors", "masks.safetensors", "evolution.jsonl"):
        assert (story.folder / CELL.name / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.fixture
def asleep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Children that sleep, after leaving a file with their id here."""
    folder = tmp_path / "children"
    folder.mkdir()
    program = f"import os, time; open(os.path.join({str(folder)!r}, str(os.getpid())), 'w'); time.sleep(60)"
    monkeypatch.setattr(process, "_CHILD", program)
    return folder


def test_ctrl_c_stops_what_runs_and_what_waits(asleep: Path, tmp_path: Path) -> None:
    class Interrupting(View):
        def refresh(self) -> None:
            if len(list(asleep.iterdir())) == 2:
                raise KeyboardInterrupt

    cells = [cell(seed=seed) for seed in range(5)]
    folder = tmp_path / "comparison"
    folder.mkdir()
    with ThreadPoolExecutor(2) as engine, pytest.raises(KeyboardInterrupt):
        run_cells(cells, folder, engine, Interrupting(Board(cells, folder)))
    assert not any(trainers_of(folder / each.name) for each in cells)
    assert len(list(asleep.iterdir())) == 2
    assert list(folder.iterdir()) == []


def test_after_the_deadline_cells_come_back(asleep: Path, tmp_path: Path) -> None:
    cells = [cell(seed=seed) for seed in range(3)]
    outcomes, _ = session(cells, tmp_path, deadline=time.time() - 1)
    assert outcomes == dict.fromkeys((each.name for each in cells), TIME_IS_UP)


class _Engine(Executor):
    """What it does with a cell is up to the test."""

    def __init__(self, act: Callable[["Future[Outcome]"], None]) -> None:
        self._act = act
        self.submitted = 0

    def submit(self, *_: Any, **__: Any) -> "Future[Any]":
        self.submitted += 1
        future: Future[Any] = Future()
        self._act(future)
        return future


def test_an_engine_without_workers_gives_back_what_has_no_time_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runner, "_GRACE", 0.0)
    monkeypatch.setattr(Future, "cancel", _cancelled_at_once)
    engine = _Engine(lambda _: None)
    outcomes = run_cells([CELL], tmp_path, engine, View(Board([CELL], tmp_path)), deadline=time.time() + 0.5)
    assert outcomes == {CELL.name: TIME_IS_UP}


_cancel = Future.cancel


def _cancelled_at_once(future: "Future[Any]") -> bool:
    return _cancel(future) and not future.set_running_or_notify_cancel()


def test_a_lost_scheduler_gives_cells_back(tmp_path: Path) -> None:
    engine = _Engine(lambda future: _cancelled_at_once(future) and None)
    assert run_cells([CELL], tmp_path, engine, View(Board([CELL], tmp_path))) == {CELL.name: GIVEN_BACK}


def test_an_engine_that_gives_up_is_asked_again_and_not_for_ever(tmp_path: Path) -> None:
    engine = _Engine(lambda future: future.set_exception(RuntimeError("all  workers\ndied")))
    outcomes = run_cells([CELL], tmp_path, engine, View(Board([CELL], tmp_path)))
    assert outcomes == {CELL.name: Outcome("failed", "RuntimeError: all workers died")}
    assert engine.submitted == 4


def test_an_engine_that_gives_up_is_asked_again_as_long_as_the_cell_gains_epochs(tmp_path: Path) -> None:
    run, count = tmp_path / CELL.name, itertools.count(1)
    run.mkdir()

    def give_up(future: "Future[Outcome]") -> None:
        attempt = next(count)
        if attempt == 12:
            future.set_result(Outcome("done"))
        else:
            (run / "metrics.jsonl").write_text("{}\n" * (attempt // 2))
            future.set_exception(RuntimeError("all workers died"))

    outcomes = run_cells([CELL], tmp_path, _Engine(give_up), View(Board([CELL], tmp_path)))
    assert outcomes == {CELL.name: Outcome("done")}
