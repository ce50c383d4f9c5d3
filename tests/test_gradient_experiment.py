"""The experiment on what link scores know of the gradient, against loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from chtconv import link_scores
from chtconv.training import recipe


def draw(seed, *shape):
    """Worth, gradients and links; about half of the worth is 0."""
    generator = torch.Generator().manual_seed(seed)
    worth = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.5)
    return worth, torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) < 0.3


def by_loops(worth, gradient, links):
    """The three means of the gradient, place by place."""
    here = beside = anywhere = 0.0
    for o in range(len(worth)):
        places = [tuple(place) for place in (~links[o]).nonzero().tolist()]
        if not places:
            continue
        total = sum(worth[o][place].item() for place in places)
        chance = {place: worth[o][place].item() / total if total else 1 / len(places) for place in places}
        for c, k in places:
            size = abs(gradient[o, c, k].item())
            same = [place for place in places if place[0] == c]
            here += chance[c, k] * size
            beside += sum(chance[place] for place in same) / len(same) * size
            anywhere += size / len(places)
    return here / anywhere, beside / anywhere, here / beside


@given(seed=st.integers(0, 10**6), kernels=st.integers(1, 4), channels=st.integers(1, 5), positions=st.integers(1, 9))
def test_gain_is_that_of_the_next_link_place_by_place(experiments, seed, kernels, channels, positions):
    worth, gradient, links = draw(seed, kernels, channels, positions)
    links[0, 0, 0] = False
    found = experiments("gradient").gain(worth, gradient, links)
    assert found == pytest.approx(by_loops(worth, gradient, links), rel=1e-5)
    assert found.place == pytest.approx(found.slice * found.position)


def test_the_control_knows_slices_and_no_positions(experiments):
    _, gradient, links = draw(3, 8, 6, 9)
    mask = links.view(8, 6, 3, 3)
    scores = link_scores(mask, 16, padding=1, predictor="occupancy").flatten(2)
    found = experiments("gradient").gain(scores, gradient, links)
    assert found.position == pytest.approx(1)
    assert found.slice != pytest.approx(1, abs=1e-3)


def test_the_largest_gradients_are_those_that_sorting_finds(experiments):
    _, gradient, links = draw(4, 5, 6, 9)
    links[:] = (torch.rand(5, 54).argsort(dim=1) < 10).view(links.shape)
    chosen = experiments("gradient").largest(gradient, links, 0.3)
    for o in range(5):
        free = sorted((~links[o]).nonzero().tolist(), key=lambda place: -abs(gradient[o][tuple(place)].item()))
        assert sorted(free[:3]) == chosen[o].nonzero().tolist()


def test_a_half_trained_run_is_looked_at_as_it_is(experiments, tmp_path):
    experiment = experiments("gradient")
    config = recipe("quick").replace(
        epochs=2, width=0.0625, head=16, dropout=0.0, method="set", sparsity=0.8, threads=1, backend="dense"
    )
    run = experiment.half_trained(config, tmp_path)
    before = {name: value.clone() for name, value in run.weights().items()}
    first, choosing, judging = experiment.gradients(run)
    assert run.epoch == 1
    assert all(run.weights()[name].equal(value) for name, value in before.items())

    again = experiment.half_trained(config, tmp_path)
    assert again.epoch == 1, "nothing is trained further"
    images, labels = again.batches.make(next(again.batches.draws(1)))
    functional.cross_entropy(again.model(images), labels).backward()
    for name, mask in again.masks().items():
        own = again.model.get_parameter(name).grad
        assert torch.allclose(first[name][mask], own[mask], rtol=1e-4, atol=1e-7)
        assert (first[name][~mask] != 0).any()
        assert not torch.allclose(choosing[name], judging[name], rtol=0.1)
