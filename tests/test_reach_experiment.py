"""What link prediction reaches in masks, as experiments/reach.py adds it to its results."""

import json

import chtconv
from chtconv.training import recipe, train


def test_masks_of_complete_runs_are_measured_once(experiments, tmp_path, monkeypatch):
    reach, results = experiments("reach"), tmp_path / "reach.jsonl"
    monkeypatch.setattr(reach, "WIDTHS", (0.1,))
    monkeypatch.setattr(reach, "SPARSITIES", (0.5, 0.98))
    quick = recipe("quick").replace(width=0.1, epochs=1, method="set", sparsity=0.8, device="cpu")
    quick = quick.replace(evolutions_per_epoch=3, zeta_schedule="cosine")
    train(quick, tmp_path / "runs" / "first")
    train(quick.replace(allocation="layer"), tmp_path / "runs" / "second")
    train(quick.replace(method="dense"), tmp_path / "runs" / "dense")
    (tmp_path / "runs" / "begun").mkdir()
    for folders in ([], ["runs/first"], ["runs"], ["runs", "elsewhere"]):
        words = ["reach.py", *[str(tmp_path / each) for each in folders], "--results", str(results), "--seeds", "3"]
        monkeypatch.setattr("sys.argv", words)
        reach.main()
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["masks"] for line in lines] == ["random", "random", "SET", "SET, allocation layer"]
    assert [line["configuration"]["sparsity"] for line in lines] == [0.5, 0.98, 0.8, 0.8]
    dense, sparse = ([layer["reach"] for layer in line["layers"].values()] for line in lines[:2])
    assert min(dense) > 0.5
    assert max(sparse[:2]) == 0


def test_reach_is_the_share_of_free_places_in_slices_with_links_that_have_a_score(experiments):
    reach = experiments("reach")
    layers = reach.random_masks(0.25, 0.9, 0)
    found = reach.measured(layers)["features.3.weight"]
    layer = layers["features.3.weight"]
    scores = chtconv.link_scores(layer.mask, layer.input_size, padding=1, windows="all")
    beside = ~layer.mask & layer.mask.flatten(2).any(2)[..., None, None]
    assert layer.input_size == (32, 32)
    assert found["links"] == layer.mask.sum()
    assert 0 < found["reach"] < 1
    assert found["reach"] == scores[beside].gt(0).sum().item() / beside.sum().item()
