"""Counts of links against loops, and random placement against every placement there is."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from chtconv.report.masks import LayerLinks, layer_links, links_of
from chtconv.report.placement import random_kernels, random_slices, random_sources, random_variance
from chtconv.report.reading import read

GRID = np.array([0.0, 0.4, 1.0, 1.6, 3.0])


@given(st.integers(0, 1000), st.tuples(*[st.integers(1, 4)] * 4))
def test_counts_are_those_of_loops(seed: int, shape: tuple[int, int, int, int]) -> None:
    mask = np.random.default_rng(seed).random(shape) < 0.4
    found = layer_links("conv.weight", mask)
    kernels, channels, height, width = shape
    slices = [int(mask[o, c].sum()) for o in range(kernels) for c in range(channels)]
    assert found.name == "conv"
    assert found.slices.tolist() == [slices.count(n) for n in range(height * width + 1)]
    assert found.sources.tolist() == [int(mask[:, c].sum()) for c in range(channels)]
    assert found.kernels.tolist() == [int(mask[o].sum()) for o in range(kernels)]
    assert found.positions.tolist() == [[int(mask[:, :, i, j].sum()) for j in range(width)] for i in range(height)]


def placements(shape: tuple[int, int, int], per_kernel: list[int] | None, links: int) -> list[LayerLinks]:
    """All masks of a layer with so many links in each kernel, or in all."""
    kernels, channels, positions = shape
    if per_kernel is None:
        chosen = [[each] for each in itertools.combinations(range(kernels * channels * positions), links)]
    else:
        choices = (itertools.combinations(range(channels * positions), n) for n in per_kernel)
        chosen = [list(each) for each in itertools.product(*choices)]
    found = []
    for each in chosen:
        mask = np.zeros(shape, dtype=bool).reshape(len(each), -1)
        for row, places in zip(mask, each, strict=True):
            row[list(places)] = True
        found.append(layer_links("layer", mask.reshape(shape)))
    return found


@pytest.mark.parametrize("per_kernel", [[2, 2], [1, 2], None])
def test_random_slices_are_the_mean_over_all_placements(per_kernel: list[int] | None) -> None:
    every = placements((2, 2, 3), per_kernel, 4)
    some = next(layer for layer in every if layer.per_kernel == (per_kernel is not None))
    np.testing.assert_allclose(random_slices(some), np.mean([layer.slices for layer in every], axis=0))


def test_random_degrees_are_those_of_all_placements_within_the_layer() -> None:
    every = placements((2, 3, 2), None, 4)
    some = next(layer for layer in every if not layer.per_kernel)
    sources = np.concatenate([layer.sources for layer in every])
    np.testing.assert_allclose(random_sources(some, GRID), [(sources <= x * 4 / 3 + 1e-9).mean() for x in GRID])
    kernels = np.concatenate([layer.kernels for layer in every])
    np.testing.assert_allclose(random_kernels(some, GRID), [(kernels <= x * 2 + 1e-9).mean() for x in GRID])


@pytest.mark.parametrize("per_kernel", [[2, 2], None])
def test_the_random_variance_of_channels_is_the_mean_over_all_placements(per_kernel: list[int] | None) -> None:
    every = placements((2, 3, 2), per_kernel, 4)
    some = next(layer for layer in every if layer.per_kernel == (per_kernel is not None))
    found = np.mean([layer.sources.var() / layer.sources.mean() ** 2 for layer in every])
    np.testing.assert_allclose(random_variance(some), found)


def test_kernels_of_equal_number_are_all_at_their_mean() -> None:
    some = placements((2, 2, 2), [2, 2], 4)[0]
    assert random_kernels(some, GRID).tolist() == [0, 0, 1, 1, 1]


def test_layers_are_those_of_the_run_in_the_order_of_its_network(trained: Path) -> None:
    run = next(run for run in read(trained)[0].runs if run.method == "chts")
    layers, problem = links_of(run)
    assert problem == ""
    assert [f"{layer.name}.weight" for layer in layers] == list(run.summary["layers"])
    assert [layer.links for layer in layers] == [row["links"] for row in run.summary["layers"].values()]


def test_masks_that_are_absent_damaged_or_of_linear_layers(set_run: Path) -> None:
    (run,) = read(set_run)[0].runs
    safetensors.numpy.save_file({"linear": np.ones((2, 2), dtype=bool)}, set_run / "masks.safetensors")
    assert links_of(run) == ([], "")
    (set_run / "masks.safetensors").write_bytes(b"not a mask")
    layers, problem = links_of(run)
    assert layers == []
    assert "masks.safetensors of set cannot be read" in problem
    (set_run / "masks.safetensors").unlink()
    assert links_of(run) == ([], "")
