"""The disk cache is a shortcut: with whatever is found there, the constants are right."""

import importlib
import os
import py_compile
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

import chtconv
from chtconv import cache
from chtconv.scores.patterns import pattern_table


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CHTCONV_CACHE", str(tmp_path))
    pattern_table.cache_clear()
    yield tmp_path
    pattern_table.cache_clear()


def get(value=3.0, key="key", shape=(4,), dtype=torch.float32):
    """The constant, and whether it was built."""
    built = []

    def build():
        built.append(True)
        return torch.full(shape, value, dtype=dtype)

    return cache.cached(key, shape, dtype, build), bool(built)


def test_a_constant_is_built_once_and_read_afterwards(folder):
    assert get()[1]
    stored, built = get(value=99.0)
    assert not built
    assert torch.equal(stored, torch.full((4,), 3.0))
    assert get(key="another")[1]
    assert len(list(folder.iterdir())) == 2


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-3])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(b"\xff" * 200)


def flipped_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def other_key(path):
    constant = torch.full((4,), 7.0)
    safetensors.torch.save_file({"constant": constant}, path, {"key": "else", "digest": cache._digest(constant)})


def other_tensor(path):
    safetensors.torch.save_file({"something": torch.zeros(4)}, path)


def other_shape(path):
    constant = torch.full((5,), 7.0)
    safetensors.torch.save_file({"constant": constant}, path, {"key": "key", "digest": cache._digest(constant)})


def huge_header(path):
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")


def folder_in_its_place(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil",
    [cut_short, empty, garbage, flipped_bit, other_key, other_tensor, other_shape, huge_header, folder_in_its_place],
)
def test_broken_and_foreign_files_are_built_again(folder, spoil):
    get()
    (path,) = folder.iterdir()
    spoil(path)
    constant, built = get()
    assert built
    assert torch.equal(constant, torch.full((4,), 3.0))
    assert list(folder.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_no_problem(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CHTCONV_CACHE", str(tmp_path / "file" / "below"))
    assert torch.equal(get()[0], torch.full((4,), 3.0))
    assert get()[1]


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    assert get()[1]
    assert not list(folder.iterdir())


def test_an_empty_setting_switches_it_off(folder, monkeypatch):
    monkeypatch.setenv("CHTCONV_CACHE", "")
    assert get()[1]
    assert get()[1]
    assert not list(folder.iterdir())


def test_the_oldest_files_go_beyond_the_limit(folder, monkeypatch):
    monkeypatch.setattr(cache, "_LIMIT", 1000)
    for i in range(5):
        get(key=f"key {i}", shape=(100,))
    assert len(list(folder.iterdir())) == 1


def test_scores_are_the_same_from_the_cache(folder):
    mask = torch.rand(4, 4, 3, 3) < 0.4
    built = chtconv.link_scores(mask, 8, padding=1)
    assert len(list(folder.iterdir())) == 1
    pattern_table.cache_clear()
    assert torch.equal(chtconv.link_scores(mask, 8, padding=1), built)


def test_scores_are_those_of_the_predictor_as_it_is_now(folder, tmp_path_factory):
    """A copy of the package with another CH3-L3n beside a cache that the package itself has filled."""
    copy = tmp_path_factory.mktemp("edited") / "chtconv"
    shutil.copytree(Path(chtconv.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import torch, chtconv; mask = torch.arange(36).view(2, 2, 3, 3) % 5 < 2;"
        "print(chtconv.link_scores(mask, 8, padding=1).sum().item())"
    )

    def score(cache):
        environment = {**os.environ, "PYTHONPATH": str(copy.parent), "CHTCONV_CACHE": str(cache)}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=copy.parent, capture_output=True, check=True
        ).stdout

    before = score(folder)
    assert len(list(folder.iterdir())) == 1
    predictors = copy / "scores" / "predictors.py"
    source = predictors.read_text()
    assert source.count("return 1 / (1 + external)") == 1
    predictors.write_text(source.replace("return 1 / (1 + external)", "return 2 / (1 + external)"))
    assert score(folder) == score("") != before
    assert len(list(folder.iterdir())) == 2


def test_a_digest_of_sources_changes_with_any_of_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("one_of_two", "two_of_two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    digests = {cache.sources("one_of_two", "two_of_two"), cache.sources("one_of_two"), cache.sources("two_of_two")}
    for content in ("a = 1", "a = 2"):
        (tmp_path / "two_of_two" / "part.py").write_text(content)
        digests.add(cache.sources("one_of_two", "two_of_two"))
    (tmp_path / "two_of_two" / "note.txt").write_text("")
    digests.add(cache.sources("one_of_two", "two_of_two"))
    assert len(digests) == 5
    assert None not in digests


def test_sources_are_read_from_an_archive_and_nothing_stands_for_those_that_cannot_be(tmp_path, monkeypatch):
    source = tmp_path / "source.py"
    source.write_text("a = 1")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.write(source, "archived_package/__init__.py")
    (tmp_path / "compiled_package").mkdir()
    py_compile.compile(str(source), cfile=str(tmp_path / "compiled_package" / "__init__.pyc"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "archive.zip")
    assert importlib.import_module("compiled_package").a == importlib.import_module("archived_package").a == 1
    assert cache.sources("archived_package") is not None
    assert cache.sources("compiled_package") is None
    assert cache.sources("archived_package", "compiled_package") is None


def test_without_sources_nothing_is_kept(folder, monkeypatch):
    mask = torch.rand(4, 4, 3, 3) < 0.4
    with monkeypatch.context() as patch:
        patch.setattr("chtconv.scores.patterns._SOURCES", None)
        without = chtconv.link_scores(mask, 8, padding=1)
    assert not list(folder.iterdir())
    pattern_table.cache_clear()
    assert torch.equal(chtconv.link_scores(mask, 8, padding=1), without)


def test_many_processes_may_write_at_once(folder):
    code = (
        "import torch, chtconv; torch.set_num_threads(1); mask = torch.ones(2, 2, 3, 3).bool(); mask[0, 0, 0] = False;"
        "print(chtconv.link_scores(mask, 8, padding=1).sum().item())"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(3)]
    results = {process.communicate()[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(results) == 1
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]
