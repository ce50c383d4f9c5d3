"""What is damaged, older, shared or cut short is named, and takes nothing else with it."""

import contextlib
import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import pytest
from comparison_cells import until

from chtconv.comparison import study as study_module
from chtconv.comparison.cell import Cell
from chtconv.comparison.folder import ComparisonFolder
from chtconv.comparison.grid import grid_from
from chtconv.comparison.outcome import Outcome
from chtconv.comparison.process import TERMINATED, TIME_IS_UP, write_failure
from chtconv.comparison.result import read_lines
from chtconv.comparison.results_file import _alone, add_lines, check_writable, usable_lines
from chtconv.comparison.runner import GIVEN_BACK, View
from chtconv.comparison.study import Study
from chtconv.files import StorageError

GRID = grid_from({"methods": ["set"], "seeds": [0, 1, 2], "epochs": 1})
NAMES = [cell.name for cell in GRID.cells()]

Run = Callable[..., tuple[int, str, str]]


def summary(seed: int, accuracy: float = 0.5) -> dict[str, Any]:
    config = GRID.cells()[0].config.replace(seed=seed).to_dict()
    return {"test_accuracy": accuracy, "seed": seed, "dataset": {"name": "digits"}, "config": config}


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """A comparison whose runs are all done, as far as their files tell."""
    path = tmp_path / "runs"
    with ComparisonFolder(path).opened(GRID) as cells:
        for cell in cells:
            (path / cell.name).mkdir()
            (path / cell.name / "config.json").write_text(json.dumps(cell.config.to_dict()))
            (path / cell.name / "summary.json").write_text(json.dumps(summary(cell.seed)))
    return path


def compare(chtconv: Run, path: Path, *words: str) -> tuple[int, str, str]:
    return chtconv("compare", "--methods", "set", "--seeds", "0", "1", "2", "--epochs", "1", *words, "--out", str(path))


# A summary that is a table, and of no use.
ODD = [{"flops": "y"}, {"itop": "y"}, {"seconds": "y"}, {"test_accuracy": None}, {"config": {}}, {"config": {"foo": 1}}]


@pytest.mark.parametrize("content", ["{", "{}", "[]", *(json.dumps(summary(1) | odd) for odd in ODD)])
def test_a_damaged_summary_is_named_and_takes_no_other_run_with_it(chtconv: Run, done: Path, content: str) -> None:
    (done / NAMES[1] / "summary.json").write_text(content)
    code, out, _ = compare(chtconv, done)
    assert code == 1
    assert "seeds 0, 2" in out
    assert "50.00 ± 0.00" in out
    assert "2 of 3 runs are done" in out
    assert f"SET 90% seed 1 failed: {'cannot read ' if content == '{' else ''}{done / NAMES[1] / 'summary.json'}" in out
    assert f"without {done / NAMES[1]} it is trained anew" in out
    assert [line["seed"] for line in read_lines(done / "results.jsonl")] == [0, 2]


def test_a_run_that_was_damaged_is_done_once_its_folder_was_deleted(
    chtconv: Run, monkeypatch: pytest.MonkeyPatch, done: Path
) -> None:
    """Nothing of it stays in the results."""
    trained = []
    monkeypatch.setattr(study_module, "run_cells", lambda cells, *_, **__: trained.extend(cells) or {})
    (done / NAMES[1] / "summary.json").write_text(json.dumps(summary(1) | {"test_accuracy": None}))
    assert compare(chtconv, done)[0] == 1
    assert trained == []
    shutil.rmtree(done / NAMES[1])
    compare(chtconv, done)
    assert [cell.seed for cell in trained] == [1]


def test_a_summary_of_another_configuration_is_named(chtconv: Run, done: Path) -> None:
    (done / NAMES[1] / "config.json").unlink()
    (done / NAMES[1] / "summary.json").write_text(json.dumps(summary(7)))
    code, out, _ = compare(chtconv, done)
    assert code == 1
    assert f"SET 90% seed 1 failed: {done / NAMES[1] / 'summary.json'} is of another configuration" in out


