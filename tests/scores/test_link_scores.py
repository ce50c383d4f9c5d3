"""The closed forms against the explicit graphs, and the symmetries that both must have."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import geometries, masks, nx_path_scores
from support import Numbers
from torch import nn

from chtconv.errors import ConfigurationError
from chtconv.layers.geometry import Geometry
from chtconv.scores import explicit_scores, link_scores
from chtconv.scores.api import GRAPHS, disabled_scores
from chtconv.scores.explicit import receptive_fields
from chtconv.scores.paths import PATH_PREDICTORS
from chtconv.scores.predictors import PREDICTORS


def closed_form(mask_OCK, geometry, predictor, graph, dtype):
    return disabled_scores(mask_OCK[None], geometry, predictor, graph, dtype=dtype)[0]


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("predictor", PREDICTORS)
@settings(max_examples=60)
@given(data=st.data(), geometry=geometries())
def test_closed_form_is_the_explicit_graph(graph, predictor, data, geometry):
    mask_OCK = data.draw(masks(geometry.positions))
    scores = closed_form(mask_OCK, geometry, predictor, graph, torch.float64)
    torch.testing.assert_close(scores, explicit_scores(mask_OCK, geometry, predictor, graph), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("predictor", ["ch2_l3n", "ch3_l3n"])
@settings(max_examples=50)
@given(data=st.data(), geometry=geometries())
def test_closed_form_in_float32(graph, predictor, data, geometry):
    mask_OCK = data.draw(masks(geometry.positions))
    scores = closed_form(mask_OCK, geometry, predictor, graph, torch.float32)
    expected = explicit_scores(mask_OCK, geometry, predictor, graph).float()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_the_default_device_is_not_that_of_the_mask(graph, predictor):
    # Sizes of no other test: what is made for them is kept.
    mask_OCK = torch.rand(3, 2, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    geometry = Geometry.of(kernel=(3, 2), input_size=(11, 13), dilation=(1, 3))
    with torch.device("meta"):
        scores = closed_form(mask_OCK, geometry, predictor, graph, torch.float64)
        expected = explicit_scores(mask_OCK, geometry, predictor, graph)
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("graph", GRAPHS)
@settings(max_examples=50)
@given(data=st.data(), geometry=geometries())
def test_over_all_windows_a_position_counts_as_zero_where_it_is_padding(graph, data, geometry):
    mask_OCK = data.draw(masks(geometry.positions))
    positions = torch.tensor([position for _, position, _ in receptive_fields(geometry)], dtype=torch.int64)
    seen_K = torch.bincount(positions, minlength=geometry.positions)
    total_OCK = explicit_scores(mask_OCK, geometry, "ch3_l3n", graph) * seen_K
    windows = prod(axis.windows for axis in geometry.axes)
    found = disabled_scores(mask_OCK[None], geometry, "ch3_l3n", graph, windows="all", dtype=torch.float64)[0]
    torch.testing.assert_close(found, total_OCK / windows, rtol=1e-10, atol=1e-12)
    share = disabled_scores(mask_OCK[None], geometry, "in_bounds", graph, dtype=torch.float64)[0]
    torch.testing.assert_close(share, (seen_K / windows).double().expand_as(share) * ~mask_OCK)


def test_the_corners_of_a_kernel_on_a_map_of_2x2_are_in_bounds_in_one_window_of_four():
    mask = torch.rand(6, 5, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    some, all_of_them = (link_scores(mask, 2, padding=1, windows=windows) for windows in ("in_bounds", "all"))
    share = torch.tensor([[0.25, 0.5, 0.25], [0.5, 1.0, 0.5], [0.25, 0.5, 0.25]]).expand_as(mask)
    torch.testing.assert_close(all_of_them[~mask], (some * share)[~mask])
    # Active positions have the highest score among the disabled ones of their kernel.
    best = torch.stack([kernel[~active].max() for kernel, active in zip(all_of_them, mask, strict=True)])
    assert torch.equal(all_of_them[mask], best[:, None, None, None].expand_as(mask)[mask])
    with pytest.raises(ConfigurationError, match="unknown choice of windows 'every'"):
        link_scores(mask, 2, windows="every")


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("predictor", ["ch2_l3n", "ch3_l3n"])
@settings(max_examples=25)
@given(data=st.data(), geometry=geometries(large=True))
def test_large_kernels(graph, predictor, data, geometry):
    mask_OCK = data.draw(masks(geometry.positions))
    scores = closed_form(mask_OCK, geometry, predictor, graph, torch.float64)
    torch.testing.assert_close(scores, explicit_scores(mask_OCK, geometry, predictor, graph), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "size", "options"),
    [
        ((7, 7), (9, 8), {"padding": 3}),
        ((11, 11), 15, {"stride": 4, "padding": 2}),
        ((2, 4), (6, 7), {"padding": "same"}),
        ((1, 7), (4, 9), {"padding": (0, 3)}),
        ((3, 3), 1, {"padding": 1}),
        ((7, 7), 7, {"padding": 3, "padding_mode": "circular"}),
    ],
)
@pytest.mark.parametrize("graph", GRAPHS)
def test_kernels_of_real_networks(graph, kernel, size, options):
    geometry = Geometry.of(kernel, size, **options)
    mask_OCK = torch.rand(2, 2, geometry.positions) < 0.3
    scores = closed_form(mask_OCK, geometry, "ch3_l3n", graph, torch.float64)
    torch.testing.assert_close(scores, explicit_scores(mask_OCK, geometry, "ch3_l3n", graph), rtol=1e-10, atol=1e-12)


def test_chunks_do_not_change_the_sums(monkeypatch):
    geometry = Geometry.of((4, 4), 6, padding=1)
    mask_OCK = torch.rand(3, 2, 16) < 0.4
    whole = [closed_form(mask_OCK, geometry, "ch2_l3n", graph, torch.float64) for graph in GRAPHS]
    monkeypatch.setattr("chtconv.scores.kernel_graph.PAIRS", 500)
    monkeypatch.setattr("chtconv.scores.cases.CHUNK", 300)
    for graph, scores in zip(GRAPHS, whole, strict=True):
        torch.testing.assert_close(closed_form(mask_OCK, geometry, "ch2_l3n", graph, torch.float64), scores)


def test_one_kernel_with_many_input_channels_is_scored_in_parts(monkeypatch):
    mask = torch.rand(1, 40, 4, 4) < 0.2
    whole = link_scores(mask, 9, padding=1, exact=True)
    monkeypatch.setattr("chtconv.scores.cases.CHUNK", 2**14)
    monkeypatch.setattr("chtconv.scores.kernel_graph.PAIRS", 2**15)
    with Numbers() as made:
        parts = link_scores(mask, 9, padding=1, exact=True)
    assert made.largest <= 2**15
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("predictor", ["ch2_l3n", "ch3_l3n"])
@settings(max_examples=30)
@given(data=st.data(), geometry=geometries())
def test_exact_scores_are_on_the_grid_and_close_to_the_others(graph, predictor, data, geometry):
    mask_OCK = data.draw(masks(geometry.positions))
    scores = disabled_scores(mask_OCK[None], geometry, predictor, graph, dtype=torch.float64, exact=True)[0]
    assert torch.equal(scores * 2**30, (scores * 2**30).round())
    expected = explicit_scores(mask_OCK, geometry, predictor, graph)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("shape", [(64, 48, 3, 3), (96, 200, 1, 1), (16, 8, 5, 5), (300, 500)])
def test_exact_scores_do_not_depend_on_the_number_of_threads(graph, shape):
    mask = torch.rand(shape) < 0.3
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(link_scores(mask, () if len(shape) == 2 else 9, graph=graph, exact=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def cht_matrix_scores(mask, predictor):
    """The published node-based matrix form of CHT on a mask matrix [out, in], written out entry by entry."""
    outputs, inputs = mask.shape
    m = mask.tolist()
    scores = torch.zeros(outputs, inputs, dtype=torch.float64)
    degree_out = [sum(row) for row in m]
    degree_in = [sum(m[o][i] for o in range(outputs)) for i in range(inputs)]
    for o in range(outputs):
        for i in range(inputs):
            if m[o][i]:
                continue
            for z in range(outputs):
                common = sum(m[o][c] and m[z][c] for c in range(inputs))
                if m[z][i] and common:
                    scores[o, i] += (1 + common if predictor == "ch2_l3n" else 1) / (degree_out[z] - common)
            for y in range(inputs):
                common = sum(m[r][i] and m[r][y] for r in range(outputs))
                if m[o][y] and common:
                    scores[o, i] += (1 + common if predictor == "ch2_l3n" else 1) / (degree_in[y] - common)
    return scores


@pytest.mark.parametrize("predictor", ["ch2_l3n", "ch3_l3n"])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.8])
def test_the_layer_graph_of_linear_and_pointwise_layers_is_the_matrix_form(predictor, density):
    mask = torch.rand(13, 17) < density
    expected = cht_matrix_scores(mask, predictor)
    linear = link_scores(mask, (), predictor=predictor, graph="layer")
    torch.testing.assert_close(linear[~mask].double(), expected[~mask], rtol=1e-5, atol=1e-7)
    pointwise = link_scores(mask[:, :, None, None], 5, predictor=predictor, graph="layer")
    torch.testing.assert_close(pointwise[:, :, 0, 0], linear)
    assert not link_scores(mask, (), predictor=predictor, graph="kernel").any()


@pytest.mark.parametrize("predictor", PATH_PREDICTORS)
def test_path_predictors_on_linear_and_pointwise_layers(predictor):
    mask = torch.rand(6, 7) < 0.4
    linear = link_scores(mask, (), predictor=predictor, graph="layer")
    expected = nx_path_scores(mask.double(), predictor).float()
    torch.testing.assert_close(linear[~mask], expected[~mask])
    geometry = Geometry.of((1, 1), 2)
    explicit = explicit_scores(mask[:, :, None], geometry, predictor, "layer")[:, :, 0].float()
    pointwise = link_scores(mask[:, :, None, None], 2, predictor=predictor, graph="layer")[:, :, 0, 0]
    torch.testing.assert_close(pointwise[~mask], explicit[~mask])


def test_controls_count_links_of_the_slice_and_of_the_input_channel():
    mask = torch.rand(4, 3, 3, 3) < 0.4
    occupancy = link_scores(mask, 8, predictor="occupancy")
    degree = link_scores(mask, 8, predictor="input_degree", groups=2)
    for o, c, i, j in (~mask).nonzero().tolist():
        assert occupancy[o, c, i, j] == mask[o, c].sum()
        assert degree[o, c, i, j] == mask[o // 2 * 2 : o // 2 * 2 + 2, c].sum()


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_are_graphs_of_their_own(graph, transposed, groups):
    """A grouped layer is the same as its groups one by one."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    shape = kind(4, 8, 3, groups=groups).weight.shape
    mask = torch.rand(shape) < 0.4
    options = {"padding": 1, "stride": 2, "graph": graph, "transposed": transposed}
    scores = link_scores(mask, 5, groups=groups, **options)
    parts = [link_scores(part, 5, **options) for part in mask.chunk(groups)]
    torch.testing.assert_close(scores, torch.cat(parts), rtol=1e-6, atol=0)


