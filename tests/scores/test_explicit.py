"""The readable reference itself, against torch's convolution and against paths counted in networkx."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import geometries, jacobian_biadjacency, masks, nx_path_scores, nx_scores
from support import Numbers

from chtconv.layers.geometry import Geometry
from chtconv.scores.explicit import average_over_windows, biadjacency, explicit_scores, l3n
from chtconv.scores.paths import PATH_PREDICTORS, l3p
from chtconv.scores.predictors import PREDICTORS, community_weight


@settings(max_examples=150)
@given(data=st.data(), geometry=geometries())
def test_biadjacency_is_the_jacobian_of_the_convolution(data, geometry):
    mask_CK = data.draw(masks(geometry.positions, kernels=1))[0]
    assert torch.equal(biadjacency(mask_CK, geometry), jacobian_biadjacency(mask_CK, geometry))


@settings(max_examples=40)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), density=st.floats(0.1, 0.9), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("predictor", PATH_PREDICTORS)
def test_l3p_sums_over_paths_of_length_three(predictor, rows, columns, density, seed):
    linked = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).lt(density).double()
    expected = nx_path_scores(linked, predictor)
    for chunk in (1, 2**24):
        scores = l3p(linked, predictor, chunk=chunk).masked_fill(linked.bool(), 0)
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predictor", PATH_PREDICTORS)
def test_l3p_of_many_inputs_is_that_of_many_outputs_at_the_same_cost(predictor):
    linked = (torch.rand(4, 90) < 0.3).double()
    with Numbers() as of_inputs:
        wide = l3p(linked, predictor)
    with Numbers() as of_outputs:
        tall = l3p(linked.mT, predictor)
    torch.testing.assert_close(wide, tall.mT, rtol=1e-12, atol=1e-12)
    assert of_inputs.total == pytest.approx(of_outputs.total, rel=0.02)
    expected = nx_path_scores(linked[:, :20], predictor)
    found = l3p(linked[:, :20], predictor).masked_fill(linked[:, :20].bool(), 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predictor", PREDICTORS)
@settings(max_examples=30)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), density=st.floats(0.1, 0.9), seed=st.integers(0, 10**6))
def test_l3n_counts_paths_of_length_three(predictor, rows, columns, density, seed):
    linked = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).lt(density).double()
    scores = l3n(linked, PREDICTORS[predictor]).masked_fill(linked.bool(), 0)
    torch.testing.assert_close(scores, nx_scores(linked, predictor), rtol=1e-12, atol=1e-12)


def test_average_is_over_the_windows_where_a_position_is_in_bounds():
    geometry = Geometry.of((3,), 3, padding=1)
    scores_WA = torch.arange(9.0).view(3, 3)
    # Position 0 sees activation w - 1, position 1 activation w, position 2 activation w + 1.
    expected = torch.tensor([[(3 + 7) / 2, (0 + 4 + 8) / 3, (1 + 5) / 2]])
    assert torch.equal(average_over_windows(scores_WA, 1, geometry), expected)


def test_a_position_that_is_never_in_bounds_scores_zero():
    geometry = Geometry.of((3, 3), 1, padding=1)
    mask = torch.zeros(1, 2, 9, dtype=torch.bool)
    mask[0, 0, 4] = True
    assert explicit_scores(mask, geometry, "ch3_l3n").count_nonzero() == 0


def test_weight_is_zero_without_a_common_neighbour_and_finite_for_linked_pairs():
    common, degree = torch.tensor([0.0, 2.0, 2.0]), torch.tensor([3.0, 2.0, 5.0])
    assert community_weight(PREDICTORS["ch3_l3n"], common, degree).tolist() == pytest.approx([0, 1, 1 / 3])
    assert community_weight(PREDICTORS["ch2_l3n"], common, degree).tolist() == pytest.approx([0, 3, 1])
