"""The folder of a run: who may write to it, what is refused, and that no file is ever half written."""

import errno
import importlib
import json
import os
import pickle
import secrets
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from chtconv.errors import ConfigurationError
from chtconv.files import LOCK, StorageError, locked, write_atomically
from chtconv.training import Config, TrainingDiverged, loop, train
from chtconv.training.progress import Progress
from chtconv.training.run_folder import RunFolder, default_out


@pytest.fixture(scope="module")
def after_one_epoch(tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any], stop: Any) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.raises(KeyboardInterrupt):
        train(Config().replace(**tiny_values), folder, progress=stop(epochs=1))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any]) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(Config().replace(**tiny_values), folder)
    return folder


@pytest.fixture
def stopped(after_one_epoch: Path, tmp_path: Path) -> Path:
    """A run of which one epoch is kept."""
    return Path(shutil.copytree(after_one_epoch, tmp_path / "run"))


def aside(run: Path, folder: Path) -> None:
    """Puts a run where one waits that is being replaced."""
    shutil.copytree(run, folder / ".replaced")
    (folder / ".replaced" / "whole").touch()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_with_a_run_is_refused_with_the_ways_out(stopped: Path, tiny: Config) -> None:
    with pytest.raises(ConfigurationError, match=r"already holds a run: --resume .* --overwrite .* --out"):
        train(tiny, stopped)


def test_another_configuration_is_refused_by_name(stopped: Path, tiny: Config) -> None:
    with pytest.raises(
        ConfigurationError, match=r"another configuration: lr 0\.2 instead of 0\.05, seed 3 instead of 0"
    ):
        train(tiny.replace(lr=0.2, seed=3), stopped, resume=True)


def test_a_run_goes_on_with_a_data_set_that_moved(stopped: Path, tiny: Config, tmp_path: Path) -> None:
    with resources.as_file(resources.files("chtconv.data") / "digits") as folder:
        moved = shutil.copytree(folder, tmp_path / "elsewhere" / "digits")
    with pytest.raises(ConfigurationError, match="another configuration: dataset 'numbers' instead of 'digits'"):
        train(tiny.replace(dataset="numbers"), stopped, resume=True)
    assert train(tiny.replace(dataset=str(moved)), stopped, resume=True)["dataset"]["name"] == str(moved)