def test_a_damaged_configuration_of_one_run_takes_no_other_with_it(chtconv: Run, done: Path) -> None:
    """Its results are there all the same; one that still has to be trained to its end says what is wrong."""
    for name in NAMES[:2]:
        (done / name / "config.json").write_text("{")
    (done / NAMES[0] / "summary.json").unlink()
    code, out, _ = compare(chtconv, done)
    assert code == 1
    assert "seeds 1, 2" in out
    assert f"SET 90% seed 0 failed: cannot read {done / NAMES[0] / 'config.json'}: " in out
    assert f"without {done / NAMES[0]} the run starts anew" in out
    assert "2 of 3 runs are done" in out


@pytest.mark.parametrize("content", [b"null\n", b"5\n", b"\xff\xfe\n", b"{}\n", b"[1]\n"])
def test_damaged_metrics_end_no_session(chtconv: Run, done: Path, content: bytes) -> None:
    (done / NAMES[1] / "metrics.jsonl").write_bytes(content)
    (done / NAMES[0] / "summary.json").unlink()
    code, out, _ = compare(chtconv, done, "--time-limit", "0s")
    assert code == (3 if content == b"{}\n" else 1)
    assert "1 stopped in time" in out
    code, out, _ = compare(chtconv, done, "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "waiting",
        "done" if content == b"{}\n" else "failed",
        "done",
    ]


