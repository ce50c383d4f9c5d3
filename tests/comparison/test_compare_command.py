"""`chtconv compare` and `chtconv table1` as a user types them: missing runs only, faults, and how they end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from chtconv.comparison.command import seconds
from chtconv.comparison.folder import ComparisonFolder
from chtconv.comparison.grid import grid_from
from chtconv.errors import ConfigurationError
from chtconv.files import locked
from chtconv.training import train
from chtconv.training.config import SETTINGS

ROOT = Path(__file__).parents[2]
TINY = ["--width", "0.0625", "--head", "16", "--batch-size", "256", "--threads", "1", "--backend", "dense"]
TABLE = {"width": 0.0625, "head": 16, "batch_size": 256, "threads": 1, "backend": "dense"}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SET at two seeds, one epoch, trained without the command."""
    folder = tmp_path_factory.mktemp("compared") / "runs"
    grid = grid_from(TABLE | {"methods": ["set"], "seeds": [0, 1], "epochs": 1})
    comparison = ComparisonFolder(folder)
    with comparison.opened(grid) as cells:
        for cell in cells:
            train(cell.config, folder / cell.name)
    return folder


@pytest.fixture
def command(compared: Path) -> list[str]:
    words = ["compare", "--methods", "set", "--seeds", "0", "1", "--epochs", "1"]
    return [*words, *TINY, "--out", str(compared)]


