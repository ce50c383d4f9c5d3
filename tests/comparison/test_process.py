"""A cell in a process of its own: every way in which it can end, and that it never outlives who waits for it."""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison_cells import CHILD, TINY, epochs_kept, is_alive, until

from chtconv.comparison import process, session, worker
from chtconv.comparison.outcome import Outcome, Task
from chtconv.comparison.process import INTERRUPTED, TERMINATED, TIME_IS_UP, run_cell
from chtconv.files import locked
from chtconv.training import Config, RunFolder, train
from chtconv.training.progress import Progress

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="there is no /proc here to look at processes in")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A cell sets the threads of its process, which here is that of all tests."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the process of a cell do something else than training."""

    def use(program: str) -> None:
        monkeypatch.setattr(process, "_CHILD", f"import os, sys, time\n{program}")

    return use


def task(folder: Path, **values: Any) -> Task:
    return Task(out=str(folder / "cell"), config={}, **values)


def reason(folder: Path) -> Any:
    path = folder / "cell" / "failure.json"
    return json.loads(path.read_text())["reason"] if path.exists() else None


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("sys.exit('libcudart.so.12 is missing')", Outcome("failed", "ended with code 1: libcudart.so.12 is missing")),
        ("print('noise')", Outcome("failed", "ended with code 0")),
        ("print('noise'); print('{\"state\": \"done\"}')", Outcome("done")),
        ('print(\'{"state": "failed", "reason": "x"}\')', Outcome("failed", "x")),
        ('print(\'{"state": "done"}\', flush=True); os._exit(3)', Outcome("failed", "ended with code 3")),
        (
            "os.kill(os.getpid(), 9)",
            Outcome("failed", "killed by signal 9 (SIGKILL), as the system does when memory runs out"),
        ),
        ("os.kill(os.getpid(), 11)", Outcome("failed", "killed by signal 11 (SIGSEGV)")),
        ("os.kill(os.getpid(), 15)", TERMINATED),
        ("open('/dev/stdin').close(); os._exit(0)", Outcome("failed", "ended with code 0")),
    ],
)
def test_what_a_process_ends_in(child: Callable[[str], None], tmp_path: Path, program: str, outcome: Outcome) -> None:
    child(program)
    assert run_cell(task(tmp_path)) == outcome
    assert reason(tmp_path) == (outcome.reason if outcome.state == "failed" else None)


def test_a_failure_is_forgotten_when_the_next_attempt_begins(child: Callable[[str], None], tmp_path: Path) -> None:
    child("sys.exit('first\\nlast')")
    run_cell(task(tmp_path))
    assert json.loads((tmp_path / "cell/failure.json").read_text())["printed"] == "first\nlast\n"
    child('print(\'{"state": "done"}\')')
    assert run_cell(task(tmp_path)).state == "done"
    assert not (tmp_path / "cell/failure.json").exists()