def test_of_two_lines_of_a_run_the_later_one_is_shown(chtconv: Run, done: Path, tmp_path: Path) -> None:
    lines = [summary(seed) | {"variant": "SET"} for seed in (0, 1, 2)] + [summary(2, accuracy=0.8)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = compare(chtconv, done, "--results", str(tmp_path / "all.jsonl"))
    assert code == 0
    assert "60.00 ± 10.00" in out


def test_a_value_that_an_older_folder_lacks_is_the_usual_one(done: Path) -> None:
    stored = json.loads((done / "comparison.json").read_text())
    del stored["shared"]["decay_end"]
    (done / "comparison.json").write_text(json.dumps(stored))
    ComparisonFolder(done).check(GRID)


def test_results_in_a_folder_that_does_not_exist_are_refused_at_once(chtconv: Run, tmp_path: Path) -> None:
    code, _, error = compare(chtconv, tmp_path / "runs", "--results", "nowhere/all.jsonl")
    assert code == 2
    assert "results='nowhere/all.jsonl': accepted is a file in a folder that exists" in error
    assert not (tmp_path / "runs").exists()


def test_results_that_cannot_be_written_to_are_named_before_anything_is_trained(
    chtconv: Run, monkeypatch: pytest.MonkeyPatch, done: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(Study, "run", lambda *_, **__: pytest.fail("it trained"))
    (tmp_path / ".all.jsonl.lock").mkdir()
    code, _, error = compare(chtconv, done, "--results", str(tmp_path / "all.jsonl"))
    assert code == 2
    assert f"cannot write to the folder {tmp_path}: Is a directory" in error


# ------------------------------------------------------------------------------------------- what is there already

BAD_LINES = ["{", "[]", '{"config": {"foo": 1}}', json.dumps(summary(1) | {"test_accuracy": None})]


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_damaged_line_of_results_is_named_and_kept_and_takes_no_other_with_it(
    chtconv: Run, done: Path, tmp_path: Path, bad: str
) -> None:
    results = tmp_path / "all.jsonl"
    good = json.dumps(summary(0, accuracy=0.9) | {"variant": "SET"})
    results.write_text(f"{good}\n{bad}")
    code, out, error = compare(chtconv, done, "--results", str(results))
    assert code == 0
    assert "63.33" in out
    assert f"passed over: {results}, line 2" in error
    first, second, *others = results.read_text().splitlines()
    assert (first, second) == (good, bad)
    assert [json.loads(line)["seed"] for line in others] == [1, 2]


def test_what_others_wrote_into_the_results_stays_as_it_is(chtconv: Run, done: Path, tmp_path: Path) -> None:
    """One line is no text, and others end and break as they do elsewhere."""
    results = tmp_path / "all.jsonl"
    good = json.dumps(summary(0, accuracy=0.9) | {"variant": "SET", "note": "a\u2028b"}, ensure_ascii=False).encode()
    before = good + b"\r\n\xff\xfe{\r\n\r\n"
    results.write_bytes(before)
    code, out, error = compare(chtconv, done, "--results", str(results))
    assert code == 0
    assert "63.33" in out
    assert f"passed over: cannot read {results}, line 2: " in error
    assert error.count("passed over") == 1
    after = results.read_bytes()
    assert after.startswith(before)
    assert [json.loads(line)["seed"] for line in after.removeprefix(before).splitlines()] == [1, 2]


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_folder_is_taken_up_again_without_its_table_of_contents(
    chtconv: Run, done: Path, content: str | None
) -> None:
    table = done / "comparison.json"
    whole = json.loads(table.read_text())
    table.unlink()
    if content is not None:
        table.write_text(content)
        code, _, error = compare(chtconv, done)
        assert code == 2
        assert f"{table} is damaged or describes no comparison: " in error
        assert "without it, it is written anew" in error
        table.unlink()
    (done / ".comparison.json.0123abcd.partial").write_text("{")
    assert compare(chtconv, done, "--only", "nothing")[0] == 2
    (done / "another").mkdir()
    assert "another, which is no run of this one" in compare(chtconv, done, "--only", "SET")[2]
    (done / "another").rmdir()
    assert compare(chtconv, done)[0] == 0
    assert json.loads(table.read_text()) == whole
    assert not list(done.glob(".*"))


def test_without_its_table_of_contents_a_folder_holds_runs_of_this_grid_only(chtconv: Run, done: Path) -> None:
    (done / "comparison.json").unlink()
    code, _, error = compare(chtconv, done, "--width", "0.5")
    assert code == 2
    assert "holds a run of another grid, with width 0.25" in error
    (done / ".git").mkdir()
    assert "holds no comparison, and .git, which is no run of this one" in compare(chtconv, done)[2]
    (done / ".git").rmdir()
    (done / "set-0.5-seed9").mkdir()
    code, _, error = compare(chtconv, done)
    assert code == 2
    assert "holds no comparison, and set-0.5-seed9, which is no run of this one" in error


def test_results_may_lie_in_the_folder_itself(chtconv: Run, done: Path) -> None:
    (done / "comparison.json").unlink()
    results = done / "all.jsonl"
    results.touch()
    assert "all.jsonl, which is no run of this one" in compare(chtconv, done)[2]
    assert compare(chtconv, done, "--results", str(results))[0] == 0
    assert len(read_lines(results)) == 3


def test_a_folder_that_cannot_be_written_to_is_named(chtconv: Run, done: Path) -> None:
    (done / ".lock").mkdir()
    code, _, error = compare(chtconv, done)
    assert code == 2
    assert f"cannot write to the folder {done}: Is a directory" in error


def test_a_folder_that_keeps_nothing_is_for_any_grid(chtconv: Run, tmp_path: Path) -> None:
    path = tmp_path / "runs"
    other = grid_from({"methods": ["set", "rigl"], "seeds": [0], "epochs": 1, "lr": 1e30})
    with ComparisonFolder(path).opened(other) as cells:
        for cell in cells:
            write_failure(path / cell.name, "the loss is not finite")
    assert compare(chtconv, path, "--time-limit", "0s")[0] == 3
    stored = json.loads((path / "comparison.json").read_text())
    assert stored["shared"]["lr"] == 0.05
    assert list(stored["cells"]) == NAMES
    (path / NAMES[0]).mkdir(exist_ok=True)
    (path / NAMES[0] / "config.json").write_text(json.dumps(GRID.cells()[0].config.to_dict()))
    code, _, error = compare(chtconv, path, "--lr", "0.1")
    assert code == 2
    assert "holds runs of another grid, with lr 0.05, not 0.1" in error


# -------------------------------------------------------------------------------------------------- shared files


def test_what_others_add_to_the_results_meanwhile_stays(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "all.jsonl"

    study = Study(done, GRID, results)

    def read_and_wait(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
        found = usable_lines(path)
        add_lines(path, [summary(7)])
        return found

    monkeypatch.setattr(study_module, "usable_lines", read_and_wait)
    study.lines()
    assert sorted(line["config"]["seed"] for line in read_lines(results)) == [0, 1, 2, 7]
    assert {path.name for path in tmp_path.iterdir()} == {"all.jsonl", "runs"}


def test_two_that_add_lines_wait_for_each_other(tmp_path: Path) -> None:
    results = tmp_path / "all.jsonl"
    with _alone(results):
        thread = threading.Thread(target=add_lines, args=[results, [summary(0)]])
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        results.write_text(json.dumps(summary(1)) + "\n")
    thread.join()
    assert [line["seed"] for line in read_lines(results)] == [1, 0]


def test_many_that_add_lines_lose_none(tmp_path: Path) -> None:
    results, seeds = tmp_path / "all.jsonl", range(24)
    lines = [summary(seed) for seed in seeds]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda line: add_lines(results, [line]), lines))
    assert {line["config"]["seed"] for line in read_lines(results)} == set(seeds)
    until(lambda: [path.name for path in tmp_path.iterdir()] == ["all.jsonl"], seconds=1)


def test_results_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write to the folder .*nowhere: No such file or directory"):
        add_lines(tmp_path / "nowhere" / "all.jsonl", [summary(0)])


def test_results_that_may_not_be_written_are_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "all.jsonl"
    results.touch()
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(StorageError, match=r"cannot write .*all\.jsonl: Permission denied"):
        check_writable(results)


def test_results_behind_links_are_one_file_whose_permissions_stay(tmp_path: Path) -> None:
    real = tmp_path / "real.jsonl"
    real.touch()
    real.chmod(0o640)
    links = [tmp_path / "one.jsonl", tmp_path / "other.jsonl"]
    for link in links:
        link.symlink_to(real)
    (tmp_path / ".real.jsonl.0123abcd.partial").touch()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: add_lines(links[seed % 2], [summary(seed)]), range(16)))
    assert sorted(line["seed"] for line in read_lines(real)) == list(range(16))
    assert [link.readlink() for link in links] == [real, real]
    assert real.stat().st_mode & 0o777 == 0o640
    until(lambda: {path.name for path in tmp_path.iterdir()} == {"real.jsonl", "one.jsonl", "other.jsonl"}, seconds=1)


