"""FLOPs against closed forms, published numbers, and networks of ones that count their own products."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules import module as module_hooks

import chtconv
from chtconv.errors import ConfigurationError
from chtconv.flops import Flops, LayerFlops, count_flops, layer_flops, training_flops
from chtconv.sparse_compute.library import library

CONVOLUTIONS = {False: (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
CONVOLUTIONS[True] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@st.composite
def geometries(draw):
    """A convolution and the shape of an input that leaves at least one output."""
    axes, transposed, groups = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.integers(1, 3))
    kernel = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    dilation = draw(st.lists(st.integers(1, 2), min_size=axes, max_size=axes))
    options = {
        "stride": tuple(draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))),
        "padding": tuple(draw(st.lists(st.integers(0, 2), min_size=axes, max_size=axes))),
        "dilation": tuple(dilation),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if not transposed and draw(st.booleans()):
        options |= {"stride": 1, "padding": draw(st.sampled_from(["same", "valid"]))}
    channels = [groups * draw(st.integers(1, 2)) for _ in range(2)]
    size = [d * (k - 1) + draw(st.integers(1, 3)) for d, k in zip(dilation, kernel, strict=True)]
    layer = CONVOLUTIONS[transposed][axes - 1](*channels, tuple(kernel), **options)
    # A transposed convolution crops its output by the padding, so that its input has to be large enough.
    margin = 4 if transposed else 0
    return layer, [draw(st.integers(1, 2)), channels[0], *(s + margin for s in size)]


def products(layer, shape, weight):
    """Every product of a layer, counted by itself: on ones, padded with ones, the outputs sum up to their number."""
    images, transposed = torch.ones(shape, dtype=torch.float64), isinstance(layer, CONVOLUTIONS[True])
    padding = (0,) * len(layer.kernel_size) if layer.padding == "valid" or transposed else layer.padding
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    total = total if padding == "same" else [2 * p for p in padding]
    images = nn.functional.pad(
        images, [side for extra in reversed(total) for side in (extra // 2, extra - extra // 2)], value=1.0
    )
    run = getattr(nn.functional, f"conv{'_transpose' * transposed}{len(total)}d")
    return int(run(images, weight, stride=layer.stride, dilation=layer.dilation, groups=layer.groups).sum())


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(geometries(), st.floats(0.1, 0.9))
def test_a_layer_against_the_count_of_every_product(case, keep):
    layer, shape = case
    mask = (torch.rand(layer.weight.shape) < keep).double()
    dense = 2 * products(layer, shape, torch.ones_like(mask))
    assert layer_flops(layer, shape) == dense
    counted = count_flops(layer, torch.zeros(shape), densities={"weight": float(mask.mean())})
    assert list(counted.layers) == ["weight"]
    assert counted.dense == dense
    assert counted.sparse == pytest.approx(2 * products(layer, shape, mask))


def test_linear_layers_of_any_number_of_axes():
    layer = nn.Linear(5, 7)
    for leading in ([], [3], [2, 3, 4]):
        expected = 2 * math.prod(leading) * 5 * 7
        assert layer_flops(layer, [*leading, 5]) == expected
        assert count_flops(layer, torch.zeros(*leading, 5)).layers == {"weight": LayerFlops(expected, expected)}


def test_padding_modes_and_batches_without_an_axis_make_no_difference():
    circular = nn.Conv2d(3, 4, 5, padding=2, padding_mode="circular")
    expected = 2 * 16 * 25 * 3 * 4
    assert layer_flops(circular, (1, 3, 4, 4)) == count_flops(circular, torch.zeros(1, 3, 4, 4)).dense == expected
    assert count_flops(nn.Conv2d(3, 4, 5, padding=2), torch.zeros(3, 4, 4)).dense == expected


class Branching(nn.Module):
    """A layer used twice, one that is not used, one with a tied weight, and products without parameters."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.shared = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.idle = nn.Conv2d(8, 8, 1)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8, bias=False))
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.head[1].weight

    def forward(self, x, *, scale=1.0):
        x = self.shared(self.shared(self.stem(x * scale))[..., ::2, ::2])
        features = self.tied(self.head(x.mean((2, 3))))
        similar = features @ features.T
        return similar @ features[:, 0] + features[0] @ features[1] + torch.rand(())