def test_a_first_epoch_that_lasts_beyond_the_deadline_is_stopped(child: Callable[[str], None], tmp_path: Path) -> None:
    child(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    began = time.time()
    assert run_cell(task(tmp_path, deadline=began + 3)) == TIME_IS_UP
    assert 3 <= time.time() - began < 60
    assert not is_alive(int((tmp_path / "pid").read_text()))
    assert reason(tmp_path) is None


def test_after_its_deadline_nothing_starts(child: Callable[[str], None], tmp_path: Path) -> None:
    child(f"open({str(tmp_path / 'started')!r}, 'w')")
    assert run_cell(task(tmp_path, deadline=time.time() - 1)) == TIME_IS_UP
    assert list(tmp_path.iterdir()) == []


def test_outside_of_a_session_nothing_starts(child: Callable[[str], None], tmp_path: Path) -> None:
    child(f"open({str(tmp_path / 'started')!r}, 'w')")
    assert run_cell(task(tmp_path, session=str(tmp_path / ".session-1"))) == INTERRUPTED
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_does_not_see_the_comparison_is_named_and_makes_no_folder(tmp_path: Path) -> None:
    elsewhere = tmp_path / "not" / "mounted"
    outcome = run_cell(task(elsewhere, session=str(elsewhere / ".session-1")))
    assert outcome.state == "failed"
    assert f"{os.uname().nodename} does not see {elsewhere}: it must be on storage" in outcome.reason
    assert list(tmp_path.iterdir()) == []


def test_a_child_ends_with_its_session(child: Callable[[str], None], tmp_path: Path) -> None:
    child(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    outcomes = []
    with session.opened(tmp_path) as here:
        thread = threading.Thread(target=lambda: outcomes.append(run_cell(task(tmp_path, session=str(here.path)))))
        thread.start()
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        assert here.running() == {"cell"}
        ended = time.monotonic()
    # Leaving the session waits for its cells.
    assert time.monotonic() - ended < 5
    thread.join()
    assert outcomes == [INTERRUPTED]
    assert not is_alive(int((tmp_path / "pid").read_text()))
    assert [each.name for each in tmp_path.iterdir()] == ["pid"]


def test_a_new_session_ends_those_that_a_killed_coordinator_left(tmp_path: Path) -> None:
    with session.opened(tmp_path) as old, session.opened(tmp_path) as new:
        assert not session.is_open(str(old.path))
        assert session.is_open(str(new.path))


def test_the_mark_of_a_worker_that_was_killed_counts_for_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with session.opened(tmp_path) as here, session.marked(str(here.path), "cell") as mark:
        (here.path / "killed").touch()
        for now in range(0, 300, 2):
            mark.look()
            assert here.running() == ({"cell", "killed"} if now < 60 else {"cell"})
        (here.path / "killed").unlink()


def test_a_child_ends_when_waiting_for_it_is_given_up(
    child: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")

    def interrupted(_: object) -> bool:
        if not (tmp_path / "pid").exists():
            return True
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "is_open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_cell(task(tmp_path))
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_child_that_does_not_want_to_end_is_killed(
    child: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_GRACE", 0.2)
    child(
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    monkeypatch.setattr(session, "is_open", lambda _: not (tmp_path / "pid").exists())
    assert run_cell(task(tmp_path)) == INTERRUPTED
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_run_folder_in_use_is_waited_for(child: Callable[[str], None], tmp_path: Path) -> None:
    child('print(\'{"state": "done"}\')')
    (tmp_path / "cell").mkdir()
    held = threading.Event()

    def hold() -> None:
        with locked(tmp_path / "cell"):
            held.set()
            time.sleep(1.2)

    thread = threading.Thread(target=hold)
    began = time.monotonic()
    thread.start()
    held.wait()
    assert run_cell(task(tmp_path)).state == "done"
    assert time.monotonic() - began > 1.2
    thread.join()


def test_a_lock_file_that_nobody_holds_stops_nobody(child: Callable[[str], None], tmp_path: Path) -> None:
    child('print(\'{"state": "done"}\')')
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell" / ".lock").write_text("1")
    began = time.monotonic()
    assert run_cell(task(tmp_path)).state == "done"
    assert time.monotonic() - began < 5


def test_a_child_finds_modules_and_relative_paths_as_the_coordinator_does(
    child: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chtconv_test_child.py").write_text('import os\ndef answer(): print(\'{"state": "done"}\')\n')
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    child(CHILD + "assert os.getcwd().endswith('data'), os.getcwd(); answer()")
    assert run_cell(task(tmp_path, cwd=str(tmp_path / "data"))) == Outcome("done")


def test_a_child_takes_no_module_from_the_folder_that_it_runs_in(
    child: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "chtconv_test_child.py").write_text('def answer(): print(\'{"state": "done"}\')\n')
    (tmp_path / "json.py").write_text("raise SystemExit('json of the user')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *sys.path])
    child(CHILD + "answer()")
    assert run_cell(task(tmp_path, cwd=str(tmp_path))) == Outcome("done")


def test_a_deadline_stops_before_the_first_epoch_that_would_pass_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = tmp_path / "cell", TINY.replace(epochs=3).to_dict()
    monkeypatch.setattr(time, "time", lambda: 1000.0 * epochs_kept(run))
    stopped = worker.train_cell(Task(str(run), config, deadline=500.0, threads=1))
    assert stopped == Outcome("stopped", f"no time for epoch 2 of 3; epoch 1 is kept in {run}/")
    assert epochs_kept(run) == 1


def test_a_run_that_was_killed_in_its_first_epoch_starts_anew(tmp_path: Path) -> None:
    config = TINY.replace(epochs=1).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert worker.train_cell(Task(str(tmp_path), config, threads=1)) == Outcome("done")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "the memory does not suffice"),
        (torch.OutOfMemoryError("CUDA out of memory"), "the memory does not suffice"),
        (MemoryError(), "the memory does not suffice"),
        (KeyError("loss"), "KeyError: 'loss'"),
    ],
)
def test_a_failure_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, message: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(worker, "train", fail)
    outcome = worker.train_cell(Task(str(tmp_path / "cell"), TINY.to_dict()))
    assert outcome.state == "failed"
    assert outcome.reason.startswith(message)


def test_another_configuration_than_the_one_in_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    outcome = worker.train_cell(Task(str(tmp_path), TINY.replace(lr=0.3).to_dict()))
    assert outcome.state == "failed"
    assert "another configuration: lr 0.3 instead of 0.05" in outcome.reason


def test_a_cell_that_an_older_version_began_goes_on_under_the_name_it_had(tmp_path: Path) -> None:
    """Then it spelled out what is so without being named; where its data set lies may change all the same."""
    mine = Config().replace(method="set", dataset="digits", threads=1)
    theirs = mine.replace(zeta_schedule="cosine", dataset="elsewhere/digits", threads=1)
    assert worker._as_begun(RunFolder(tmp_path), mine) == mine
    (tmp_path / "config.json").write_text(json.dumps(theirs.to_dict()))
    assert worker._as_begun(RunFolder(tmp_path), mine) == mine.replace(zeta_schedule="cosine")
    assert worker._as_begun(RunFolder(tmp_path), mine.replace(threads=2)).machine.threads == 1
    other = mine.replace(zeta=0.5)
    assert worker._as_begun(RunFolder(tmp_path), other) == other


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """The embedded images in a folder of their name."""
    with resources.as_file(resources.files("chtconv.data") / "digits") as folder:
        return Path(shutil.copytree(folder, tmp_path / "elsewhere" / "digits"))


class _StopAfterAnEpoch(Progress):
    def epoch(self, *_: Any) -> None:
        raise KeyboardInterrupt


def begun(folder: Path, config: Config) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(config, folder, progress=_StopAfterAnEpoch())


def test_a_begun_run_ends_with_its_bits_though_its_data_moved_and_other_kernels_are_asked_for(
    tmp_path: Path, digits: Path
) -> None:
    config = TINY.replace(method="set", threads=1)
    train(config, tmp_path / "whole")
    begun(tmp_path / "cell", config)
    asked = {"dataset": str(digits), "threads": 2, "backend": "auto", "optimizer_kernel": "fused"}
    assert worker.train_cell(Task(str(tmp_path / "cell"), config.replace(**asked).to_dict())) == Outcome("done")
    for name in ("model.safetensors", "masks.safetensors"):
        assert (tmp_path / "cell" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    stored = RunFolder(tmp_path / "cell").stored_config()
    assert stored == config.replace(dataset=str(digits))


def test_a_begun_run_goes_on_on_its_kind_of_device_alone(tmp_path: Path) -> None:
    config = TINY.replace(method="set", threads=1)
    begun(tmp_path / "cell", config)
    outcome = worker.train_cell(Task(str(tmp_path / "cell"), config.replace(device="cuda").to_dict()))
    assert outcome.state == "failed"
    assert f"device='cuda': {tmp_path / 'cell'} was begun with 'cpu'; accepted is that" in outcome.reason
    assert epochs_kept(tmp_path / "cell") == 1


def test_a_begun_run_does_not_go_on_on_other_images_of_the_same_name(tmp_path: Path, digits: Path) -> None:
    config = TINY.replace(method="set", threads=1)
    begun(tmp_path / "cell", config)
    shutil.copy(digits / "test.parquet", digits / "train.parquet")
    outcome = worker.train_cell(Task(str(tmp_path / "cell"), config.replace(dataset=str(digits)).to_dict()))
    assert outcome.state == "failed"
    assert "does not fit the run: it was computed on other images" in outcome.reason
    assert epochs_kept(tmp_path / "cell") == 1


def test_a_run_keeps_the_threads_that_it_was_begun_with_where_none_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another number of them would give sums other bits."""
    config = TINY.replace(epochs=2, threads=None).to_dict()
    ends = []
    for name, later in (("straight", 1), ("elsewhere", 2)):
        run = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda run=run: 1000.0 * epochs_kept(run))
            assert worker.train_cell(Task(str(run), config, deadline=500.0, threads=1)).state == "stopped"
        assert worker.train_cell(Task(str(run), config, threads=later)).state == "done"
        assert json.loads((run / "config.json").read_text())["threads"] == 1
        ends.append((run / "model.safetensors").read_bytes())
    assert ends[0] == ends[1]


def test_what_a_run_warns_of_is_told(tmp_path: Path) -> None:
    config = TINY.replace(epochs=1, method="chts", layers="classifier.*").to_dict()
    outcome = run_cell(Task(str(tmp_path / "cell"), config))
    assert outcome.state == "done"
    (warning,) = outcome.warnings
    assert "no path of length 3" in warning
    assert Outcome.from_line(outcome.to_line()) == outcome
