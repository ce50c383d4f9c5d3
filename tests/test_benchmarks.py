"""What the benchmarks measure by names of functions must still be there, and add up."""

import importlib
import importlib.util
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import chtconv

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("graph", ["kernel", "layer"])
def test_the_stages_of_an_evolution_are_all_there_and_within_its_time(graph, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    stages = importlib.import_module("stages")
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    topology = chtconv.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), method="chts", graph=graph)
    model(torch.zeros(1, 3, 8, 8))
    original = chtconv.topology.evolve
    start = time.perf_counter()
    spent = stages.seconds_by_stage(lambda: topology.evolve(), lambda: None, 1)
    assert list(spent) == list(stages.STAGES)
    assert all(seconds > 0 for seconds in spent.values())
    assert sum(spent.values()) < time.perf_counter() - start
    assert chtconv.topology.evolve is original
    assert topology.evolutions == 1


def test_the_table_of_stages_shows_shares(monkeypatch):
    spec = importlib.util.spec_from_file_location("tables", ROOT / "experiments" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    rows = [
        {"graph": graph, "ratio": 0.25, "stages": {"removal": a, "top-k": 1.0}} for graph, a in (("A", 3), ("B", 1))
    ]
    lines = [{"benchmark": "link_prediction", "rows": rows}, {"benchmark": "link_prediction", "rows": [{"ratio": 1}]}]
    monkeypatch.setattr(tables, "read", lambda name: lines)
    table = tables.stages().splitlines()
    assert table[0] == "| stage of an evolution | A graph | B graph |"
    assert "| removal | 75.0% | 50.0% |" in table
    assert "| seconds, profiled | 4 | 2 |" in table
