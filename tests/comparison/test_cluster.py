"""A real scheduler and real workers, one of which is killed in the middle of its cell."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from comparison_cells import cell, epochs_kept, is_alive, trainers_of, until

from chtconv.comparison.board import Board
from chtconv.comparison.cluster import cluster_executor
from chtconv.comparison.live import View
from chtconv.comparison.outcome import Outcome
from chtconv.comparison.process import TERMINATED
from chtconv.comparison.runner import run_cells
from chtconv.errors import ConfigurationError

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="there is no /proc here to look at processes in")
CELLS = [cell(seed=seed, epochs=epochs) for seed, epochs in ((1, 6), (2, 2))]


class _Killing(View):
    """Kills the worker of the first cell when an epoch of it is kept."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Board(CELLS, folder))
        self.run = folder / CELLS[0].name
        self.kept = ""
        self.killed: list[int] = []

    def look(self, running: set[str]) -> None:
        super().look(running)
        if not self.killed and epochs_kept(self.run):
            (trainer,) = trainers_of(self.run)
            worker = int(Path(f"/proc/{trainer}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(worker, signal.SIGKILL)
            self.killed = [worker, trainer]
            until(lambda: not is_alive(trainer))
            self.kept = (self.run / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=":0", silence_logs=50
    ) as cluster:
        yield cluster.scheduler_address


def test_a_worker_that_is_killed_costs_no_epoch(address: str, tmp_path: Path) -> None:
    view = _Killing(tmp_path)
    with cluster_executor(address) as engine:
        outcomes = run_cells(CELLS, tmp_path, engine, view, threads=1)
    assert outcomes == {each.name: Outcome("done") for each in CELLS}
    assert not any(map(is_alive, view.killed))
    assert 1 <= len(view.kept.splitlines()) < 6
    # Among the values of an epoch are the seconds that it took: another attempt would have others.
    assert (view.run / "metrics.jsonl").read_text().startswith(view.kept)
    assert [epochs_kept(tmp_path / each.name) for each in CELLS] == [6, 2]
    assert {path.name for path in tmp_path.iterdir()} == {each.name for each in CELLS}


def _terminated_once(marks: str) -> Outcome:
    mark = Path(marks) / str(time.time_ns())
    mark.touch()
    return TERMINATED if len(list(Path(marks).iterdir())) == 1 else Outcome("done")


def test_a_cell_that_is_asked_to_end_goes_on_elsewhere(address: str, tmp_path: Path) -> None:
    with cluster_executor(address) as engine:
        assert engine.submit(_terminated_once, str(tmp_path)).result(60) == Outcome("done")
    assert len(list(tmp_path.iterdir())) == 2


def _tune() -> None:
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}


def _tuned() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}


def test_cells_do_not_inherit_what_a_nanny_does_to_memory(address: str) -> None:
    with distributed.Client(address) as client:
        client.run(_tune)
    with cluster_executor(address) as engine:
        assert engine.submit(_tuned).result(60) == {"MALLOC_ARENA_MAX": "2"}


def test_an_address_where_nobody_answers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chtconv.comparison.cluster._TIMEOUT", 0.5)
    for wrong in ("tcp://127.0.0.1:9", "nowhere://x", "tcp://no.such.machine.invalid:8786"):
        with (
            pytest.raises(ConfigurationError, match=f"no Dask scheduler answers at '{wrong}'"),
            cluster_executor(wrong),
        ):
            pass


def test_without_distributed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'chtconv\[cluster\]'"), cluster_executor("tcp://x:1"):
        pass