# ------------------------------------------------------------------------------------- lines as soon as runs are done


def session_of(
    monkeypatch: pytest.MonkeyPatch,
    path: Path,
    results: Path,
    session: Callable[[Callable[[int], list[int]]], None],
    stream: TextIO | None = None,
) -> Study:
    """A session on runs that are not done yet: it is given what ends the run of a seed, and says what has a line."""
    study = Study(path, GRID, results)
    summaries = {cell.name: path / cell.name / "summary.json" for cell in GRID.cells()}

    def run_cells(cells: list[Cell], folder: Path, engine: Any, view: View, **_: Any) -> dict[str, Outcome]:
        def end(seed: int) -> list[int]:
            summaries[cells[seed].name].write_text(json.dumps(summary(seed)))
            view.ended(cells[seed], Outcome("done"))
            return [line["seed"] for line in read_lines(results)] if results.is_file() else []

        session(end)
        return {cell.name: Outcome("done") for cell in cells}

    for each in summaries.values():
        each.unlink()
    monkeypatch.setattr(study_module, "run_cells", run_cells)
    with study.opened(), (path / "printed").open("w") as printed, ThreadPoolExecutor(1) as engine:
        study.run(engine, deadline=None, threads=1, stream=stream or printed)
    return study


def test_a_run_has_its_line_while_others_still_run(monkeypatch: pytest.MonkeyPatch, done: Path, tmp_path: Path) -> None:
    def session(end: Callable[[int], list[int]]) -> None:
        assert [end(1), end(0), end(2)] == [[1], [1, 0], [1, 0, 2]]

    session_of(monkeypatch, done, tmp_path / "all.jsonl", session)