def test_a_depthwise_layer_graph_is_its_kernel_graphs():
    mask = torch.rand(6, 1, 7, 7) < 0.3
    kernel, layer = (link_scores(mask, 9, padding=3, groups=6, graph=graph) for graph in GRAPHS)
    torch.testing.assert_close(kernel, layer)


def test_duplicating_kernels_leaves_the_kernel_graph_unchanged_and_not_the_layer_graph():
    mask = torch.rand(5, 4, 3, 3) < 0.4
    twice = mask.repeat(2, 1, 1, 1)
    torch.testing.assert_close(link_scores(twice, 8)[:5], link_scores(mask, 8), rtol=1e-6, atol=0)
    assert not torch.allclose(link_scores(twice, 8, graph="layer")[:5], link_scores(mask, 8, graph="layer"))


@pytest.mark.parametrize("graph", GRAPHS)
def test_permuting_output_channels_permutes_scores(graph):
    mask, order = torch.rand(7, 5, 3, 3) < 0.4, torch.randperm(7)
    scores = link_scores(mask, 8, padding=1, graph=graph)
    torch.testing.assert_close(link_scores(mask[order], 8, padding=1, graph=graph), scores[order])


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_closed_form_at_the_size_of_a_real_layer(predictor):
    geometry = Geometry.of((3, 3), 12, padding=1)
    mask_OCK = torch.rand(1, 24, 9) < 0.3
    scores = closed_form(mask_OCK, geometry, predictor, "kernel", torch.float32)
    torch.testing.assert_close(scores.double(), explicit_scores(mask_OCK, geometry, predictor), rtol=1e-5, atol=0)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_permuting_input_channels_permutes_scores(predictor, graph):
    mask, order = torch.rand(5, 12, 3, 3) < 0.4, torch.randperm(12)
    options = {"padding": 1, "predictor": predictor, "graph": graph}
    scores = link_scores(mask, 16, **options)
    torch.testing.assert_close(link_scores(mask[:, order], 16, **options), scores[:, order])


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("axis", [2, 3])
def test_mirroring_the_kernel_mirrors_scores(axis, graph):
    mask = torch.rand(5, 12, 3, 3) < 0.4
    scores = link_scores(mask, 16, padding=1, graph=graph)
    torch.testing.assert_close(link_scores(mask.flip(axis), 16, padding=1, graph=graph), scores.flip(axis))


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


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("shape", [(3, 4, 3, 3), (3, 1, 3, 3), (3, 4, 1, 1), (2, 3, 5), (2, 3), (2, 2, 4, 4)])
def test_empty_and_full_masks_score_zero(predictor, shape, graph):
    for mask in (torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)):
        scores = link_scores(mask, 7 if len(shape) > 2 else (), predictor=predictor, graph=graph)
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
        (torch.ones(2, 2, 3, 3, dtype=torch.bool), {"predictor": "ch3_13n"}, "did you mean 'ch3_l3n'"),
        (torch.ones(2, 2, 3, 3, dtype=torch.bool), {"graph": "kernels"}, "did you mean 'kernel'"),
        (torch.ones(2, 2, 3, 3, dtype=torch.bool), {"groups": 3}, "groups=3"),
        (torch.ones(2, 2, 3, 3, dtype=torch.bool), {"padding_mode": "circle"}, "did you mean 'circular'"),
        (torch.ones(2, 2, 3, 3, dtype=torch.bool), {"dilation": 9}, "leaves nothing"),
        (torch.ones(2, 2, 1, 1, dtype=torch.bool), {"padding": 9, "padding_mode": "circular"}, "more than once"),
        (torch.ones(2, 2, 3, 3, dtype=torch.bool), {"predictor": "ch3_l3p"}, "path-based predictors accept"),
        (torch.ones(2, 2, 1, 1, dtype=torch.bool), {"predictor": "ch3_l3p"}, "on the kernel graph"),
    ],
)
def test_bad_input_is_named(mask, options, message):
    with pytest.raises(ConfigurationError, match=message):
        link_scores(mask, 8, **options)


