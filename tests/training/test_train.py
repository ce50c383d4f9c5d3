"""Whole runs on the digits: what they write, that they repeat bit for bit, and how they stop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from chtconv.data import load_dataset
from chtconv.files import StorageError
from chtconv.models import build_model
from chtconv.training import Config, OutOfTime, TrainingDiverged, environment, loop, train
from chtconv.training.device import seed_dropout
from chtconv.training.run import prepare
from chtconv.training.run_folder import RunFolder

TIMES = {"seconds", "evolution_seconds", "evaluation_seconds", "images_per_second"}


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def metrics_without_times(folder: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row.keys() - TIMES} for row in rows(folder, "metrics.jsonl")]


def assert_same_bits(one: Path, two: Path) -> None:
    for name in ("model.safetensors", "masks.safetensors", "evolution.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert metrics_without_times(one) == metrics_without_times(two)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any]) -> Path:
    """A run of CHTs at 90 % with a validation split, from start to end."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(Config().replace(**tiny_values, validation=100), folder)
    return folder


def test_the_folder_holds_exactly_the_files_of_a_complete_run(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        *("config.json", "evolution.jsonl", "masks.safetensors", "metrics.jsonl", "model.safetensors", "summary.json"),
    ]


def test_weights_load_into_the_plain_model_and_are_zero_off_the_masks(finished: Path, tiny: Config) -> None:
    weights, masks = load_file(finished / "model.safetensors"), load_file(finished / "masks.safetensors")
    model = build_model("vgg16", 10, seed=5, width=tiny.network.width, head=tiny.network.head)
    model.load_state_dict(weights, strict=True)
    convolutions = {f"{name}.weight" for name, one in model.named_modules() if isinstance(one, torch.nn.Conv2d)}
    assert set(masks) == convolutions
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert weights[name][~mask].count_nonzero() == 0
        assert set(mask.flatten(1).sum(1).tolist()) == {round(0.1 * mask[0].numel())}


def test_recorded_accuracy_is_that_of_the_stored_weights(finished: Path, tiny: Config) -> None:
    model = build_model("vgg16", 10, seed=5, width=tiny.network.width, head=tiny.network.head).eval()
    model.load_state_dict(load_file(finished / "model.safetensors"))
    data = load_dataset("digits", validation=100, seed=0)
    for name in ("validation", "test"):
        images = getattr(data, name)
        pixels = (images.images.double() / 255 - data.mean.view(3, 1, 1)) / data.std.view(3, 1, 1)
        with torch.no_grad():
            logits = model(pixels.float())
        row = rows(finished, "metrics.jsonl")[-1]
        assert row[f"{name}_accuracy"] == (logits.argmax(1) == images.labels).double().mean().item()
        assert row[f"{name}_loss"] == pytest.approx(functional.cross_entropy(logits, images.labels).item(), rel=1e-4)


def test_metrics_and_summary_agree(finished: Path) -> None:
    metrics, summary = rows(finished, "metrics.jsonl"), json.loads((finished / "summary.json").read_text())
    assert [row["epoch"] for row in metrics] == [1, 2, 3]
    assert summary["test_accuracy"] == metrics[-1]["test_accuracy"]
    assert summary["best_test_accuracy"] == max(row["test_accuracy"] for row in metrics)
    chosen = next(row for row in metrics if row["epoch"] == summary["best_validation_epoch"])
    assert chosen["validation_accuracy"] == max(row["validation_accuracy"] for row in metrics)
    assert summary["test_accuracy_at_best_validation"] == chosen["test_accuracy"]
    assert summary["seconds"] == pytest.approx(sum(row["seconds"] for row in metrics))
    assert summary["dataset"] == {"name": "digits", "classes": 10, "train": 1337, "validation": 100, "test": 360}
    assert 0 < summary["evolution_seconds"] < summary["seconds"]
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["hardware"]["threads"] == 1
    assert summary["hardware"]["instructions"] == torch.backends.cpu.get_cpu_capability()


def test_sparsity_is_counted_from_the_masks(finished: Path) -> None:
    masks, summary = load_file(finished / "masks.safetensors"), json.loads((finished / "summary.json").read_text())
    weights = load_file(finished / "model.safetensors")
    size, links = (sum(int(count(mask)) for mask in masks.values()) for count in (torch.numel, torch.count_nonzero))
    parameters = sum(tensor.numel() for name, tensor in weights.items() if "running" not in name and "num_" not in name)
    assert summary["sparsity"] == pytest.approx(1 - links / size)
    assert summary["sparsity_all_parameters"] == pytest.approx((size - links) / parameters)
    for name, row in summary["layers"].items():
        assert (row["links"], row["size"]) == (int(masks[name].sum()), masks[name].numel())


def test_evolution_has_a_line_a_layer_and_evolution_at_the_scheduled_steps(finished: Path) -> None:
    records, summary = rows(finished, "evolution.jsonl"), json.loads((finished / "summary.json").read_text())
    # 6 batches an epoch, two evolutions in each, none from three quarters of the 18 steps on: 13.5, rounded to 14.
    assert sorted({row["step"] for row in records}) == [3, 6, 9, 12]
    assert len(records) == 4 * 13 == summary["evolutions"] * len(summary["layers"])
    for name, row in summary["layers"].items():
        own = [record for record in records if record["layer"] == name]
        assert row["removed"] == sum(record["removed"] for record in own)
        assert row["removed"] == row["regrown"] + row["rechosen"]


