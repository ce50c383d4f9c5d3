"""Folders of every kind and in every state are read, and what is wrong with them is said."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from chtconv import ConfigurationError
from chtconv.report.page import page
from chtconv.report.reading import read
from chtconv.report.run import Comparison, Run


def by_state(comparison: Comparison) -> dict[str, Run]:
    return {run.state: run for run in comparison.runs}


def test_a_comparison_has_its_cells_in_their_states(comparison: Path) -> None:
    (found,) = read(comparison)
    states = [run.state for run in found.runs]
    assert states == ["done"] * 13 + ["running", "stopped", "failed", "unreadable", "waiting"]
    runs = by_state(found)
    assert runs["running"].reason == runs["stopped"].reason == "2 of 2 epochs"
    assert runs["failed"].reason.startswith("the loss is not finite")
    assert "config.json cannot be read" in runs["unreadable"].reason
    assert (runs["waiting"].variant, runs["waiting"].sparsity, runs["waiting"].seed) == ("CHTs", 0.9, 9)


def test_groups_are_the_runs_of_a_variant_and_sparsity(comparison: Path) -> None:
    (found,) = read(comparison)
    sizes = {(group.variant[:8], group.sparsity): len(group.done) for group in found.groups}
    assert sizes == {
        ("dense", 0.0): 1, ("SET", 0.8): 2, ("CHTs", 0.8): 2, ("<script>", 0.8): 2,
        ("SET", 0.9): 2, ("CHTs", 0.9): 2, ("<script>", 0.9): 2,
    }  # fmt: skip
    assert found.variants[:2] == ["dense", "SET"]


def test_plain_runs_are_named_after_what_they_differ_in(plain: Path) -> None:
    (found,) = read(plain)
    assert sorted(run.variant for run in found.runs) == ["CHTs", "SET", "dense"]
    config = json.loads((plain / "chts" / "config.json").read_text())
    other = plain / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"graph": "layer", "seed": 3}))
    (found,) = read(plain)
    variants = {run.name: run.variant for run in found.runs}
    assert variants == {"chts": "CHTs, kernel graph", "other": "CHTs, layer graph", "set": "SET", "dense": "dense"}


def test_runs_of_other_data_or_training_are_another_comparison(plain: Path) -> None:
    config = json.loads((plain / "set" / "config.json").read_text())
    for name, values in {"long": {"epochs": 50}, "elsewhere": {"dataset": "/somewhere/private/cifar10"}}.items():
        (plain / name).mkdir()
        (plain / name / "config.json").write_text(json.dumps(config | values))
    found = {comparison.title: {run.name for run in comparison.runs} for comparison in read(plain)}
    assert found == {
        "digits, vgg16, epochs 2": {"set", "chts", "dense"},
        "digits, vgg16, epochs 50": {"long"},
        "cifar10, vgg16, epochs 2": {"elsewhere"},
    }


def test_what_was_run_twice_counts_once(plain: Path) -> None:
    shutil.copytree(plain / "set", plain / "set-again")
    for file in ("config.json", "summary.json"):
        text = (plain / "set-again" / file).read_text()
        (plain / "set-again" / file).write_text(text.replace('"threads": null', '"threads": 7'))
    (found,) = read(plain)
    assert sorted(run.name for run in found.runs) == ["chts", "dense", "set-again"]
    assert found.notes == ["set is left out: set-again is the same run."]
    assert "set is left out: set-again is the same run." in page([found])


def test_a_single_run_and_a_folder_of_comparisons(set_run: Path, comparison: Path, tmp_path: Path) -> None:
    assert [run.state for run in read(set_run)[0].runs] == ["done"]
    both = tmp_path / "both"
    both.mkdir()
    (both / "one").symlink_to(comparison)
    (both / "two").symlink_to(comparison)
    assert len(read(both)) == 2


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_where_there_is_no_run_it_is_said_what_is_accepted(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match=r"accepted is .* chtconv compare, table1 or train wrote"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl", "evolution.jsonl"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]\n", b"\xff\xfe", b"{}\n", b'{"epoch": "x", "evolution": []}\n'])
def test_a_damaged_file_is_said_or_done_without(name: str, content: bytes, set_run: Path) -> None:
    (set_run / name).write_bytes(content)
    (run,) = read(set_run)[0].runs
    assert run.state in ("done", "unreadable", "stopped")
    assert name in run.reason or run.state == "done" or (name, content) == ("summary.json", b"{}\n")
    if name.endswith(".jsonl") and content in (b"{", b"[]\n", b"\xff\xfe"):
        assert name in run.reason


def test_a_lock_whose_process_is_gone_is_a_run_that_stopped(set_run: Path) -> None:
    (set_run / "summary.json").unlink()
    (set_run / "checkpoint.pt").touch()
    process = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(process, 0)
    (set_run / ".lock").write_text(str(process))
    (run,) = read(set_run)[0].runs
    assert run.state == "stopped"
    assert f"process {process}" in run.reason


def test_a_mark_of_the_session_tells_that_a_cell_runs_on_another_machine(plain: Path) -> None:
    (plain / "set" / "summary.json").unlink()
    cells = {"set": {"variant": "SET", "method": "set", "sparsity": 0.9, "seed": 0, "epochs": 2}}
    (plain / "comparison.json").write_text(json.dumps({"recipe": "quick", "shared": {}, "cells": cells}))
    mark = plain / ".session-1234" / "set"
    mark.parent.mkdir()
    mark.touch()
    assert by_state(read(plain)[0])["running"].name == "set"
    for path in (plain / "set").iterdir():
        path.unlink()
    assert by_state(read(plain)[0])["running"].reason == "0 of 2 epochs"
    os.utime(mark, (time.time() - 1000,) * 2)
    assert "running" not in by_state(read(plain)[0])


def test_cells_name_folders_of_the_comparison_only(set_run: Path) -> None:
    folder = set_run.parent / "comparison"
    folder.mkdir()
    cells = {name: {"variant": "SET"} for name in ("../set", "..", "", "a\0b", "/etc")}
    (folder / "comparison.json").write_text(json.dumps({"cells": cells}))
    assert read(folder)[0].runs == ()
