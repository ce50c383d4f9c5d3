"""The closed form against the explicit graph, and the symmetries that both must have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import geometries, masks
from torch import nn

from chtconv.errors import ConfigurationError
from chtconv.geometry import Geometry
from chtconv.scores import explicit_scores, link_scores
from chtconv.scores.kernel_graph import kernel_graph_scores

PREDICTORS = ["ch2_l3n", "ch3_l3n"]


@pytest.mark.parametrize("predictor", PREDICTORS)
@settings(max_examples=200)
@given(data=st.data(), geometry=geometries())
def test_closed_form_is_the_explicit_graph(predictor, data, geometry):
    mask_OCK = data.draw(masks(geometry.positions))
    torch.testing.assert_close(
        kernel_graph_scores(mask_OCK, geometry, predictor, torch.float64),
        explicit_scores(mask_OCK, geometry, predictor),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("predictor", PREDICTORS)
@settings(max_examples=100)
@given(data=st.data(), geometry=geometries())
def test_closed_form_in_float32(predictor, data, geometry):
    mask_OCK = data.draw(masks(geometry.positions))
    torch.testing.assert_close(
        kernel_graph_scores(mask_OCK, geometry, predictor, torch.float32),
        explicit_scores(mask_OCK, geometry, predictor).float(),
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_closed_form_at_the_size_of_a_real_layer(predictor):
    geometry = Geometry.of((3, 3), 12, padding=1)
    mask_OCK = torch.rand(1, 24, 9) < 0.3
    scores = kernel_graph_scores(mask_OCK, geometry, predictor, torch.float32)
    torch.testing.assert_close(scores.double(), explicit_scores(mask_OCK, geometry, predictor), rtol=1e-5, atol=0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_are_the_graph_of_the_channels_that_a_kernel_sees(groups):
    """Grouped: the graph from the derivative of torch's own grouped convolution, kernel by kernel."""
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=False)
    mask = torch.rand(layer.weight.shape) < 0.5
    scores = link_scores(mask, 4, padding=1, groups=groups)
    geometry = Geometry.of((3, 3), 4, padding=1)
    expected = explicit_scores(mask.flatten(2), geometry, "ch3_l3n").float().view(mask.shape)
    torch.testing.assert_close(scores[~mask], expected[~mask])


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_permuting_channels_permutes_scores(predictor):
    mask, order = torch.rand(5, 12, 3, 3) < 0.4, torch.randperm(12)
    scores = link_scores(mask, 16, padding=1, predictor=predictor)
    torch.testing.assert_close(link_scores(mask[:, order], 16, padding=1, predictor=predictor), scores[:, order])


@pytest.mark.parametrize("axis", [2, 3])
def test_mirroring_the_kernel_mirrors_scores(axis):
    mask = torch.rand(5, 12, 3, 3) < 0.4
    scores = link_scores(mask, 16, padding=1)
    torch.testing.assert_close(link_scores(mask.flip(axis), 16, padding=1), scores.flip(axis))


def test_kernels_do_not_see_each_other():
    mask = torch.rand(6, 4, 3, 3) < 0.4
    torch.testing.assert_close(link_scores(mask, 8)[2:3], link_scores(mask[2:3], 8), rtol=1e-6, atol=0)


def test_padding_as_nodes_is_the_unpadded_layer_on_the_enlarged_input():
    """At sizes where the border vanishes, the two readings of padding agree in the limit but not on small maps."""
    mask = torch.rand(2, 4, 3, 3) < 0.4
    small = (link_scores(mask, 4, padding=1) - link_scores(mask, 6)).abs().max()
    large = (link_scores(mask, 4000, padding=1) - link_scores(mask, 4002)).abs().max()
    assert small > 1e-2
    assert large < 1e-2


def test_active_positions_carry_the_highest_disabled_score_of_their_kernel():
    mask = torch.rand(4, 6, 3, 3) < 0.5
    scores = link_scores(mask, 8, padding=1)
    for kernel_mask, kernel_scores in zip(mask, scores, strict=True):
        assert (kernel_scores[kernel_mask] == kernel_scores[~kernel_mask].max()).all()


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("shape", [(3, 4, 3, 3), (3, 1, 3, 3), (3, 4, 1, 1), (2, 3, 5), (2, 3), (2, 2, 2, 2, 2)])
def test_empty_and_full_masks_score_zero(predictor, shape):
    for mask in (torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)):
        scores = link_scores(mask, 7 if len(shape) > 2 else (), predictor=predictor)
        assert scores.shape == shape
        assert scores.dtype == torch.float32
        assert not scores.any()


def test_one_link_scores_nothing_and_two_links_of_a_slice_score_the_third():
    mask = torch.zeros(1, 1, 3, dtype=torch.bool)
    mask[0, 0, 0] = True
    assert not link_scores(mask, 100).any()
    mask[0, 0, 1] = True
    # Position 2 at window w sees x = w + 2. Of the windows that see x, w + 2 (at 0) shares nothing with w and w + 1
    # (at 1) shares activation w + 1: degree 2, common 1, weight 1. Of the activations of w, only w + 1 shares a
    # window with x, namely w + 1: degree 2, weight 1. Windows near the end have fewer.
    scores = link_scores(mask, 100)
    assert scores[0, 0, 2].item() == pytest.approx(2, abs=0.05)
    assert explicit_scores(mask, Geometry.of((3,), 100), "ch3_l3n")[0, 0, 2].item() == pytest.approx(
        scores[0, 0, 2].item()
    )


@pytest.mark.parametrize("options", [{"stride": 3}, {"stride": 4}])
def test_windows_that_share_no_activation_score_zero(options):
    assert not link_scores(torch.rand(4, 4, 3, 3) < 0.5, 32, **options).any()


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (torch.ones(2, 2, 3, 3), {}, "torch.float32"),
        (torch.ones(3, dtype=torch.bool), {}, r"shape \[3\]"),
        (torch.ones(2, 2, 3, 3, 3, 3, dtype=torch.bool), {}, "up to 3 spatial axes"),
        (torch.ones(2, 2, 5, 5, dtype=torch.bool), {}, "25 positions"),
        (torch.ones(2, 2, 3, 3, dtype=torch.bool), {"predictor": "ch3_13n"}, "did you mean 'ch3_l3n'"),
        (torch.ones(2, 2, 3, 3, dtype=torch.bool), {"graph": "kernels"}, "did you mean 'kernel'"),
        (torch.ones(2, 2, 3, 3, dtype=torch.bool), {"groups": 3}, "groups=3"),
        (torch.ones(2, 2, 3, 3, dtype=torch.bool), {"padding_mode": "circular"}, "padding_mode='circular'"),
        (torch.ones(2, 2, 3, 3, dtype=torch.bool), {"transposed": True}, "transposed"),
        (torch.ones(2, 2, 3, 3, dtype=torch.bool), {"dilation": 9}, "output would have size"),
    ],
)
def test_bad_input_is_named(mask, options, message):
    with pytest.raises(ConfigurationError, match=message):
        link_scores(mask, 8, **options)