def test_a_model_is_the_sum_of_its_layers():
    model, images = Branching(), torch.randn(4, 3, 6, 6)
    expected = {
        "stem.0.weight": layer_flops(model.stem[0], images.shape),
        "shared.weight": layer_flops(model.shared, (4, 8, 6, 6)) + layer_flops(model.shared, (4, 8, 3, 3)),
        "head.1.weight": 2 * layer_flops(model.tied, (4, 8)),
        "": 2 * 4 * 8 * 4 + 2 * 4 * 4 + 2 * 8,
    }
    densities = {"stem.0.weight": 0.5, "shared.weight": 0.1, "idle.weight": 0.3, "tied.weight": 0.2}
    flops = count_flops(model, images, scale=2.0, densities=densities)
    assert {name: layer.dense for name, layer in flops.layers.items()} == expected
    shares = {"stem.0.weight": 0.5, "shared.weight": 0.1, "head.1.weight": 0.2, "": 1}
    assert {name: layer.sparse for name, layer in flops.layers.items()} == pytest.approx(
        {name: shares[name] * dense for name, dense in expected.items()}
    )
    assert flops.dense == sum(expected.values())
    assert flops.sparse == pytest.approx(sum(shares[name] * dense for name, dense in expected.items()))


@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_and_weights_that_other_modules_use(need_weights, low_precision):
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    densities = {"in_proj_weight": 0.5, "out_proj.weight": 0.25}
    with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        for query in (x, x.clone()):
            flops = count_flops(model, query, x, x, need_weights=need_weights, densities=densities)
            projections, output, attention = 2 * 15 * 8 * 24, 2 * 15 * 8 * 8, 2 * (2 * 3 * 2 * 5 * 5 * 4)
            assert flops.layers == {
                "in_proj_weight": LayerFlops(projections, projections / 2),
                "": LayerFlops(attention, attention),
                "out_proj.weight": LayerFlops(output, output / 4),
            }


def test_products_without_parameters_belong_to_the_innermost_module():
    class Similarity(nn.Module):
        def forward(self, x):
            return x @ x.T

    model = nn.Sequential(nn.Linear(8, 5), nn.Sequential(nn.ReLU(), Similarity()))
    layers = count_flops(model, torch.randn(3, 8)).layers
    assert {name: layer.dense for name, layer in layers.items()} == {"0.weight": 2 * 3 * 8 * 5, "1.1": 2 * 3 * 5 * 3}


def test_the_fused_encoder_counts_like_its_parts():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    projections, attention = 4 * (2 * 15 * 8 * 8), 2 * (2 * 3 * 2 * 5 * 5 * 4)
    assert count_flops(encoder, torch.randn(3, 5, 8)).dense == projections + attention + 2 * (2 * 15 * 8 * 16)
    assert torch.backends.mha.get_fastpath_enabled()


def bottleneck(channels, width, stride):
    """The longest path of a block of ResNet-50, as (in, out, kernel, stride)."""
    return [(channels, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]


class Bottleneck(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.path = nn.Sequential(
            *(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in bottleneck(channels, width, stride))
        )
        change = channels != 4 * width
        self.shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False) if change else nn.Identity()

    def forward(self, x):
        return self.path(x) + self.shortcut(x)


def resnet50():
    layers, channels = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)], 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(channels, 64 << stage, 2 if stage and not block else 1))
            channels = 4 * (64 << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def vgg16():
    layers, channels = [], 3
    for width, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            channels = width
        layers.append(nn.MaxPool2d(2))
    sizes = (512 * 7 * 7, 4096, 4096, 1000)
    return nn.Sequential(*layers, nn.Flatten(), *map(nn.Linear, sizes[:-1], sizes[1:]))


@pytest.mark.parametrize(("build", "billions"), [(resnet50, 4.089), (vgg16, 15.470)])
def test_published_numbers_of_multiply_adds_at_224(build, billions):
    """The numbers of torchvision's model cards, in 10⁹ multiply-adds an image."""
    with torch.device("meta"):
        flops = count_flops(build(), torch.zeros(2, 3, 224, 224))
    assert flops.dense / 2 / 2e9 == pytest.approx(billions, abs=5e-4)


def test_steps():
    flops = Flops({"a": LayerFlops(1000, 100.0), "b": LayerFlops(10, 10)})
    assert (flops.dense, flops.sparse) == (1010, 110)
    assert (flops.dense_step, flops.sparse_step, flops.dense_gradient_step) == (3030, 330, 1230)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 500))
