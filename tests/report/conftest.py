"""A small comparison: three trained runs, copies of them as further seeds, and one run in every other state."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chtconv.report.page import page
from chtconv.report.reading import read
from chtconv.training import Config, train

HOSTILE = '<script>alert(1)</script> & "quotes" $x^2$ \x00\ud800'
TINY = {
    "width": 1 / 16,
    "head": 16,
    "epochs": 2,
    "batch_size": 512,
    "evolutions_per_epoch": 2.0,
    "threads": 1,
    "device": "cpu",
}
TRAINED = {
    "dense": {"method": "dense", "sparsity": 0.0},
    "SET": {"method": "set", "sparsity": 0.9},
    "CHTs": {"method": "chts", "sparsity": 0.9},
}


def change(path: Path, **values: Any) -> None:
    """Replace values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three run folders, as plain as chtconv train leaves them."""
    folder, before = tmp_path_factory.mktemp("report") / "plain", torch.get_num_threads()
    torch.set_num_threads(1)
    for name, values in TRAINED.items():
        train(Config().replace(**TINY, **values), folder / name.lower())
    torch.set_num_threads(before)
    return folder


@pytest.fixture
def plain(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained runs, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "plain"))


@pytest.fixture
def set_run(plain: Path) -> Path:
    return plain / "set"


def again(source: Path, target: Path, **values: Any) -> None:
    """The same run under another configuration, its accuracy a little different."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | values
    rows = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"test_accuracy": row["test_accuracy"] - 0.01 * config["seed"]} for row in rows]
    (target / "config.json").write_text(json.dumps(config))
    (target / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = rows[-1]["test_accuracy"]
    # Of this speed the axis ends right behind a label.
    values = {"test_accuracy": last, "best_test_accuracy": last, "images_per_second": 3250.0}
    change(target / "summary.json", config=config, seed=config["seed"], **values)


@pytest.fixture(scope="session")
def comparison(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sparsities, two seeds, a hostile name, and a run in every state but done."""
    folder = tmp_path_factory.mktemp("comparison") / "mine"
    folder.mkdir()
    cells: dict[str, dict[str, Any]] = {}

    def cell(variant: str, sparsity: float, seed: int, **values: Any) -> Path:
        method = TRAINED.get(variant, TRAINED["CHTs"])["method"]
        name = f"{method}-{len(cells)}"
        cells[name] = {"variant": variant, "method": method, "sparsity": sparsity, "seed": seed, "epochs": 2}
        return folder / name

    again(trained / "dense", cell("dense", 0.0, 0), seed=0)
    for seed in (0, 1):
        for sparsity in (0.8, 0.9):
            again(trained / "set", cell("SET", sparsity, seed), seed=seed, sparsity=sparsity)
            again(trained / "chts", cell("CHTs", sparsity, seed), seed=seed, sparsity=sparsity)
            again(trained / "chts", cell(HOSTILE, sparsity, seed), seed=seed, sparsity=sparsity, zeta=0.2)
    unfinished(trained, cell)
    (folder / "comparison.json").write_text(json.dumps({"recipe": "quick", "shared": {"epochs": 2}, "cells": cells}))
    return folder


def unfinished(trained: Path, cell: Callable[..., Path]) -> None:
    """Cells that are running, stopped, failed, unreadable and not begun."""
    states = ("running", "stopped", "failed", "unreadable")
    for seed, state in enumerate(states, 2):
        target = cell("SET", 0.9, seed)
        again(trained / "set", target, seed=seed)
        (target / "summary.json").unlink()
        if state == "running":
            (target / ".lock").write_text(str(os.getpid()))
        if state == "stopped":
            (target / "checkpoint.pt").touch()
        if state == "failed":
            failure = {"reason": f"the loss is not finite {HOSTILE} {'x' * 200}", "at": "2026-11-24T03:00:00+00:00"}
            (target / "failure.json").write_text(json.dumps(failure))
        if state == "unreadable":
            (target / "config.json").write_text("{")
    cell("CHTs", 0.9, 9)


@pytest.fixture(scope="session")
def hostile() -> str:
    """A name of a variant that breaks what is not escaped."""
    return HOSTILE


@pytest.fixture(scope="session")
def html(comparison: Path) -> str:
    """The page of the comparison."""
    return page(read(comparison))
