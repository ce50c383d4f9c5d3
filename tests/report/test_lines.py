"""Cells of which only a line of results is left, in the folder of the comparison or in a file of one's choice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chtconv import ConfigurationError
from chtconv.cli import main
from chtconv.comparison.folder import ComparisonFolder, read_rows
from chtconv.comparison.grid import AXES, Grid
from chtconv.comparison.result import result_line, same_run
from chtconv.report.page import page
from chtconv.report.reading import read
from chtconv.report.results import results, run_list
from chtconv.report.run import Run
from chtconv.training.recipes import recipe

Write = Callable[..., Path]


@pytest.fixture
def line(trained: Path) -> dict[str, Any]:
    """The line of the SET run, as chtconv compare writes it."""
    run = trained / "set"
    rows = [read_rows(run / name) for name in ("metrics.jsonl", "evolution.jsonl")]
    return result_line(json.loads((run / "summary.json").read_text()), *rows, "SET")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A comparison of one cell, without a run folder."""
    folder = tmp_path / "comparison"
    folder.mkdir()
    cells = {"gone": {"variant": "SET", "method": "set", "sparsity": 0.9, "seed": 0, "epochs": 2}}
    stored = {"recipe": "quick", "shared": {"batch_size": 512, "dataset": "digits"}, "cells": cells}
    (folder / "comparison.json").write_text(json.dumps(stored))
    return folder


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def changed(line: dict[str, Any], accuracy: float | None = None, **values: Any) -> dict[str, Any]:
    new = {} if accuracy is None else {"test_accuracy": accuracy}
    return line | new | {"config": line["config"] | values}


def gone(folder: Path, file: Path | None = None) -> Run:
    (found,) = read(folder, file)
    assert found.notes == []
    (run,) = found.runs
    return run


def test_a_cell_whose_folder_is_gone_is_taken_from_its_line(folder: Path, line: dict[str, Any]) -> None:
    write(folder / "results.jsonl", changed(line, seed=1), line)
    run = gone(folder)
    assert (run.state, run.reason, run.summary["itop"]) == ("done", "from its line of results", line["itop"])
    assert [row["test_accuracy"] for row in run.metrics] == line["curve"]["test_accuracy"]


def test_the_tables_have_what_the_line_says_of_the_evolution(folder: Path, line: dict[str, Any]) -> None:
    write(folder / "results.jsonl", line)
    (table,), problems = results(read(folder))
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert (row["new"], problems) == (f"{1 - line['evolution']['rechosen']:.2f}", [])
    found = page(read(folder))
    assert found.count("Of 1 of 1 only the line of results is left.") == 3


def test_lines_in_another_file_are_found_where_it_is_named(folder: Path, line: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path / "mine.jsonl", line)
    assert (gone(folder).state, gone(folder, file).state) == ("waiting", "done")
    with pytest.raises(ConfigurationError, match=r"is no file: accepted is one that chtconv compare wrote"):
        read(folder, tmp_path / "absent.jsonl")


def test_of_two_lines_of_a_run_the_later_one_counts(folder: Path, line: dict[str, Any]) -> None:
    write(folder / "results.jsonl", line, changed(line, 0.5, threads=2))
    assert gone(folder).summary["test_accuracy"] == 0.5


def test_a_line_of_other_shared_values_is_not_that_of_the_cell(folder: Path, line: dict[str, Any]) -> None:
    write(folder / "results.jsonl", changed(line, batch_size=64))
    assert gone(folder).state == "waiting"


def test_lines_of_different_runs_under_one_name_are_not_taken(folder: Path, line: dict[str, Any]) -> None:
    write(folder / "results.jsonl", line, changed(line, zeta=0.5))
    run = gone(folder)
    assert (run.state, run.reason) == ("waiting", "2 lines of results have its name, of different runs")


def test_a_line_is_that_of_a_cell_whatever_each_is_called(tmp_path: Path, line: dict[str, Any]) -> None:
    """As ``compare`` itself finds it."""
    usual = recipe("quick").to_dict()
    fixed = {name: line["config"][name] for name in usual if name not in (*AXES, "dataset", "device")}
    own = {name: line["config"][name] for name in AXES if line["config"][name] != usual[name] and name != "seed"}
    variants = {"mine": own, "other": own | {"zeta": 0.5}}
    grid = Grid("quick", shared=fixed, axes={"seed": (line["config"]["seed"],)}, variants=variants)
    with ComparisonFolder(tmp_path / "comparison").opened(grid) as cells:
        assert [same_run(cell.config.to_dict(), line["config"]) for cell in cells] == [True, False]
    older = {name: value for name, value in line.items() if name != "variant"}
    for each in (line | {"variant": "theirs"}, older, line | {"variant": "other"}):
        (found,) = read(tmp_path / "comparison", write(tmp_path / "all.jsonl", each))
        assert [(run.variant, run.state) for run in found.runs] == [("mine", "done"), ("other", "waiting")]


def test_a_line_that_is_no_text_hides_no_other(tmp_path: Path, line: dict[str, Any]) -> None:
    file = write(tmp_path / "mine.jsonl", line)
    file.write_bytes(b'{"note": "caf\xe9"}\n' + file.read_bytes())
    (found,) = read(file)
    assert found.notes == ["1 of 2 lines of mine.jsonl cannot be read"]


