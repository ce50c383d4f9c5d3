"""The disk cache is a shortcut: with whatever is found there, the constants are right."""

import subprocess
import sys

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