def test_trainings_of_the_methods_cost_what_rigl_says(density, other, interval):
    forward, densities = {"a": 7_000, "b": 400, "head": 30}, {"a": density, "b": other}
    dense, sparse = 7_430, 7_000 * density + 400 * other + 30
    steps = interval + 1
    rigl = (3 * sparse * interval + 2 * sparse + dense) / (interval + 1)
    expected = {0: 3 * sparse, 1: rigl, steps: 2 * sparse + dense}
    for dense_gradient_steps, average in expected.items():
        total = training_flops(forward, steps, densities, dense_gradient_steps=dense_gradient_steps)
        assert total / steps == pytest.approx(average)
    assert training_flops(forward, steps, {}) == 3 * dense * steps
    assert training_flops(forward, 0, densities) == 0


def small_network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 8, 3))


def test_a_sparse_model_is_not_disturbed_and_does_the_products_of_its_links():
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.8, method="cht")
    model[2].eval()
    model(torch.randn(2, 3, 9, 8)).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    flags = [module.training for module in model.modules()]
    attributes = [vars(module).copy() for module in model.modules()]

    densities = {name: float(mask.float().mean()) for name, mask in topology.masks.items()}
    flops = count_flops(model, torch.randn(1, 3, 5, 5), densities=densities)

    first, second = (int(mask.sum()) for mask in topology.masks.values())
    assert flops.sparse == pytest.approx(2 * (9 * first + 1 * second))
    assert [module.training for module in model.modules()] == flags
    assert [vars(module) for module in model.modules()] == attributes
    assert model[0]._chtconv_input_size == (9, 8)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(map(torch.equal, (parameter.grad for parameter in model.parameters()), gradients))


def test_random_numbers_go_on_as_if_nothing_had_been():
    model, images = Branching(), torch.randn(4, 3, 6, 6)
    before = torch.get_rng_state()
    count_flops(model, images)
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_that_a_model_has_not_observed_stay_unknown():
    model = small_network()
    topology = chtconv.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), sparsity=0.8, method="cht")
    count_flops(model, torch.randn(1, 3, 5, 5))
    with pytest.raises(ConfigurationError, match="its input size is unknown"):
        topology.evolve()


def test_a_pass_that_fails_leaves_nothing_behind():
    model = small_network()
    hooks = [dict(module_hooks._global_forward_pre_hooks), dict(module_hooks._global_forward_hooks)]
    with pytest.raises(RuntimeError, match="channels"):
        count_flops(model, torch.randn(1, 2, 5, 5))
    assert all(module.training for module in model.modules())
    assert hooks == [module_hooks._global_forward_pre_hooks, module_hooks._global_forward_hooks]
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_within_autocast_later_passes_keep_their_gradients():
    model, images = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
        assert list(count_flops(model, images).layers) == ["weight"]
        model(images).float().sum().backward()
    assert model.weight.grad is not None


def test_compiled_parts_run_uncompiled():
    runs = []

    def backend(graph, _inputs):
        return lambda *arguments: runs.append(1) or graph(*arguments)

    model, images = nn.Sequential(Bottleneck(4, 1, 1)), torch.randn(1, 4, 5, 5)
    expected = count_flops(model, images)
    model[0].compile(backend=backend)
    model(images)
    assert count_flops(model, images) == expected
    assert len(runs) == 1
    model(images)
    assert len(runs) == 2


