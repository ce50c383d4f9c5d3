"""Several processes on the gloo backend: what they find is what one process finds, and what differs is found out."""

import os
import subprocess
import sys

import distributed_worker as worker
import pytest
import torch

from chtconv.enforcement.distributed import assign
from chtconv.methods import METHODS

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs torch.distributed with the gloo backend",
)
SAVED = ("chts", "snfs", "rigl")


def launch(folder, ranks, *cases):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    result = subprocess.run(
        [*command, worker.__file__, str(folder), *cases],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CHTCONV_CACHE": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    errors = [path.read_text() for path in sorted(folder.glob("error-*.txt"))]
    assert result.returncode == 0, "\n".join(errors) or result.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two ranks found in all cases."""
    folder = tmp_path_factory.mktemp("two")
    for method in SAVED:
        torch.save(worker.saved(0, 1, lambda model: model, method), folder / f"half-{method}.pt")
    return launch(folder, 2)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """What three ranks found, of which some have less, or nothing, of a layer."""
    return launch(tmp_path_factory.mktemp("three"), 3, *worker.UNEQUAL)


def found(folder, case):
    """What each rank saved."""
    if worker.sharded(case) and not worker.SHARDS:
        pytest.skip("FSDP2 of this torch is not for a CPU")
    return [torch.load(path) for path in sorted(folder.glob(f"{case}-[23]-?.pt"))]


@pytest.fixture(scope="module")
def single():
    """What one process finds in batches that hold the parts of all ranks."""
    runs = {}

    def run(method, **options):
        key = (method, *options.items())
        if key not in runs:
            runs[key] = worker.run(method, **options)
        return runs[key]

    return run


def assert_same_masks(masks, expected):
    assert masks.keys() == expected.keys()
    for name, mask in masks.items():
        assert torch.equal(mask, expected[name]), name


def assert_same_run(each, expected):
    assert len(each["history"]) == len(expected["history"])
    for masks, those in zip(each["history"], expected["history"], strict=True):
        assert_same_masks(masks, those)
    assert each["records"] == expected["records"]
    assert each["stats"] == expected["stats"]
    for name, weight in each["weights"].items():
        torch.testing.assert_close(weight, expected["weights"][name], rtol=1e-9, atol=1e-11)


def changes(run):
    """Whether masks changed at each evolution, so that it says something that they agree."""
    return [
        any(not torch.equal(before[name], after[name]) for name in before)
        for before, after in zip(run["history"], run["history"][1:], strict=False)
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_find_what_one_process_finds(kind, method, two, single):
    expected = single(method)
    assert changes(expected) == [True] * (0 if method == "static" else worker.STEPS // worker.INTERVAL)
    for each in found(two, f"{kind}-{method}"):
        assert_same_run(each, expected)


@pytest.mark.parametrize("case", worker.UNEQUAL)
def test_three_ranks_find_it_too(case, three, single):
    ranks = found(three, case)
    assert len(ranks) == 3
    for each in ranks:
        assert_same_run(each, single(case.split("-")[1]))


@pytest.mark.parametrize(
    ("case", "method", "options"),
    [
        *((f"ddp-unshared-{method}", method, {}) for method in ("set", "chts", "chtss", "cht")),
        ("ddp-view", "rigl", {}),
        ("ddp-static-graph", "rigl", {}),
        ("ddp-unused", "rigl", {}),
        ("ddp-parts", "rigl", {}),
        ("ddp-parts-view", "snfs", {}),
        ("ddp-clip", "granet", {"clip": 0.1, "optimizer": "adam"}),
        ("ddp-together", "granet", {"allocation": "model"}),
        ("fsdp-together", "granet", {"allocation": "model"}),
        ("fsdp-kept", "rigl", {}),
        ("fsdp-parts", "rigl", {}),
        ("fsdp-clip", "granet", {"clip": 0.1, "optimizer": "adam"}),
        ("fsdp-adam", "rigl", {"optimizer": "adam"}),
        ("fsdp-adagrad", "rigl", {"optimizer": "adagrad"}),
        ("columns", "snfs", {}),
    ],
)
def test_settings_of_the_wrappers_change_nothing(case, method, options, two, single):
    ranks = found(two, case)
    assert len(ranks) == 2
    for each in ranks:
        assert_same_run(each, single(method, **options))


def test_each_layer_regrows_on_one_rank_unless_it_goes_by_gradients(two):
    first, second = found(two, "divided")
    layers = first["chts", False]
    assert len(layers) == 5
    for method in ("chts", "set"):
        assert first[method, False] == second[method, False] == layers
        assert first[method, True]
        assert second[method, True]
        assert sorted(first[method, True] + second[method, True]) == sorted(layers)
    assert first["rigl", True] == second["rigl", True] == layers


@pytest.mark.parametrize("part", ["copies", "shards"])
def test_a_mesh_of_two_axes(part, two, single):
    for each in found(two, "hybrid"):
        assert_same_run(each[part], single("rigl"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_rank_with_other_masks_is_found_out_and_nothing_is_changed(kind, two):
    first, second = found(two, f"{kind}-tampered")
    assert first["message"] == second["message"]
    assert "masks in evolution 0 differ from those of rank 0" in first["message"]
    assert "2.weight: rank 1" in first["message"]
    assert "0.weight" not in first["message"]
    assert_same_masks(first["masks"], second["masks"])


def test_ranks_that_disagree_are_told_in_what(two):
    for each in found(two, "disagreeing"):
        assert "initial masks differ" in each["seeds"]
        assert "2.weight: rank 1" in each["weights"]
        assert "0.weight" not in each["weights"]
        assert "different (optimizer steps, evolutions): [(0, 0), (1, 0)]" in each["steps"]


def test_processes_with_models_of_their_own(two):
    first, second = found(two, "alone")
    assert (first["evolutions"], second["evolutions"]) == (3, 3)
    assert any(not torch.equal(mask, second["masks"][name]) for name, mask in first["masks"].items())
    assert first["size"] == second["size"] == 1
    assert "distributed='yes': accepted is True" in first["refused"]


def test_ranks_with_inputs_of_other_sizes_and_other_layers_in_use_agree(two):
    first, second = found(two, "crops")
    for method in first:
        assert_same_masks(first[method]["masks"], second[method]["masks"])
        assert first[method]["sizes"] == second[method]["sizes"] == [(6, 7), (8, 8)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_that_were_thrown_away_leave_no_trace(kind, two):
    expected = worker.skipped(0, 1, lambda model: model)
    for each in found(two, f"{kind}-skipped"):
        assert_same_masks(each, expected)


@pytest.mark.parametrize("method", SAVED)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_state_goes_on_with_another_number_of_ranks(kind, method, two):
    half = worker.saved(0, 1, lambda model: model, method)
    expected = worker.resumed(half, method)
    assert expected["step"] == 9
    before = half["topology"]["masks"]
    assert any(not torch.equal(mask, before[name]) for name, mask in expected["masks"].items())
    fewer = [worker.resumed(state, method) for state in found(two, f"{kind}-saved-{method}")]
    more = found(two, f"{kind}-resumed-{method}")
    assert len(fewer) == len(more) == 2
    for each in (*fewer, *more):
        assert_same_masks(each["masks"], expected["masks"])
        for name, weight in each["weights"].items():
            torch.testing.assert_close(weight, expected["weights"][name], rtol=1e-9, atol=1e-11)


def test_checkpoints_of_sharded_models(two):
    for (masks, weights, step), (its_masks, its_weights, its_step) in found(two, "checkpoint"):
        assert step == its_step == 9
        assert_same_masks(its_masks, masks)
        assert all(torch.equal(weight, its_weights[name]) for name, weight in weights.items())


def test_shards_that_masks_cannot_follow_are_refused_with_the_reason(two):
    reasons = {
        "tensor_parallel": "layer 0: its weight cannot have a mask, because it is a DTensor that fully_shard did not",
        "both": "along more than one axis of ranks",
        "alone": "it lies on 2 ranks, and 1 hold the model",
        "lbfgs": "LBFGS remembers all weights in long vectors",
        "part": "it lies on 1 ranks, and 2 hold the model",
        "fsdp1": "FullyShardedDataParallel keeps weights in flat pieces",
    }
    for each in found(two, "refused"):
        for case, reason in reasons.items():
            assert reason in each[case], case


def test_the_largest_layers_go_to_different_ranks():
    sizes = [100, 4_000_000, 3_000_000, 2_000_000, 1_000_000]
    owners = assign(sizes, 2)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(2)]
    assert sorted(loads) == [5_000_000, 5_000_100]
    assert assign([5, 5, 5], 8) != assign([5, 5, 5], 1)
    assert set(assign([5, 5, 5], 3)) == {0, 1, 2}