@pytest.fixture
def own(monkeypatch):
    """Adds a predictor of that name."""
    return lambda predictor: monkeypatch.setitem(PREDICTORS, "mine", predictor)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        (lambda i, e: -1 / (1 + e), r"gave -1\.0 for internal degree 0 and external degree 0; accepted are finite"),
        (lambda i, e: 1 / e, "gave inf for internal degree 0 and external degree 0"),
        (lambda i, e: (40 - e).sqrt(), "gave nan for internal degree 0 and external degree 41"),
        (lambda i, e: e.sum(0), r"gave a tensor of shape \[64\] for degrees of shape \[64, 64\]"),
        (lambda i, e: None, "gave NoneType"),
    ],
)
def test_predictors_whose_weights_cannot_be_summed_are_refused(own, predictor, message, graph):
    own(predictor)
    for shape in ((2, 3, 3, 3), (2, 3, 4, 4)):
        with pytest.raises(ConfigurationError, match=f"predictor 'mine' {message}"):
            link_scores(torch.rand(shape) < 0.4, 7, predictor="mine", graph=graph)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("one", [1, 1.0, torch.tensor(1.0), torch.tensor(1)])
def test_a_predictor_may_be_a_number_of_any_type(own, one, graph):
    own(lambda i, e: one)
    for shape in ((2, 3, 3, 3), (2, 3, 4, 4)):
        mask = torch.rand(shape) < 0.4
        expected = link_scores(mask, 7, predictor="cn_l3n", graph=graph)
        assert torch.equal(link_scores(mask, 7, predictor="mine", graph=graph), expected)


def test_a_predictor_that_was_replaced_scores_anew_and_is_not_kept_on_disk(own, tmp_path, monkeypatch):
    monkeypatch.setenv("CHTCONV_CACHE", str(tmp_path))
    mask = torch.rand(4, 3, 3, 3) < 0.5
    geometry = Geometry.of((3, 3), 6, padding=1)
    for weight in (1.0, 3.0):
        own(lambda i, e, weight=weight: weight + i)
        scores = link_scores(mask, 6, padding=1, predictor="mine") * ~mask
        expected = explicit_scores(mask.flatten(2), geometry, "mine").view(mask.shape)
        torch.testing.assert_close(scores, expected.to(scores.dtype), rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.iterdir())