def test_in_a_screening_runs_are_listed_with_their_accuracy_on_held_out_images(
    folder: Path, line: dict[str, Any]
) -> None:
    curve = {"test_accuracy": [0.1, 0.2], "validation_accuracy": [0.3, 0.4567]}
    write(folder / "results.jsonl", changed(line, validation=100) | {"curve": curve, "validation_accuracy": 0.4567})
    found = page(read(folder))
    assert "accuracy on held-out images, %</th>" in found
    assert "test accuracy, %" not in found
    assert '<td class="number">45.67</td>' in found


def test_a_file_of_results_alone_has_tables_and_curves(
    tmp_path: Path, line: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(
        tmp_path / "mine.jsonl",
        changed(line, 0.2),
        line,  # of the same run, later
        changed(line, 0.9, seed=1, sparsity=0.8),
        changed(line, 0.7, epochs=9),
        {"config": {"method": "set", "frobnication": 1}},
        {"note": "none"},
    )
    with file.open("a") as stream:
        stream.write("{\n")
    first, other = read(file)
    assert [(run.name, run.summary["test_accuracy"]) for run in first.runs] == [
        ("set-0.9-seed0", line["test_accuracy"]),
        ("set-0.8-seed1", 0.9),
    ]
    assert [run.config["epochs"] for run in other.runs] == [9]
    assert first.notes == ["1 of 7 lines of mine.jsonl cannot be read", "2 lines of mine.jsonl are none of results"]
    assert main(["report", str(file)]) == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'mine.html'}\n"
    html = (tmp_path / "mine.html").read_text()
    assert html.count("from its line of results") == 3
    assert "Test accuracy against sparsity" in html


def test_two_forms_under_one_name_are_told_apart_as_in_the_tables(tmp_path: Path, line: dict[str, Any]) -> None:
    """A variant whose values were changed, with lines of before in the same file."""
    lines = [changed(line, 0.5 + 0.01 * seed, seed=seed, zeta=zeta) for seed in (1, 2) for zeta in (0.3, 0.5)]
    chts = [changed(line, 0.7 + 0.02 * seed, seed=seed, method="chts") | {"variant": "CHTs,  mine"} for seed in (1, 2)]
    (found,) = read(write(tmp_path / "mine.jsonl", *lines, *chts))
    assert found.variants == ["SET, zeta 0.3", "SET, zeta 0.5", "CHTs, mine"]
    assert [len(group.done) for group in found.groups] == [2, 2, 2]
    assert "CHTs, mine minus SET, zeta 0.3 " in page([found])


def test_runs_of_other_precision_are_another_comparison(tmp_path: Path, line: dict[str, Any]) -> None:
    older = changed(line, seed=2)
    del older["config"]["precision"]  # what a configuration lacks is usual
    lines = [line, changed(line, precision="bf16"), changed(line, precision="float32", seed=1), older]
    found = {comparison.title: len(comparison.done) for comparison in read(write(tmp_path / "mine.jsonl", *lines))}
    assert found == {"digits, vgg16, precision float32": 3, "digits, vgg16, precision bf16": 1}


def test_older_lines_without_a_curve_keep_what_they_say_of_the_evolution(tmp_path: Path, line: dict[str, Any]) -> None:
    del line["curve"]
    found = read(write(tmp_path / "mine.jsonl", line))
    (table,), problems = results(found)
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert (row["new"], problems) == (f"{1 - line['evolution']['rechosen']:.2f}", [])
    assert page(found).count("Of 1 of 1 only the line of results is left.") == 3


CONTENTS = [b"", b"a\nb\n", b"{}\n", b"\xff", b'{"config": 3}\n', b'{"config": {}}\n', b'{"config": {"seed": []}}\n']


@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_without_results_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ConfigurationError, match="file holds no results: accepted are lines that chtconv compare"):
        read(tmp_path / "file")


def test_two_files_of_results_are_one_too_many(tmp_path: Path, line: dict[str, Any]) -> None:
    file = write(tmp_path / "mine.jsonl", line)
    with pytest.raises(ConfigurationError, match="is a file of results itself: --results goes with a folder only"):
        read(file, file)


def test_a_variant_is_called_as_its_last_line_calls_it(tmp_path: Path, line: dict[str, Any]) -> None:
    lines = [changed(line, 0.5, seed=seed) | {"variant": name} for seed, name in ((1, "SET"), (2, "SET again"))]
    (found,) = read(write(tmp_path / "mine.jsonl", *lines))
    assert found.variants == ["SET again"]
    assert [len(group.done) for group in found.groups] == [2]


def test_empty_lines_are_no_damage(tmp_path: Path, line: dict[str, Any]) -> None:
    file = write(tmp_path / "mine.jsonl", line)
    file.write_text("\n" + file.read_text() + "\n\n")
    (found,) = read(file)
    assert not found.notes


def test_a_line_without_a_curve_has_its_epochs(tmp_path: Path, line: dict[str, Any]) -> None:
    (found,) = read(write(tmp_path / "mine.jsonl", {key: line[key] for key in line if key != "curve"}))
    (row,) = run_list(found).rows
    epochs = line["config"]["epochs"]
    assert f"{epochs} of {epochs}" in row
