"""The command line: its options, what it refuses, how it stops, and what a person reads at the end."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import chtconv
from chtconv import cli
from chtconv.methods import METHODS
from chtconv.training.config import SETTINGS

ROOT = Path(__file__).parents[1]
CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10"
TINY = ["--width", "0.0625", "--head", "16", "--batch-size", "256", "--threads", "1"]

OPTIONS = """
    --help --recipe --out --resume --overwrite
    --dataset --image-size --validation --batch-size --flip --no-flip --crop
    --model --width --head --dropout
    --method --predictor --graph --sparsity --layers --zeta --zeta-schedule --evolutions-per-epoch --stop-fraction
    --windows --allocation --distribution --removal --regrowth --density --initial-sparsity --temperature --explore
    --smoothing --kernel-shares --early-stop --prune-dead --no-prune-dead
    --epochs --optimizer --lr --momentum --weight-decay --warmup-epochs --schedule --final-lr --decay-end
    --seed --device --precision --backend --step --optimizer-kernel --threads
"""

Run = Callable[..., tuple[int, str, str]]


def started(*words: str, folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        [sys.executable, "-m", "chtconv", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no {path} in time"
        time.sleep(0.02)


def test_the_options_are_those_that_are_promised(chtconv: Run) -> None:
    code, out, _ = chtconv("train", "--help")
    assert code == 0
    found = {word.strip("[],") for word in out.split() if word.lstrip("[").startswith("--")}
    assert found == set(OPTIONS.split())
    assert {"--" + name.replace("_", "-") for name in SETTINGS} <= found


def test_help_names_every_choice_and_default(chtconv: Run) -> None:
    text = " ".join(chtconv("train", "--help")[1].split())
    assert f"{', '.join(('dense', *METHODS))} (chts)" in text
    assert "share of the links that is absent (0.9)" in text


def test_help_loads_no_library_for_data() -> None:
    code = (
        "import sys, contextlib\nfrom chtconv.cli import main\nwith contextlib.suppress(SystemExit): main(['--help'])\n"
        "print([name for name in ('datasets', 'PIL', 'pandas', 'pyarrow') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(chtconv: Run) -> None:
    code, out, _ = chtconv("--version")
    assert (code, out.split()[0]) == (0, "chtconv")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: COMMAND"),
        ("trian", "invalid choice: 'trian'"),
        ("train --sparsty 0.5", "unknown option '--sparsty': did you mean '--sparsity'?"),
        ("train --sparse 0.5", "unknown option '--sparse'"),
        ("train --sparsity", "argument --sparsity: expected one argument"),
        ("train --sparsity 1", "sparsity=1.0: accepted is a number, at least 0 and below 1."),
        ("train --sparsity much", "sparsity='much': accepted is a number, at least 0 and below 1."),
        ("train --sparsity 0.99", "at sparsity 0.99 a kernel of 27 positions would hold no link"),
        ("train --sparsity nan", "sparsity=nan"),
        ("train --epochs 1.5", "epochs='1.5': accepted is a whole number, at least 1."),
        ("train --zeta 0", "zeta=0.0: accepted is a number, above 0 and at most 1."),
        ("train --lr -1", "lr=-1.0: accepted is a number, above 0."),
        ("train --width 0", "width=0.0"),
        ("train --width 1e300", "width=1e+300: accepted is a number, above 0 and at most 1000."),
        ("train --batch-size 100000000000000000000000", "accepted is a whole number, at least 1 and at most 16777216."),
        ("train --image-size 100000000", "accepted is a whole number, at least 32 and at most 16384."),
        ("train --evolutions-per-epoch 1e-320", "evolutions_per_epoch=1e-320: accepted is a number, above 0."),
        ("train --decay-end 0.1 --epochs 5", "decay_end=0.1: the rate would have fallen after 0.5 epochs"),
        ("train runs/mine", "unexpected argument 'runs/mine': 'chtconv train --help' says what is accepted."),
        ("train --head 0", "head=0: accepted is a whole number, at least 1 and at most 16777216, or none."),
        ("train --image-size 16", "image_size=16: accepted is a whole number, at least 32 and at most 16384."),
        ("train --method sett", "unknown method 'sett': did you mean 'set'?"),
        ("train --predictor ch4", "unknown predictor 'ch4'"),
        ("train --graph kernal", "unknown graph 'kernal': did you mean 'kernel'?"),
        ("train --model vg16", "unknown model 'vg16': did you mean 'vgg16'?"),
        ("train --recipe paper-cifar1", "unknown recipe 'paper-cifar1': did you mean 'paper-cifar10'?"),
        ("train --layers features.1", "layers='features.1' matches no layer"),
        ("train --dataset ./nowhere", "nowhere"),
        ("train --validation 2000", "validation=2000"),
        ("train --resume", "holds no run to resume"),
        ("train --width 1000", "the memory does not suffice"),
        ("train --backend sparce", "unknown backend 'sparce': did you mean 'sparse'?"),
        ("train --backend sparse --method dense", "backend='sparse': method='dense' has no sparse layers"),
    ],
)
def test_bad_input_is_answered_in_one_line_and_leaves_nothing(
    chtconv: Run, tmp_path: Path, words: str, message: str
) -> None:
    code, out, error = chtconv(*words.split())
    assert code == 2
    last = error.splitlines()[-1]
    assert last.startswith("chtconv: error: ")
    assert message in last
    assert "Traceback" not in error
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "darwin", reason="no CUDA there at all")
def test_cuda_without_a_gpu_is_refused(chtconv: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, error = chtconv("train", "--device", "cuda")
    assert code == 2
    assert "device='cuda': torch finds no GPU here; accepted are 'cpu' and 'auto'." in error
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_start_to_end(chtconv: Run, tmp_path: Path) -> None:
    code, out, error = chtconv("train", *TINY, "--epochs", "2", "--validation", "100", "--seed", "3")
    assert code == 0
    folder = tmp_path / "runs" / "digits-vgg16-chts-0.9-seed3"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["config"]["seed"] == 3
    assert f"{summary['test_accuracy']:.2%}" in out
    assert "the best on the validation images" in out
    for name, row in summary["layers"].items():
        line = next(line for line in out.splitlines() if line.startswith(name.removesuffix(".weight") + " "))
        assert f"{row['links']:,} of {row['size']:,}" in line
    assert out.splitlines()[-1].endswith("chtconv train --validation 100 --batch-size 256 --width 0.0625 --head 16 "
                                         "--epochs 2 --seed 3 --threads 1 --method set")  # fmt: skip
    assert [line.split()[1] for line in error.splitlines() if line.startswith("epoch")] == ["1/2", "2/2"]
    assert max(len(line) for line in out.splitlines()[:-1]) <= 100


def test_a_complete_run_is_refused_resumed_and_overwritten(chtconv: Run, tmp_path: Path) -> None:
    words = ["train", *TINY, "--epochs", "1", "--out", "run"]
    assert chtconv(*words)[0] == 0
    code, _, error = chtconv(*words)
    assert (code, "--resume goes on with it" in error) == (2, True)
    before = (tmp_path / "run" / "summary.json").read_bytes()
    code, out, error = chtconv("train", "--out", "run", "--resume")
    assert (code, "complete already" in error, "test accuracy" in out) == (0, True, True)
    assert (tmp_path / "run" / "summary.json").read_bytes() == before
    code, _, error = chtconv("train", "--out", "run", "--resume", "--lr", "0.5", "--epochs", "4")
    assert (code, "epochs 4 instead of 1, lr 0.5 instead of 0.05" in error) == (2, True)
    assert chtconv(*words, "--overwrite", "--seed", "4")[0] == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seed"] == 4


def test_dense_says_that_it_ignores_sparsity_only_where_both_were_given(chtconv: Run, tmp_path: Path) -> None:
    words = ["train", *TINY, "--epochs", "1", "--method", "dense"]
    code, out, error = chtconv(*words)
    assert (code, "ignored" in error, "re-chosen" in out) == (0, False, False)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["digits-vgg16-dense-0-seed0"]
    assert json.loads(next(tmp_path.glob("runs/*/config.json")).read_text())["sparsity"] == 0
    code, _, error = chtconv(*words, "--sparsity", "0.9", "--overwrite")
    assert (code, "note: --method dense has no sparsity" in error) == (0, True)
    assert chtconv(*words, "--resume")[0] == 0


def test_divergence_is_an_error_in_one_line(chtconv: Run, tmp_path: Path) -> None:
    code, _, error = chtconv("train", *TINY, "--lr", "1e30", "--warmup-epochs", "0")
    assert code == 2
    assert "chtconv: error: the loss is not finite in epoch 1, step 2 of 6" in error.splitlines()[-1]
    assert list((tmp_path / "runs").iterdir() if (tmp_path / "runs").exists() else []) == []


def test_ctrl_c_after_an_epoch_says_how_to_go_on(chtconv: Run, tmp_path: Path) -> None:
    words = ["train", *TINY, "--epochs", "500", "--out", "my run"]
    with started(*words, folder=tmp_path) as process:
        # The last file of an epoch.
        wait_for(tmp_path / "my run" / "evolution.jsonl", process)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    command = f"chtconv {' '.join(words[:-1])} 'my run' --resume"
    assert error.splitlines()[-2:] == [
        "chtconv: interrupted; the last whole epoch is kept. To go on:",
        f"  {command}",
    ]
    kept = {path.name for path in (tmp_path / "my run").iterdir()}
    assert kept == {"config.json", "checkpoint.pt", "metrics.jsonl", "evolution.jsonl"}


def test_ctrl_c_within_the_first_epoch_leaves_nothing(tmp_path: Path) -> None:
    with started("train", "--batch-size", "2", "--threads", "1", folder=tmp_path) as process:
        wait_for(tmp_path / "runs" / "digits-vgg16-chts-0.9-seed0" / "config.json", process)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "chtconv: interrupted; not one epoch was complete, so nothing was kept"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_a_run_that_replaces_another_says_that_nothing_was_kept(chtconv: Run, tmp_path: Path) -> None:
    command = ["train", *TINY, "--epochs", "60", "--out", "run"]
    with started(*command, folder=tmp_path) as process:
        wait_for(tmp_path / "run" / "checkpoint.pt", process)
        process.kill()
    with started(*command, "--lr", "0.02", "--batch-size", "2", "--overwrite", folder=tmp_path) as process:
        wait_for(tmp_path / "run" / ".replaced" / "checkpoint.pt", process)
        process.send_signal(signal.SIGINT)
        error = process.communicate()[1]
    assert process.returncode == 130
    assert error.splitlines()[-1] == "chtconv: interrupted; not one epoch was complete, so nothing was kept"
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_resumed_run_is_compared_with_one_of_its_own_configuration(chtconv: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    chtconv("train", *TINY, "--epochs", "1", "--no-prune-dead", "--sparsity", "0.8", "--out", out)
    printed = chtconv("train", "--out", out, "--resume")[1]
    (command,) = [line.split() for line in printed.splitlines() if line.startswith("compare with")]
    words = command[command.index("train") :]
    assert words[-2:] == ["--out", f"{out}-set"]
    assert chtconv(*words)[0] == 0
    mine, other = (json.loads(Path(path, "config.json").read_text()) for path in (out, f"{out}-set"))
    assert other == mine | {"method": "set"}


def test_the_command_to_compare_with_keeps_a_falling_density(chtconv: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    course = ["--density", "cubic", "--allocation", "model", "--evolutions-per-epoch", "3"]
    printed = chtconv("train", *TINY, "--epochs", "1", "--method", "granet", *course, "--out", out)[1]
    (command,) = [line.split() for line in printed.splitlines() if line.startswith("compare with")]
    assert chtconv(*command[command.index("train") :])[0] == 0
    mine, other = (json.loads(Path(path, "config.json").read_text()) for path in (out, f"{out}-set"))
    assert other == mine | {"method": "set", "initial_sparsity": 0.5}


@pytest.mark.parametrize(
    ("out", "message"), [("a" * 300, "a{300}: File name too long"), ("\udcff/" + "b" * 300, ": File name too long")]
)
def test_paths_that_cannot_be_are_named(chtconv: Run, out: str, message: str, tmp_path: Path) -> None:
    code, _, error = chtconv("train", *TINY, "--out", str(tmp_path / out))
    assert code == 2
    assert re.fullmatch(f"chtconv: error: .*{message}", error.splitlines()[-1])


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_output_that_nobody_wants_stops_nothing(tmp_path: Path, closed: str) -> None:
    words = shlex.join([sys.executable, "-m", "chtconv", "train", *TINY, "--epochs", "1", "--out", "run"])
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run(f"{words} {closed}", shell=True, cwd=tmp_path, env=environment, check=False).returncode == 0
    assert (tmp_path / "run" / "summary.json").exists()


def test_names_that_the_terminal_cannot_show_are_shown_otherwise(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "chtconv", "train", *TINY, "--epochs", "1", "--out", "läuft"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0
    assert rb"l\xe4uft" in done.stdout


def test_who_stops_reading_gets_no_traceback(tmp_path: Path) -> None:
    process = started("explain", "--shape", "8,8,3,3", "--input-size", "8", "--padding", "1", folder=tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (process.wait(100), process.stderr.read()) == (141, "")


def test_a_terminal_gets_a_bar(
    chtconv: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    code, _, error = chtconv("train", *TINY, "--epochs", "1")
    assert code == 0
    assert "6 steps" in error
    assert "sparsity 90.0%" in error
    assert "epoch 1/1" in error


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 does not lie at ../shared/data/cifar10")
def test_cifar10_from_its_parquet_files(chtconv: Run, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    images = parquet.read_table(next(CIFAR10.glob("test-*.parquet")))
    (tmp_path / "cifar").mkdir()
    parquet.write_table(images.slice(0, 1500), tmp_path / "cifar" / "train-00000-of-00001.parquet")
    parquet.write_table(images.slice(1500, 500), tmp_path / "cifar" / "test-00000-of-00001.parquet")
    changes = ["--batch-size", "128", "--dataset", "./cifar", "--epochs", "1", "--sparsity", "0.9"]
    code, _, _ = chtconv("train", "--recipe", "cifar-short", *TINY, *changes, "--out", "run")
    assert code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["dataset"] | {"name": ""} == {"name": "", "classes": 10, "train": 1500, "validation": 0, "test": 500}
    assert summary["config"]["flip"]
    assert summary["evolutions"] == 2


def test_our_warnings_are_lines_like_errors_and_others_are_left_alone(monkeypatch, capsys):
    def command(*_):
        warnings.warn("this is odd", chtconv.ChtconvWarning, stacklevel=1)
        warnings.warn("so is this", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setattr("chtconv.cli.train.train_command", command)
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        shown = warnings.showwarning
        assert cli.main(["train"]) == 0
        assert warnings.showwarning is shown
    assert capsys.readouterr().err == "chtconv: warning: this is odd\n"
    assert [str(each.message) for each in others] == ["so is this"]