def test_same_seed_same_bits_whatever_was_drawn_before(finished: Path, tiny: Config, tmp_path: Path) -> None:
    torch.rand(5)
    train(tiny.replace(validation=100), tmp_path)
    assert_same_bits(finished, tmp_path)


@pytest.mark.parametrize("when", [{"epochs": 1}, {"steps": 9}, {"steps": 13}])
def test_resumed_equals_uninterrupted(
    finished: Path, tiny: Config, tmp_path: Path, stop: Any, when: dict[str, int]
) -> None:
    config = tiny.replace(validation=100)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, progress=stop(**when))
    assert (tmp_path / "checkpoint.pt").exists()
    assert not (tmp_path / "summary.json").exists()
    torch.rand(5)
    train(config, tmp_path, resume=True)
    assert_same_bits(finished, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_resume_cuts_the_tables_back_to_the_checkpoint(finished: Path, tiny: Config, tmp_path: Path, stop: Any) -> None:
    config = tiny.replace(validation=100)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, progress=stop(epochs=1))
    for name in ("metrics.jsonl", "evolution.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write((finished / name).read_text())
    train(config, tmp_path, resume=True)
    assert_same_bits(finished, tmp_path)


def test_a_run_of_which_only_the_results_are_missing_is_resumed(
    finished: Path, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: no step is left to take, and none is needed."""

    def full(*_: object) -> None:
        raise StorageError("cannot write model.safetensors: the disk is full")

    config = tiny.replace(validation=100)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", full)
        with pytest.raises(StorageError, match="the disk is full"):
            train(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    found, expected = train(config, tmp_path, resume=True), json.loads((finished / "summary.json").read_text())
    same = ("test_accuracy", "flops", "sparsity", "itop", "evolutions")
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}


def test_resume_of_a_complete_run_gives_its_summary_and_changes_nothing(finished: Path, tiny: Config) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    summary = train(tiny.replace(validation=100), finished, resume=True)
    assert summary == json.loads((finished / "summary.json").read_text())
    assert before == {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}


@pytest.mark.parametrize("changes", [{"optimizer": "adam", "lr": 1e-3}, {"precision": "bf16"}, {"method": "dense"}])
def test_other_forms_of_training_resume_bit_for_bit_too(
    tiny: Config, tmp_path: Path, stop: Any, changes: dict[str, Any]
) -> None:
    config = tiny.replace(**changes, epochs=2)
    train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", progress=stop(epochs=1))
    train(config, tmp_path / "parts", resume=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def test_a_resumed_run_names_all_that_it_was_computed_with(
    tiny: Config, tmp_path: Path, stop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit_is(revision: str) -> dict[str, Any]:
        commit = {"revision": revision, "dirty": False}
        monkeypatch.setattr(environment, "commit", lambda: commit)
        return commit

    config = tiny.replace(epochs=4)
    first = commit_is("a")
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path, resume=resume, progress=stop(epochs=1))
    second = commit_is("b")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, resume=True, progress=stop(epochs=1))
    commit_is("a")
    summary = train(config, tmp_path, resume=True)
    assert summary["commit"] == first
    assert [each["commit"] for each in summary["earlier"]] == [second]
    assert summary["earlier"][0]["versions"] == summary["versions"]


def test_methods_of_one_seed_start_from_the_same_weights_masks_and_images(tiny: Config) -> None:
    one, two, dense = (prepare(tiny.replace(method=method)) for method in ("set", "chts", "dense"))
    weights, others, full = (run.model.state_dict() for run in (one, two, dense))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert all(torch.equal(mask, two.masks()[name]) for name, mask in one.masks().items())
    assert all(torch.equal(full[name] * mask, weights[name]) for name, mask in one.masks().items())
    for run in (two, dense):
        for ours, theirs in zip(next(one.batches.epoch(0)), next(run.batches.epoch(0)), strict=True):
            assert torch.equal(ours, theirs)


def test_seeds_differ(tiny: Config) -> None:
    one, two = (prepare(tiny.replace(seed=seed)) for seed in (14, 15))
    name = "features.3.weight"
    assert not torch.equal(one.masks()[name], two.masks()[name])
    assert not torch.equal(next(one.batches.epoch(0))[1], next(two.batches.epoch(0))[1])


def test_dense_run_has_no_masks_and_no_evolution(tiny: Config, tmp_path: Path) -> None:
    summary = train(tiny.replace(method="dense", epochs=1), tmp_path)
    assert (summary["sparsity"], summary["evolutions"], summary["layers"]) == (0.0, 0, {})
    assert load_file(tmp_path / "masks.safetensors") == {}
    assert (tmp_path / "evolution.jsonl").read_text() == ""
    assert summary["test_accuracy_at_best_validation"] is None


def test_only_the_named_layers_are_sparse(tiny: Config) -> None:
    layers = prepare(tiny.replace(layers="features.3,features.4*")).masks()
    assert set(layers) == {"features.3.weight", "features.40.weight"}


def test_divergence_names_epoch_and_step_and_leaves_nothing_before_the_first_epoch(
    tiny: Config, tmp_path: Path
) -> None:
    with pytest.raises(TrainingDiverged, match=r"not finite in epoch 1, step [2-6] of 6; no epoch was complete"):
        train(tiny.replace(lr=1e30, warmup_epochs=0.0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_divergence_keeps_the_last_whole_epoch(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "learning_rate", lambda step, *_: 0.01 if step < 12 else 1e30)
    with pytest.raises(TrainingDiverged, match=r"in epoch 3, step [2-6] of 6; epoch 2 is kept in .*; a lower --lr"):
        train(tiny, tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 2
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert [row["epoch"] for row in rows(tmp_path, "metrics.jsonl")] == [1, 2]


def test_surroundings_are_as_before(tiny: Config, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    torch.set_num_threads(2)
    train(tiny.replace(epochs=1), tmp_path)
    assert torch.equal(torch.rand(2), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.get_num_threads() == 2


def test_training_loss_is_the_mean_over_images_not_batches(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace(epochs=1, lr=1e-12, weight_decay=0.0, dropout=0.0, method="dense", batch_size=1000)
    train(config, tmp_path)
    run = prepare(config)
    batches = [(run.model(images), labels) for images, labels in run.batches.epoch(0)]
    assert [len(labels) for _, labels in batches] == [1000, 437]
    total = sum(functional.cross_entropy(logits, labels, reduction="sum").item() for logits, labels in batches)
    right = sum(int((logits.argmax(1) == labels).sum()) for logits, labels in batches)
    row = rows(tmp_path, "metrics.jsonl")[0]
    assert row["train_loss"] == pytest.approx(total / 1437, rel=1e-4)
    assert row["train_accuracy"] == right / 1437


def test_dropout_draws_anew_in_every_epoch_and_the_same_in_a_resumed_one() -> None:
    def draw(epoch: int) -> torch.Tensor:
        seed_dropout(14, epoch, torch.device("cpu"))
        return torch.rand(8)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(0), draw(1))


def test_a_run_stops_in_time_and_goes_on(
    tmp_path: Path, finished: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With epochs of a minute and a deadline in a minute and a half: the first is kept, the second not begun."""
    config, now = tiny.replace(validation=100), [0.0]
    monkeypatch.setattr(loop.time, "time", lambda: now[0])
    original = loop._epoch

    def an_epoch_of_a_minute(*arguments: Any) -> dict[str, Any]:
        now[0] += 60.0
        return original(*arguments) | {"seconds": 50.0, "evaluation_seconds": 10.0}

    monkeypatch.setattr(loop, "_epoch", an_epoch_of_a_minute)
    with pytest.raises(OutOfTime, match=r"no time for epoch 2 of 3; epoch 1 is kept in"):
        train(config, tmp_path / "run", deadline=90.0)
    assert now == [60.0]
    train(config, tmp_path / "run", resume=True, deadline=60.0 + 121.0)
    assert_same_bits(tmp_path / "run", finished)


def test_no_epoch_is_begun_after_the_deadline(tmp_path: Path, tiny: Config) -> None:
    with pytest.raises(OutOfTime, match="nothing was kept"):
        train(tiny, tmp_path / "run", deadline=0.0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["dense", "rigl", "gmp"])
def test_flops_are_those_of_the_layers(tmp_path: Path, tiny: Config, method: str) -> None:
    """Counted from shapes, links and maps alone: 32x32 halved after 2, 4, 7, 10 convolutions."""
    config = tiny.replace(method=method, sparsity=0.0 if method == "dense" else 0.8)
    summary = train(config, tmp_path / "run")
    weights, found = load_file(tmp_path / "run" / "model.safetensors"), summary["flops"]
    convolutions = sorted(
        (name for name in weights if weights[name].dim() == 4), key=lambda name: int(name.split(".")[1])
    )
    places = {name: 1 for name in weights if weights[name].dim() == 2}
    places |= zip(convolutions, (size**2 for size in (32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2)), strict=True)
    dense = {name: 2 * weights[name].numel() * number for name, number in places.items()}
    now = {
        name: 2 * summary["layers"].get(name, {"links": weights[name].numel()})["links"] * places[name]
        for name in dense
    }
    images = 3 * summary["dataset"]["train"]
    assert found["dense_inference"] == sum(dense.values())
    assert found["inference"] == pytest.approx(sum(now.values()))
    assert found["dense_training"] == pytest.approx(3 * images * sum(dense.values()))
    if method == "dense":
        assert found["training"] == found["dense_training"]
    elif method == "rigl":
        dense_steps = summary["evolutions"] / summary["steps"]
        extra = dense_steps * (sum(dense.values()) - sum(now.values()))
        assert found["training"] == pytest.approx(images * (3 * sum(now.values()) + extra))
    else:  # dense at first, at its final sparsity in the end
        assert 3 * images * sum(now.values()) < found["training"] < found["dense_training"]
