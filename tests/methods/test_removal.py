"""Which links go: the least important ones against a plain sort, and the soft rule against its probabilities."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_sampled, exactly, sampling_without_replacement, source, sparse, train

import chtconv
from chtconv.initial import random_mask
from chtconv.methods.removal import (
    REMOVALS,
    least_important,
    magnitude,
    magnitude_and_gradient,
    relative_importance,
    sampled_by_importance,
)
from chtconv.selection import stochastic_round
from chtconv.topology.evolution import choose_removed

SEEDS = st.integers(0, 2**31)


def relative(weight):
    """Link by link, as the formula of CHTs reads."""
    size = [[abs(each) for each in row] for row in weight.tolist()]
    columns = [sum(column) for column in zip(*size, strict=True)]
    return torch.tensor([
        [each / sum(row) + each / column if each else 0.0 for each, column in zip(row, columns, strict=True)]
        for row in size
    ])  # fmt: skip


IMPORTANCE = {
    "magnitude": lambda weight, gradient: weight.abs(),
    "relative_importance": lambda weight, gradient: relative(weight),
    "magnitude_and_gradient": lambda weight, gradient: weight.abs() + gradient.abs(),
}


@pytest.mark.parametrize("allocation", ["kernel", "layer"])
@pytest.mark.parametrize("removal", IMPORTANCE)
@given(links=st.integers(1, 12), share=st.floats(0, 1), seed=SEEDS, ties=st.booleans())
def test_the_links_of_least_importance_go(removal, allocation, links, share, seed, ties):
    mask = random_mask(5, 12, links, source(seed))
    weight, gradient = (torch.randn(5, 12, generator=source(seed + i)) * mask for i in range(2))
    if ties:
        weight, gradient = weight.mul(2).round() / 2, gradient.round()
    rows = (5, 12) if allocation == "kernel" else (1, 60)
    count = stochastic_round(share * links * 5 / rows[0], rows[0], source(seed))
    removed = choose_removed(
        chtconv.method("set", removal=removal), weight, gradient, mask.view(rows), count, 0.5, source(seed)
    )
    assert removed.shape == rows
    importance = IMPORTANCE[removal](weight, gradient).view(rows)
    for row, active, gone, fewer in zip(importance, mask.view(rows), removed, count.fewer_O, strict=True):
        wanted = count.most - int(fewer)
        assert gone.sum() == wanted
        assert not (gone & ~active).any()
        assert torch.allclose(row[gone].sort().values, row[active].sort().values[:wanted], rtol=1e-6)


@given(seed=SEEDS)
def test_importances_are_their_formulas(seed):
    weight, gradient = (torch.randn(4, 7, generator=source(seed + i)) for i in range(2))
    weight[:, 2] = weight[1] = 0
    assert torch.equal(magnitude(weight).abs(), weight.abs())
    assert torch.allclose(relative_importance(weight), relative(weight))
    assert torch.allclose(magnitude_and_gradient(weight, gradient), weight.abs() + gradient.abs())


def test_which_importance_is_that_of_the_link_in_its_row_and_column():
    """The largest of a weak row and column stays where a larger one among large ones goes."""
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 5.0, 6.0], [0.0, 7.0, 8.0]])
    mask = weight != 0
    options = {"mask_RN": mask.view(1, -1), "count": exactly(1, 1), "progress": 0.0, "generator": source()}
    by_size = choose_removed(chtconv.method("set"), weight, weight, **options).view(3, 3)
    by_relation = choose_removed(chtconv.method("set", removal="relative_importance"), weight, weight, **options)
    assert by_size.nonzero().tolist() == [[0, 0]]
    assert by_relation.view(3, 3).nonzero().tolist() == [[1, 1]]


def test_new_links_that_are_still_zero_go_first_and_at_random():
    weight, mask = torch.zeros(4000, 6), torch.ones(4000, 6, dtype=torch.bool)
    weight[:, 3:] = 1
    removed = least_important(weight, mask, exactly(4000, 1), source()).double().mean(0)
    assert not removed[3:].any()
    assert (removed[:3] - 1 / 3).abs().max() < 0.04


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_removal_takes_any_floating_point_type(dtype, removal):
    weight = torch.tensor([[0.5, 0.0, 1.0], [0.5, 0.0, 1.0]], dtype=dtype)
    mask = torch.ones(2, 3, dtype=torch.bool)
    removed = choose_removed(chtconv.method("set", removal=removal), weight, weight, mask, exactly(2, 1), 0.0, source())
    assert removed.tolist() == [[False, True, False]] * 2


@pytest.mark.parametrize(("progress", "power"), [(0.0, 1.0), (0.5, 5 / 3), (1.0, 3.0), (1.5, 3.0)])
def test_soft_removal_keeps_links_by_a_power_of_their_importance(progress, power):
    """With delta = 0.5 + 0.25 progress, kept in proportion to S^(delta / (1 - delta)), without replacement."""
    sizes, rows = [4.0, -2.0, 1.0, 0.5], 20_000
    importance = torch.tensor([[*sizes, 100.0]]).expand(rows, 5).contiguous()
    mask = torch.tensor([True] * 4 + [False]).expand(rows, 5)
    removed = sampled_by_importance(importance * mask, mask, exactly(rows, 2), source(), progress)
    assert not (removed & ~mask).any()
    assert_sampled(mask & ~removed, sampling_without_replacement([abs(size) ** power for size in sizes], 2))


def test_soft_removal_by_relative_importance():
    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    mask, method = torch.ones(1, 4, dtype=torch.bool), chtconv.method("set", removal="soft_relative_importance")
    kept = torch.cat([
        ~choose_removed(method, weight, weight, mask, exactly(1, 2), 1.0, source(seed)) for seed in range(4000)
    ])  # fmt: skip
    assert_sampled(kept, sampling_without_replacement((relative(weight).flatten() ** 3).tolist(), 2))


def test_soft_removal_of_links_that_are_all_zero_is_uniform():
    mask = torch.ones(6000, 3, dtype=torch.bool)
    removed = sampled_by_importance(torch.zeros(6000, 3), mask, exactly(6000, 1), source(), 0.0)
    assert (removed.double().mean(0) - 1 / 3).abs().max() < 0.03


@pytest.mark.parametrize("method", ["set", "mest"])
def test_an_evolution_removes_by_the_weights_and_the_gradients_of_the_last_step(method):
    """Where the gradient decides, MEST and SET remove other links."""
    model, optimizer, topology = sparse(method=method, sparsity=0.5, interval=10, zeta=0.3, allocation="layer")
    train(model, optimizer, 2)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad.mul_(1000)
    before = topology.masks
    importance = {
        name: parameters[name].detach().abs() + (parameters[name].grad.abs() if method == "mest" else 0)
        for name in before
    }
    topology.evolve()
    for row in topology.records:
        name = row["layer"]
        active = importance[name][before[name]].sort().values
        least = active[: row["removed"]]
        assert row["removed"] == pytest.approx(0.3 * len(active), abs=1)
        gone = importance[name][before[name] & ~topology.masks[name]]
        assert len(gone) > 0
        assert torch.isin(gone, least).all()


def test_relative_importance_sums_columns_within_a_group():
    """Depthwise kernels share no input, so that each link is all there is of its column."""
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[:, None]
    expected = torch.stack([relative(weight[group]) for group in range(2)])
    assert torch.allclose(relative_importance(weight), expected)
    assert torch.allclose(relative_importance(weight)[:, 0], weight[:, 0] / weight.sum(2) + 1)