def test_nothing_to_resume_is_refused_and_leaves_no_folder(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no run to resume: leave out --resume"):
        train(tiny, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_resume_and_overwrite_exclude_each_other(stopped: Path, tiny: Config) -> None:
    with pytest.raises(ConfigurationError, match="give one of them"):
        train(tiny, stopped, resume=True, overwrite=True)


def test_a_run_killed_within_its_first_epoch_starts_again(stopped: Path, tiny: Config) -> None:
    (stopped / "checkpoint.pt").unlink()
    assert train(tiny, stopped, resume=True)["epochs"] == 3


def test_overwrite_replaces_the_run_and_nothing_else(stopped: Path, tiny: Config) -> None:
    (stopped / "notes.txt").write_text("mine")
    summary = train(tiny.replace(epochs=1, seed=7), stopped, overwrite=True)
    assert (summary["seed"], summary["epochs"]) == (7, 1)
    assert (stopped / "notes.txt").read_text() == "mine"
    assert "checkpoint.pt" not in names(stopped)


def test_overwrite_keeps_the_old_run_until_the_new_one_has_something_to_keep(stopped: Path, tiny: Config) -> None:
    before = {path.name: path.read_bytes() for path in stopped.iterdir() if path.is_file() and path.name != ".lock"}
    with pytest.raises(TrainingDiverged):
        train(tiny.replace(lr=1e30, epochs=1), stopped, overwrite=True)
    after = {path.name: path.read_bytes() for path in stopped.iterdir() if path.is_file() and path.name != ".lock"}
    assert after == before
    assert not [path for path in stopped.iterdir() if path.is_dir()]


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("moves", range(9))
def test_a_run_that_is_being_replaced_survives_whenever_that_is_interrupted(
    moves: int, killed: bool, stopped: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, after which the folder is put in order, and by a kill, after which the next process does that."""
    before = {path.name: path.read_bytes() for path in stopped.iterdir() if path.is_file() and path.name != ".lock"}
    replace, left = os.replace, [moves]

    def interrupted(source: Any, target: Any) -> None:
        if left[0] == 0:
            left[0] = -1
            raise KeyboardInterrupt
        left[0] -= 1
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        if killed:
            patch.setattr(RunFolder, "_settle", lambda self: None)
        with pytest.raises((KeyboardInterrupt, TrainingDiverged)):
            train(tiny.replace(lr=1e30, epochs=1), stopped, overwrite=True)
    with pytest.raises((ConfigurationError, TrainingDiverged)):
        train(tiny.replace(lr=1e30, epochs=1), stopped, overwrite=True)
    after = {path.name: path.read_bytes() for path in stopped.iterdir() if path.is_file() and path.name != ".lock"}
    assert after == before
    assert not [path for path in stopped.iterdir() if path.is_dir()]


def test_a_run_that_a_killed_process_was_replacing_is_never_mixed_with_another(
    stopped: Path, whole: Path, tiny: Config
) -> None:
    """The folder of a run with a checkpoint, which was to replace a whole one."""
    aside(whole, stopped)
    checkpoint = (stopped / "checkpoint.pt").read_bytes()
    with pytest.raises(TrainingDiverged):
        train(tiny.replace(lr=1e30, epochs=1), stopped, overwrite=True)
    assert names(stopped) == {"config.json", "checkpoint.pt", "metrics.jsonl", "evolution.jsonl"}
    assert (stopped / "checkpoint.pt").read_bytes() == checkpoint


def test_a_killed_process_that_had_nothing_to_keep_yet_gives_the_run_back(
    stopped: Path, whole: Path, tiny: Config
) -> None:
    for path in stopped.iterdir():
        path.unlink()
    aside(whole, stopped)
    with pytest.raises(ConfigurationError, match="already holds a run"):
        train(tiny, stopped)
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_what_a_killed_process_was_writing_goes(stopped: Path, whole: Path, tiny: Config) -> None:
    (stopped / ".checkpoint.pt.0123abcd.partial").write_bytes(b"a part")
    (stopped / ".mine.partial").write_bytes(b"of somebody else")
    train(tiny, stopped, resume=True)
    assert names(stopped) - names(whole) == {".mine.partial"}


def test_a_run_that_another_process_completes_meanwhile_is_whole(
    stopped: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = loop.prepare

    def slow(config: Config) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "prepare", prepare)
            train(tiny, stopped, resume=True)
        return prepare(config)

    monkeypatch.setattr(loop, "prepare", slow)
    assert train(tiny, stopped, resume=True)["epochs"] == 3
    assert RunFolder(stopped).epochs() == 3


def test_results_in_a_folder_that_is_read_only_can_be_read(
    whole: Path, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "checkpoint.pt").touch()

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refused)
    assert train(tiny, run, resume=True)["epochs"] == 3


def test_overwrite_spares_files_that_no_run_wrote(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Bert"]}')
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(ConfigurationError, match="unknown configuration value 'architectures'"):
        train(tiny, tmp_path, overwrite=True)
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


def test_a_file_is_no_folder(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="is a file: --out must name a folder"):
        train(tiny, tmp_path / "file")


def test_a_folder_that_cannot_be_made_is_named(tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot make the folder .*below"):
        train(tiny, tmp_path / "file" / "below")


@pytest.mark.parametrize("values", [{"dataset": "/no/such/folder"}, {"validation": 10**6}, {"sparsity": 0.99}])
def test_what_fails_before_training_leaves_no_folder(tiny: Config, tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        train(tiny.replace(**values), tmp_path / "a" / "b")
    assert names(tmp_path) == set()


def test_stopped_within_the_first_epoch_takes_back_what_it_made_and_no_more(
    tiny: Config, tmp_path: Path, stop: Any
) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(KeyboardInterrupt):
        train(tiny, tmp_path / "a" / "b" / "c", progress=stop(steps=2))
    assert names(tmp_path) == {"a"}
    assert names(tmp_path / "a") == set()


class _FillDisk(Progress):
    """After the first epoch, what is written next to ``path`` lands on a device without space."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path = path
        monkeypatch.setattr(secrets, "token_hex", lambda _: "token")

    def epoch(self, *_: Any) -> None:
        self._path.with_name(f".{self._path.name}.token.partial").symlink_to("/dev/full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.jsonl"])
def test_a_full_disk_keeps_the_last_checkpoint(
    tiny: Config, whole: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with pytest.raises(StorageError, match=f"cannot write .*{name}: the disk is full"):
        train(tiny, run, progress=_FillDisk(run / name, monkeypatch))
    assert names(run) == {"config.json", "checkpoint.pt", "metrics.jsonl", "evolution.jsonl"}
    kept = torch.load(run / "checkpoint.pt", weights_only=True)["epoch"]
    assert kept == {"checkpoint.pt": 1, "metrics.jsonl": 2}[name]
    train(tiny, run, resume=True)
    for file in ("model.safetensors", "masks.safetensors", "evolution.jsonl"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()


def test_a_disk_full_from_the_start_leaves_nothing(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        train(tiny, tmp_path / "run")
    assert names(tmp_path) == set()


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert names(tmp_path) == {"file"}
    assert (tmp_path / "file").read_bytes() == b"old"


def test_writers_of_one_file_each_write_a_whole_one(tmp_path: Path) -> None:
    contents = [bytes([number]) * 2_000_000 for number in range(4)]

    def write(content: bytes) -> None:
        for _ in range(5):
            write_atomically(tmp_path / "file", content)
            assert (tmp_path / "file").read_bytes() in contents

    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(write, contents))
    assert names(tmp_path) == {"file"}


class _Code:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code from a checkpoint was run')",))


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _hostile(path: Path) -> None:
    torch.save({"epoch": 1, "model": _Code()}, path)


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Code()))


def _one_bit(path: Path) -> None:
    """Of the largest tensor, which torch reads as if nothing were wrong."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda each: each.file_size)
    content[largest.header_offset + 1000] ^= 64
    path.write_bytes(content)


def _bytes_of_its_structure(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"torch", b"touch"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "spoil",
    [_truncated, _hostile, _pickled, _one_bit, _bytes_of_its_structure, lambda path: path.write_bytes(b"")],
)
def test_a_spoilt_checkpoint_is_refused_and_runs_no_code(stopped: Path, tiny: Config, spoil: Any) -> None:
    spoil(stopped / "checkpoint.pt")
    with pytest.raises(ConfigurationError, match=r"checkpoint\.pt is damaged or no checkpoint; without"):
        train(tiny, stopped, resume=True)


@pytest.mark.parametrize("state", [{"epoch": 1}, {"topology": {"masks": {}, "explored": {}}}, {}, [1]])
def test_a_checkpoint_of_something_else_is_refused(stopped: Path, tiny: Config, state: Any) -> None:
    torch.save(state, stopped / "checkpoint.pt")
    with pytest.raises(ConfigurationError, match=r"checkpoint.*; without .* the run starts anew"):
        train(tiny, stopped, resume=True)


def test_a_checkpoint_of_another_device_is_refused(stopped: Path, tiny: Config) -> None:
    state = torch.load(stopped / "checkpoint.pt", weights_only=True)
    assert state["device"] == "cpu"
    torch.save(state | {"device": "cuda"}, stopped / "checkpoint.pt")
    with pytest.raises(
        ConfigurationError, match=r"it was computed on 'cuda', and this is 'cpu'; without .* starts anew"
    ):
        train(tiny, stopped, resume=True)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"lr": "fast"}'])
def test_a_spoilt_configuration_is_refused(stopped: Path, tiny: Config, text: str) -> None:
    (stopped / "config.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"; without .* the run starts anew"):
        train(tiny, stopped, resume=True)


HOLD = """
import sys, pathlib, chtconv.files as files
with files.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_use_is_refused_by_process_until_that_process_dies(stopped: Path, tiny: Config) -> None:
    command = [sys.executable, "-c", HOLD, str(stopped)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigurationError, match=f"in use by another run \\(process {holder.pid}\\)"):
            train(tiny, stopped, resume=True)
        holder.kill()
    assert (stopped / LOCK).exists()
    train(tiny, stopped, resume=True)
    assert LOCK not in names(stopped)


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"dataset": "uoft-cs/cifar10", "method": "set", "sparsity": 0.95, "seed": 14},
            "cifar10-vgg16-set-0.95-seed14",
        ),
        ({"dataset": "/data/my pictures/", "sparsity": 0.7}, "my_pictures-vgg16-chts-0.7-seed0"),
        ({"method": "dense"}, "digits-vgg16-dense-0-seed0"),
    ],
)
def test_default_folder_is_named_after_the_run(values: dict[str, Any], expected: str) -> None:
    assert default_out(Config().replace(**values)) == Path("runs") / expected


def test_config_json_gives_back_the_configuration(stopped: Path, tiny: Config) -> None:
    assert RunFolder(stopped).stored_config() == tiny
    assert json.loads((stopped / "config.json").read_text())["sparsity"] == 0.9


@pytest.mark.parametrize(
    ("module", "call", "message"),
    [
        ("os", "open", "cannot write to the folder .*: Permission denied"),
        ("os", "truncate", "cannot write .*lock: Permission denied"),
        ("fcntl", "flock", "cannot lock .*: Permission denied; accepted is a folder on a file system with locks"),
    ],
)
def test_folders_that_cannot_be_locked_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, call: str, message: str
) -> None:
    """As those of somebody else, and those on file systems without locks."""

    def refused(*_: object) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module(module), call, refused)
        with pytest.raises(StorageError, match=message), locked(tmp_path):
            raise AssertionError
    with locked(tmp_path):
        assert (tmp_path / LOCK).exists()