def test_several_seeds_without_scipy_are_refused_before_anything_is_trained(
    chtconv: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    words = ["compare", "--methods", "set", "--epochs", "1", *TINY, "--out", str(tmp_path / "runs")]
    code, _, error = chtconv(*words, "--seeds", "0", "1")
    assert code == 2
    assert "needs scipy, which is not installed: pip install 'chtconv[compare]'" in error
    assert not (tmp_path / "runs").exists()
    code, out, error = chtconv(*words, "--seeds", "0")  # nothing to compute an interval of
    assert code == 0, error
    assert "SET      1" in out


def test_what_is_done_is_not_run_again(chtconv: Run, command: list[str], compared: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in compared.rglob("summary.json")}
    code, out, error = chtconv(*command)
    assert code == 0, error
    assert "2 runs, 2 done, 0 to do" in error
    assert "SET      2" in out
    assert {path: path.stat().st_mtime_ns for path in compared.rglob("summary.json")} == before
    lines = [json.loads(line) for line in (compared / "results.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1]
    for line, name in zip(lines, ("set-0.9-seed0", "set-0.9-seed1"), strict=False):
        summary = json.loads((compared / name / "summary.json").read_text())
        assert line["test_accuracy"] == summary["test_accuracy"] == line["curve"]["test_accuracy"][-1]
        assert line["variant"] == "SET"
    chtconv(*command)
    assert len((compared / "results.jsonl").read_text().splitlines()) == 2


def test_a_longer_list_runs_only_what_is_new_and_a_failure_stops_nothing(
    chtconv: Run, command: list[str], compared: Path
) -> None:
    """Links are counted in whole numbers: at 99.9 % a kernel of the first layer would have none."""
    words = ["compare", "--methods", "set", "static", "--sparsities", "0.9", "0.999", "--seeds", "0"]
    words += command[command.index("--epochs") :]
    code, out, error = chtconv(*words)
    assert code == 1
    assert "4 runs, 1 done, 3 to do" in error
    assert re.search(r"static 90% seed 0: \d+\.\d\d% after 1 epoch", error)
    for name in ("SET", "static"):
        assert f"{name} 99.9% seed 0: failed: layer features.0" in error
        assert f"{name} 99.9% seed 0 failed: layer features.0" in out
    assert "2 of 4 runs are done" in out
    assert "layer features.0" in ComparisonFolder(compared).failure("set-0.999-seed0")
    code, out, _ = chtconv(*words, "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["done", "done", "failed", "failed"]


def test_some_of_a_grid_are_run_and_shown_alone(chtconv: Run, command: list[str], compared: Path) -> None:
    wider = ["compare", "--methods", "static", "set", "cht", "chts", *command[3:]]
    code, out, error = chtconv(*wider, "--only", "SET", "dense", "--list")
    assert code == 2
    assert "unknown variant of the grid 'dense': " in error
    assert "Accepted: 'static', 'SET', 'CHT', 'CHTs'." in error
    code, out, _ = chtconv(*wider, "--only", "SET", "--only", "CHT*", "--list")
    assert code == 0
    runs = [Path(line.split()[2]).name for line in out.splitlines()]
    assert runs == [f"{name}-0.9-seed{seed}" for seed in (0, 1) for name in ("set", "cht", "chts")]
    code, out, error = chtconv(*wider, "--only", "S*")
    assert code == 0, error
    assert "2 runs, 2 done, 0 to do" in error
    assert "SET      2" in out
    for words in (["table1", "--only", "CHT-CH3"], ["table1", "--only", "dense", "--datasets", "cifar100"]):
        code, out, error = chtconv(*words, "--list")
        assert code == 0, error
        assert all(words[2].lower() in line for line in out.splitlines())
        assert len(out.splitlines()) == {"CHT-CH3": 2 * 2 * 3, "dense": 3}[words[2]]


def test_results_made_elsewhere_count(chtconv: Run, command: list[str], compared: Path, tmp_path: Path) -> None:
    chtconv(*command)
    results = tmp_path / "all.jsonl"
    results.write_text((compared / "results.jsonl").read_text())
    words = [*command[: command.index("--out")], "--out", str(tmp_path / "new"), "--results", str(results)]
    code, out, error = chtconv(*words)
    assert code == 0, error
    assert "2 runs, 2 done, 0 to do" in error
    assert "2 of 2 runs are done" in out
    assert not list((tmp_path / "new").rglob("summary.json"))
    code, out, _ = chtconv(*words, "--list")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["done", "1/1", f"{results}:", f"set-0.9-seed{seed}"] for seed in (0, 1)
    ]


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """The embedded images in a folder of their name."""
    with resources.as_file(resources.files("chtconv.data") / "digits") as folder:
        return Path(shutil.copytree(folder, tmp_path / "elsewhere" / "digits"))


def test_a_data_set_that_moved_is_the_same(chtconv: Run, command: list[str], digits: Path, tmp_path: Path) -> None:
    command += ["--dataset", str(digits), "--results", str(tmp_path / "all.jsonl")]
    for words in (
        command,
        [*command, "--out", str(tmp_path / "new")],
        [*command, "--dataset", str(tmp_path / "digits")],
    ):
        code, out, error = chtconv(*words)
        assert code == 0, error
        assert "2 of 2 runs are done" in out


def test_another_data_set_of_the_same_name_is_refused(
    chtconv: Run, command: list[str], compared: Path, digits: Path, tmp_path: Path
) -> None:
    results = tmp_path / "all.jsonl"
    assert chtconv(*command, "--results", str(results))[0] == 0
    shutil.copy(digits / "test.parquet", digits / "train.parquet")
    other = [*command, "--dataset", str(digits)]
    for words in (other, [*other, "--out", str(tmp_path / "new"), "--results", str(results)]):
        code, _, error = chtconv(*words)
        assert code == 2
        assert f"dataset={str(digits)!r} is another data set than that of the results of this name" in error
        assert "train 360, not 1437" in error
    assert not (tmp_path / "new").exists()


def test_a_folder_of_another_grid_is_refused(chtconv: Run, command: list[str], compared: Path) -> None:
    code, _, error = chtconv(*command, "--lr", "0.3", "--crop", "0")
    assert code == 2
    assert "holds runs of another grid, with crop 2, not 0, lr 0.05, not 0.3: --out must name another folder" in error


def test_a_name_stands_for_one_configuration(chtconv: Run, compared: Path, command: list[str], tmp_path: Path) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text('[[variants]]\nname = "SET"\nmethod = "set"\nzeta = 0.5\n')
    words = command[command.index("--epochs") :]
    code, _, error = chtconv("compare", str(grid), "--seeds", "0", *words)
    assert code == 2
    assert "set-0.9-seed0 holds a run of another grid, with zeta 0.3" in error


def test_a_folder_of_something_else_is_refused(chtconv: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    code, _, error = chtconv("compare", "--out", str(tmp_path))
    assert code == 2
    assert "holds no comparison, and thesis.txt, which is no run of this one" in error
    assert chtconv("compare", "--out", str(tmp_path / "thesis.txt"))[0] == 2


def test_two_processes_in_one_folder_are_refused(chtconv: Run, command: list[str], compared: Path) -> None:
    with locked(compared):
        code, _, error = chtconv(*command)
    assert code == 2
    assert f"is in use by another run (process {os.getpid()})" in error


def test_no_run_begins_after_the_time_limit(chtconv: Run, command: list[str], tmp_path: Path) -> None:
    words = [*command[: command.index("--out")], "--out", str(tmp_path / "runs"), "--time-limit", "0s"]
    code, out, _ = chtconv(*words)
    assert code == 3
    assert "0 of 2 runs are done" in out
    assert "2 stopped in time; the same command goes on with what is missing" in out


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_after_ctrl_c_the_same_command_goes_on(
    tmp_path: Path, command: list[str], compared: Path, sent: signal.Signals
) -> None:
    """Ends with the same bits as a run that was never stopped."""
    words = [*command[: command.index("--out")], "--out", str(tmp_path / "runs")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    start: Any = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    interrupted = subprocess.Popen(
        [sys.executable, "-m", "chtconv", *words],
        **start,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: any((tmp_path / "runs").glob(".session-*/set*")), interrupted)
    interrupted.send_signal(sent)
    _, error = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130, error
    assert "the same command goes on" in error
    if sent == signal.SIGTERM:
        return
    done = subprocess.run([sys.executable, "-m", "chtconv", *words], **start, timeout=200)
    assert done.returncode == 0, done.stderr
    for name in ("set-0.9-seed0", "set-0.9-seed1"):
        for file in ("model.safetensors", "masks.safetensors"):
            assert (tmp_path / "runs" / name / file).read_bytes() == (compared / name / file).read_bytes()


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


@pytest.mark.parametrize(("name", "extra"), [("compare", "--recipe"), ("table1", "--datasets --data")])
def test_every_option_of_the_configuration_is_there(chtconv: Run, name: str, extra: str) -> None:
    code, out, _ = chtconv(name, "--help")
    assert code == 0
    plural = {
        "method": "methods",
        "predictor": "predictors",
        "graph": "graphs",
        "sparsity": "sparsities",
        "seed": "seeds",
    }
    expected = {"--" + plural.get(each, each).replace("_", "-") for each in SETTINGS} | set(extra.split())
    if name == "table1":
        expected -= {"--dataset"}
    expected |= {"--out", "--jobs", "--scheduler", "--time-limit", "--results", "--only", "--list"}
    found = {word.strip("[],") for word in out.split() if word.lstrip("[").startswith("--")}
    assert found - {"--help", "--no-flip"} == expected


def test_yes_and_no_are_values_like_others(chtconv: Run, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    words = ["--methods", "chts", "--seeds", "0", "--prune-dead", "yes", "no", "--list", "--out", str(out)]
    code, listed, error = chtconv("compare", *words)
    assert code == 0, error
    assert sorted(line.split()[-1] for line in listed.splitlines()) == [
        str(out / name) for name in ("chts-0.9-seed0", "chts-prune-dead-0.9-seed0")
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "jobs=0: accepted is a whole number, at least 1"),
        (["--jobs", "two"], "jobs='two': accepted is a whole number, at least 1"),
        (["--time-limit", "90"], "time-limit='90': accepted are times such as 90s"),
        (["--methods", "sett"], "unknown method 'sett': did you mean 'set'"),
        (["--sparsities", "0.5", "x"], "sparsity='x': accepted is a number"),
        (["--jobs", "2", "--scheduler", "tcp://127.0.0.1:1"], "with --scheduler its workers say how many"),
        (["--sparsity", "0.5"], "unknown option '--sparsity': did you mean '--sparsities'?"),
        (["--prune-dead", "maybe"], "prune_dead='maybe': accepted is yes or no"),
        (["--layers", "features.0, feature.3"], "layers='feature.3' matches no layer; those of the model are features"),
        (["--model", "resnet18", "--head", "8"], "head=8: accepted is none, since a residual network"),
        (["no.toml"], "cannot read the grid no.toml"),
        (["--datasets", "cifar10"], "unknown option '--datasets': did you mean '--dataset'?"),
        (["--recipes=quick"], "unknown option '--recipes=quick': did you mean '--recipe'?"),
        (["--time-limit", ""], "time-limit='': accepted are times such as 90s"),
        (["--jobs", ""], "jobs='': accepted is a whole number, at least 1"),
        (["--results", ""], "results='': accepted is text, not empty"),
        (["--scheduler", ""], "scheduler='': accepted is text, not empty"),
        (["--recipe", ""], "recipe='': accepted is text, not empty"),
        ([""], "grid='': accepted is text, not empty"),
    ],
)
def test_what_cannot_be_used_is_named_before_anything_is_written(
    chtconv: Run, tmp_path: Path, words: list[str], message: str
) -> None:
    out = tmp_path / "runs"
    code, _, error = chtconv("compare", *words, "--out", str(out))
    assert code == 2
    assert message in error
    assert not out.exists()


def test_table_1_suggests_its_own_options(chtconv: Run) -> None:
    code, _, error = chtconv("table1", "--dataset", "cifar10")
    assert code == 2
    assert "unknown option '--dataset': did you mean '--datasets'?" in error


def test_table_1_on_other_images(chtconv: Run, tmp_path: Path) -> None:
    """Its grid on the embedded digits, listed only: a folder a data set, seed by seed."""
    code, out, _ = chtconv(
        "table1", "--data", str(tmp_path), "--out", str(tmp_path / "runs"), "--list", "--epochs", "2"
    )
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert len(lines) == 42
    assert {line[0] for line in lines} == {"waiting"}
    assert lines[0][2] == str(tmp_path / "runs" / "cifar10" / "dense-seed14")
    assert not (tmp_path / "runs").exists()


def test_times_that_are_none_are_refused() -> None:
    for text in ("", "-1s", "1", "1:90", "h", "1h30"):
        with pytest.raises(ConfigurationError, match="accepted are times"):
            seconds(text)