def test_results_that_cannot_be_written_meanwhile_stop_no_run(
    monkeypatch: pytest.MonkeyPatch, done: Path, tmp_path: Path
) -> None:
    results = tmp_path / "all.jsonl"

    def session(end: Callable[[int], list[int]]) -> None:
        results.mkdir()
        assert end(0) == end(1) == []
        results.rmdir()
        assert end(2) == [2]

    session_of(monkeypatch, done, results, session)
    assert sorted(line["seed"] for line in read_lines(results)) == [0, 1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_log_that_cannot_be_written_ends_no_session(
    monkeypatch: pytest.MonkeyPatch, done: Path, tmp_path: Path
) -> None:
    def session(end: Callable[[int], list[int]]) -> None:
        assert [end(0), end(1), end(2)] == [[0], [0, 1], [0, 1, 2]]

    with Path("/dev/full").open("w") as stream:
        study = session_of(monkeypatch, done, tmp_path / "all.jsonl", session, stream)
        with contextlib.suppress(OSError):
            stream.close()
    assert study.ending()[1] == 0


def test_results_that_cannot_be_written_to_the_end_are_named(
    monkeypatch: pytest.MonkeyPatch, done: Path, tmp_path: Path
) -> None:
    results = tmp_path / "all.jsonl"

    def session(end: Callable[[int], list[int]]) -> None:
        results.mkdir()
        assert end(0) == []

    study = session_of(monkeypatch, done, results, session)
    words, code = study.ending()
    assert code == 1
    assert f"cannot read {results}: " in words
    assert [line["seed"] for line in study.lines()] == [0]


# -------------------------------------------------------------------------------------------------- how it ended


def ended(monkeypatch: pytest.MonkeyPatch, path: Path, *outcomes: Outcome) -> tuple[str, int]:
    """The ending of a session in which the cells became this."""
    monkeypatch.setattr(study_module, "run_cells", lambda *_, **__: dict(zip(NAMES, outcomes, strict=True)))
    found = Study(path, GRID)
    with found.opened(), (path / "printed").open("w") as stream, ThreadPoolExecutor(1) as engine:
        found.run(engine, deadline=None, threads=1, stream=stream)
    return found.ending()


def test_a_run_that_no_clock_stopped_is_not_called_stopped_in_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words, code = ended(monkeypatch, tmp_path / "runs", TERMINATED, GIVEN_BACK, GIVEN_BACK)
    assert code == 1
    assert "in time" not in words
    assert "1 stopped: its process was asked to end (SIGTERM)" in words
    assert "2 stopped: the engine gave it back: the connection to its scheduler was lost" in words


def test_runs_that_the_clock_stopped_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    late = Outcome("stopped", "no time for epoch 2 of 3; epoch 1 is kept in a/")
    words, code = ended(monkeypatch, tmp_path / "runs", TIME_IS_UP, late, TIME_IS_UP)
    assert code == 3
    assert words.endswith("0 of 3 runs are done\n  3 stopped in time; the same command goes on with what is missing")
    words, code = ended(monkeypatch, tmp_path / "runs", TIME_IS_UP, Outcome("failed", "NaN"), TERMINATED)
    assert code == 1
    assert "SET 90% seed 1 failed: NaN\n  1 stopped: its process" in words
    assert "1 stopped in time" in words


def test_a_failure_counts_though_time_was_up_for_another_data_set(
    chtconv: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    endings = iter([("cifar10: one failed", 1), ("cifar100: time", 3)])
    monkeypatch.setattr(Study, "run", lambda *_, **__: None)
    monkeypatch.setattr(Study, "ending", lambda _: next(endings))
    code, out, _ = chtconv("table1", "--out", str(tmp_path / "runs"))
    assert out.endswith("cifar10: one failed\ncifar100: time\n")
    assert code == 1