@pytest.mark.filterwarnings("error:Using `torch.compile")
def test_compiled_models_need_no_prefix_in_the_names_of_densities():
    compiled = torch.compile(small_network(), backend="eager")
    flops = count_flops(compiled, torch.randn(1, 3, 5, 5), densities={"0.weight": 0.5})
    assert flops.layers["_orig_mod.0.weight"].sparse == flops.layers["_orig_mod.0.weight"].dense / 2
    assert flops.layers["_orig_mod.3.weight"].sparse == flops.layers["_orig_mod.3.weight"].dense


def test_the_pass_has_no_gradients_and_no_dropout():
    model, seen = small_network(), []
    model.register_forward_hook(lambda module, *_: seen.append((torch.is_grad_enabled(), module.training)))
    count_flops(model, torch.randn(1, 3, 5, 5))
    assert seen == [(False, False)]


def test_the_smallest_output_of_a_transposed_convolution():
    layer = nn.ConvTranspose1d(2, 2, 2, stride=2, padding=1, output_padding=1)
    assert layer_flops(layer, (1, 2, 1)) == count_flops(layer, torch.zeros(1, 2, 1)).dense == 2 * 2 * 2 * 2


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (nn.Conv2d(3, 4, 3), (1, 4, 8, 8), r"input_shape=\[1, 4, 8, 8\]: .* \[batch, 3\] and 2 spatial sizes"),
        (nn.Conv2d(3, 4, 3), (3, 8, 8), "2 spatial sizes"),
        (nn.Conv2d(3, 4, 3), (0, 3, 8, 8), "at least 1"),
        (nn.Conv2d(3, 4, 3), (1, 3, 2, 2), "leaves nothing"),
        (nn.Linear(5, 7), (2, 4), r"\[\.\.\., 5\]"),
        (nn.BatchNorm2d(3), (1, 3, 8, 8), "BatchNorm2d: accepted are Conv1d"),
    ],
)
def test_shapes_that_a_layer_does_not_accept(module, shape, message):
    with pytest.raises(ConfigurationError, match=message):
        layer_flops(module, shape)


@pytest.mark.parametrize(
    ("densities", "message"),
    [({"9.weight": 0.5}, "layer '9.weight'; accepted are 0.weight, 0.bias"), ({"0.weight": 1.5}, "0.weight: .*1.5")],
)
def test_densities_that_cannot_be(densities, message):
    with pytest.raises(ConfigurationError, match=message):
        count_flops(small_network(), torch.zeros(1, 3, 5, 5), densities=densities)
    with pytest.raises(ConfigurationError, match=message):
        training_flops({"0.weight": 1, "0.bias": 1}, 1, densities)


def test_parameters_that_share_a_buffer_are_told_apart():
    model, images = small_network(), torch.zeros(2, 3, 5, 5)
    densities = {"0.weight": 0.1, "3.weight": 0.5}
    expected = count_flops(model, images, densities=densities)
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector, model.parameters())
    assert len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}) == 1
    assert count_flops(model, images, densities=densities) == expected
    with torch.autocast("cpu"):
        assert count_flops(model, images, densities=densities) == expected


@pytest.mark.skipif(library() is None, reason="there are no compiled kernels")
def test_compiled_models_whose_links_nothing_counts_are_refused():
    model, images = small_network(), torch.zeros(2, 3, 5, 5)
    chtconv.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), sparsity=0.8, method="static")
    compiled = chtconv.compile_sparse(model.eval(), backend="sparse")
    with pytest.raises(ConfigurationError, match=r"a SparseConvolution of a compiled model.*compile_sparse was given"):
        count_flops(nn.Sequential(compiled), images)
    dense = chtconv.compile_sparse(model, backend="dense")
    assert count_flops(dense, images).dense == count_flops(model, images).dense


def test_lazy_layers_and_impossible_numbers_of_steps():
    with pytest.raises(ConfigurationError, match=r"layer 0\.weight has no size yet"):
        count_flops(nn.Sequential(nn.LazyLinear(3)), torch.zeros(1, 2))
    with pytest.raises(ConfigurationError, match="steps=3, dense_gradient_steps=4"):
        training_flops({"a": 1}, 3, {}, dense_gradient_steps=4)
    with pytest.raises(ConfigurationError, match="steps=-1"):
        training_flops({"a": 1}, -1, {})
