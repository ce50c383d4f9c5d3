"""Consecutive layers, against the networks themselves."""

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from zoo import ZOO

from chtconv.errors import ConfigurationError
from chtconv.layers.chains import Link, remove_dead
from chtconv.layers.consecutive import consecutive_layers
from chtconv.models import vgg16

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def layers_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LAYERS)]


def found(model: nn.Module) -> list[tuple[str, str, int]]:
    return [tuple(link) for link in consecutive_layers(model, layers_of(model))]


# ---------------------------------------------------------------------------------------------- dead channels


class Forward(nn.Module):
    """A network of three convolutions, a norm and a head, with a forward of the test's own."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.flat = nn.Linear(4 * 16, 5)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def chain_of(names: list[str]) -> list[tuple[str, str, int]]:
    return [(before, after, 1) for before, after in pairwise(names)]


def test_vgg_is_one_chain():
    model = vgg16(10, width=1 / 16)
    names = layers_of(model)
    assert len(names) == 16
    assert found(model) == chain_of(names)
    assert found(model.eval()) == chain_of(names)
    assert [tuple(link) for link in consecutive_layers(model, ["features.3", "features.0", "features.10"])] == [
        ("features.0", "features.3", 1)
    ]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.PReLU(4), nn.MaxPool1d(2), nn.Conv1d(4, 5, 3)), 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.Dropout2d(), nn.Conv2d(4, 5, 3)), 1),
        (nn.Sequential(nn.Conv3d(3, 4, 3), nn.GroupNorm(4, 4), nn.ReLU6(), nn.ConvTranspose3d(4, 5, 3)), 1),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Upsample(scale_factor=2), nn.Conv2d(4, 6, 3, groups=2)), 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ZeroPad2d(1), nn.Identity(), nn.Conv2d(4, 8, 3, groups=4)), 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 5)), 9),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(1, 3), nn.Linear(4, 5)), 1),
        (nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Dropout(), nn.Linear(4, 5)), 1),
        (nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(4, 5)), 1),
        (nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(8, 5)), None),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 5, 3)), None),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 3, 3]), nn.Conv2d(4, 5, 3)), None),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.LocalResponseNorm(2), nn.Conv2d(4, 5, 3)), None),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1), nn.Conv2d(4, 5, 3)), None),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GLU(1), nn.Conv2d(2, 5, 3)), None),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.PixelShuffle(2), nn.Conv2d(1, 5, 3)), None),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ChannelShuffle(2), nn.Conv2d(4, 5, 3)), None),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(9, 5)), None),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(0), nn.Linear(72, 5)), None),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)), None),
        (nn.Sequential(nn.Linear(3, 4), nn.AvgPool1d(2), nn.Linear(2, 4)), None),
        (nn.Sequential(nn.Linear(3, 4), nn.InstanceNorm1d(4), nn.Linear(4, 4)), None),
        (nn.Conv2d(3, 4, 3), None),
    ],
    ids=lambda value: "-".join(type(each).__name__ for each in value) if isinstance(value, nn.Sequential) else None,
)
def test_plain_networks(model, expected):
    names = layers_of(model)
    assert found(model) == ([(names[0], names[1], expected)] if expected else [])


CASES: dict[str, tuple[Callable[[Forward, Tensor], Tensor], list[tuple[str, str, int]]]] = {
    "functions": (
        lambda m, x: m.flat(torch.flatten(functional.max_pool2d(functional.relu(m.norm(m.b(m.a(x).relu_()))), 2), 1)),
        [("a", "b", 1), ("b", "flat", 16)],
    ),
    "methods": (lambda m, x: m.head(m.b(m.a(x).sigmoid().contiguous()).mean((-1, -2))), chain_of(["a", "b", "head"])),
    "mean, then flatten": (
        lambda m, x: m.head(m.b(m.a(x)).mean([2, 3], keepdim=True).flatten(start_dim=1)),
        chain_of(["a", "b", "head"]),
    ),
    "numbers": (lambda m, x: m.b(1 - m.a(x) * 2 / 3 + 0.5), [("a", "b", 1)]),
    "in place": (lambda m, x: m.b(m.a(x).mul_(2).clamp_(min=0)), [("a", "b", 1)]),
    "dropout and resizing": (
        lambda m, x: m.b(functional.interpolate(functional.dropout(m.a(x), 0.2, m.training), scale_factor=2.0)),
        [("a", "b", 1)],
    ),
    "adaptive pooling": (lambda m, x: m.head(functional.adaptive_avg_pool2d(m.b(x[:, :1].expand(-1, 4, -1, -1)), 1)
                                             .flatten(1)), [("b", "head", 1)]),
    "view": (lambda m, x: m.flat((y := m.a(x[..., :4, :4])).view(y.size(0), -1)), [("a", "flat", 16)]),
    "view of a shape": (lambda m, x: m.flat((y := m.a(x[..., :4, :4])).view((y.shape[0], 64))), [("a", "flat", 16)]),
    "reshape": (lambda m, x: m.flat((y := m.a(x[..., :4, :4])).reshape(y.size()[0], -1)), [("a", "flat", 16)]),
    "view of another": (lambda m, x: m.flat(m.a(x[..., :4, :4]).view(x.size(0), -1)), []),
    "view of the shape of another": (lambda m, x: m.flat(m.a(x[..., :4, :4]).view(x.shape[0], -1)), []),
    "view by channels": (lambda m, x: m.flat((y := m.a(x[..., :4, :4])).view(y.shape[1], 64)), []),
    "view that mixes": (lambda m, x: m.b((y := m.a(x)).view(y.size(0), 4, y.size(3), y.size(2))), []),
    "check of a shape": (
        lambda m, x: (torch._assert((y := m.a(x)).shape[1] == 4, "channels"), m.b(y))[1],
        [("a", "b", 1)],
    ),
    "residual": (lambda m, x: (y := m.a(x)) + m.b(y), []),
    "residual in itself": (lambda m, x: m.head((m.b(y := functional.relu(m.a(x))) + y).mean((2, 3))), []),
    "concatenation": (lambda m, x: m.c(torch.cat([y := m.a(x), m.b(y)], 1)), []),
    "concatenation with itself": (lambda m, x: m.c(torch.cat([y := m.a(x), y], 1)), []),
    "branches": (lambda m, x: (m.b(y := m.a(x)), m.head(y.mean((2, 3)))), []),
    "output": (lambda m, x: ((y := m.a(x)), m.b(y)), []),
    "twice": (lambda m, x: m.b(m.b(m.a(x))), []),
    "twice, first": (lambda m, x: m.b(m.a(x)) + m.a(x + 1), []),
    "weight used elsewhere": (lambda m, x: m.b(m.a(x)) * m.a.weight.mean(), []),
    "scaled by a parameter": (lambda m, x: m.b(m.a(x) * m.scale), []),
    "mean over channels": (lambda m, x: m.head(m.a(x).mean((1, 3))), []),
    "mean over all": (lambda m, x: m.b(x[:, :1] + m.a(x).mean()), []),
    "indexing": (lambda m, x: m.b(m.a(x)[:, [3, 2, 1, 0]]), []),
    "softmax": (lambda m, x: m.b(m.a(x).softmax(1)), []),
    "transposition": (lambda m, x: m.b(m.a(x).transpose(1, 2)), []),
    "pooling with indices": (lambda m, x: m.b(functional.max_pool2d(m.a(x), 2, return_indices=True)[0]), []),
}  # fmt: skip


@pytest.mark.parametrize(("forward", "expected"), CASES.values(), ids=CASES)
def test_forward_of_ones_own(forward, expected):
    assert found(Forward(forward)) == expected


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
def test_wrappers_of_parts_are_looked_through(wrap):
    part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), wrap(part), nn.ReLU(), nn.Conv2d(4, 4, 1))
    assert found(model) == chain_of(layers_of(model))


def test_residual_blocks_are_linked_inside_only():
    model = ZOO["resnet_basic"].build()
    assert found(model) == [(f"layers.{at}.conv1", f"layers.{at}.conv2", 1) for at in ("0.0", "1.0", "1.1")]


def test_depthwise_and_pointwise_convolutions_are_linked():
    blocks = [f"features.{at}" for at in ("2.conv.0.0", "2.conv.1.0", "2.conv.2")]
    assert set(chain_of(blocks)) <= set(found(ZOO["mobilenet_v2"].build()))
    masks = {name: torch.ones(4, 4 if name != "1" else 1, 1).bool() for name in "012"}
    masks["1"][2] = False
    left = remove_dead(masks, [Link("0", "1"), Link("1", "2")])
    assert left["0"].any(2).any(1).tolist() == left["2"].any(2).any(0).tolist() == [True, True, False, True]


def output_and_taken(model, inputs, link, change=lambda output: output, replace=lambda taken: taken):
    """Runs a network with the producer's output changed and the consumer's input replaced: its output, that input."""
    seen = []
    producer, consumer = model.get_submodule(link.producer), model.get_submodule(link.consumer)
    handles = [
        producer.register_forward_hook(lambda module, args, output: change(output)),
        consumer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone())),
        consumer.register_forward_pre_hook(lambda module, args: replace(args[0])),
    ]
    output = model(inputs)
    for handle in handles:
        handle.remove()
    return output, *seen


def channels_of(values: Tensor, layer: nn.Module) -> Tensor:
    """Channels first: those of linear layers are last, also where there are more axes."""
    return values.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0)


def assert_link(model: nn.Module, inputs: Tensor, link: Link) -> None:
    """Outputs of the producer reach the inputs of the consumer that the link says, and nothing else."""
    producer, consumer = model.get_submodule(link.producer), model.get_submodule(link.consumer)
    before, taken = output_and_taken(model, inputs, link)
    after, _ = output_and_taken(model, inputs, link, torch.randn_like, lambda _: taken.clone())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for channel in range(getattr(producer, "out_channels", None) or producer.out_features):
        reached = set()
        for shift in (-9, 9):

            def change(output, channel=channel, shift=shift):
                output = output.clone()
                channels_of(output, producer)[channel] += shift
                return output

            differs = channels_of(output_and_taken(model, inputs, link, change)[1] != taken, consumer)
            reached |= set(differs.flatten(1).any(1).nonzero().flatten().tolist())
        assert reached == set(range(channel * link.spread, (channel + 1) * link.spread))


@pytest.mark.parametrize("name", [name for name in ZOO if not name.startswith("vit")])
def test_channels_go_where_the_links_of_a_network_say(name):
    model, inputs = ZOO[name].build().eval(), ZOO[name].inputs(2)
    with torch.no_grad():
        for link in consecutive_layers(model, layers_of(model)):
            assert_link(model, inputs, link)


@pytest.mark.parametrize("name", [name for name, (_, expected) in CASES.items() if expected])
def test_channels_go_where_the_links_of_a_forward_say(name):
    model = Forward(CASES[name][0]).eval()
    with torch.no_grad():
        for link in consecutive_layers(model, layers_of(model)):
            assert_link(model, torch.randn(2, 3, 8, 8), link)


# --------------------------------------------------------------------------------------------------- tracing


def test_shared_weights_are_no_neighbours():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    assert found(model) == chain_of(["0", "1", "2", "3"])
    model[1].weight = model[3].weight
    assert found(model) == []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.append(model[0])
    assert found(model) == []


def test_the_model_is_neither_run_nor_changed():
    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
            self.register_buffer("steps", torch.zeros(()))
            self.register_buffer("replaced", torch.zeros(()))
            self.written, self.seen, self.by_name = torch.zeros(3), [], {}
            self.last, self.calls = None, 0

        def forward(self, x: Tensor, double: bool = False, beside: Tensor | None = None) -> Tensor:
            self.steps.add_(1)
            self.replaced = self.replaced + 1
            self.written[1] = 1.0
            self.last, self.calls = self.inner(x), self.calls + 1
            self.seen.append(self.last)
            self.by_name["last"] = self.last
            if beside is not None or double:
                raise AssertionError("optional arguments are not given")
            self.new = self.last * 2
            return self.new

    def refuse(*_: object) -> None:
        raise AssertionError("a hook was called")

    model = Noting()
    for module in model.modules():
        module.register_forward_pre_hook(refuse)
        module.register_forward_hook(refuse)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    parameters, buffers, written = dict(model.named_parameters()), dict(model.named_buffers()), model.written
    assert found(model) == [("inner.0", "inner.2", 1)]
    assert model.last is None
    assert not hasattr(model, "new")
    assert model.calls == 0
    assert (model.seen, model.by_name) == ([], {})
    assert model.written is written
    assert model.written.tolist() == [0, 0, 0]
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)
    copy.deepcopy(model)


def test_subclasses_of_layers_and_wrappers_of_models():
    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            rest = -x.shape[-1] % self.stride[0]
            return super().forward(functional.pad(x, (0, rest, 0, rest)) if rest > 0 else x)

    class Norm(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Padded(3, 4, 3, 2), Norm(4), nn.Sequential(nn.ReLU(), Padded(4, 4, 3)))
    assert found(model) == [("0", "2.1", 1)]
    assert found(nn.DataParallel(model)) == [("module.0", "module.2.1", 1)]
    assert found(torch.compile(model)) == [("_orig_mod.0", "_orig_mod.2.1", 1)]


def test_what_cannot_be_traced_is_said():
    model = Forward(lambda m, x: m.b(m.a(x)) if x.sum() > 0 else m.a(x))
    with pytest.raises(ConfigurationError, match=r"prune_dead: Forward cannot be traced by torch.fx, .*control flow"):
        found(model)
    assert not torch.fx._symbolic_trace.is_fx_tracing()


@pytest.mark.parametrize("name", ["norm", "absent", "a.weight"])
def test_names_are_those_of_layers(name):
    with pytest.raises(ConfigurationError, match=f"layer {name}: accepted are names of convolutions"):
        consecutive_layers(Forward(lambda m, x: m.a(x)), [name])


def test_to_look_at_a_model_draws_no_random_numbers():
    """Stochastic depth draws concretely while it is traced."""

    class Stochastic(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 5)

        def forward(self, x):
            return self.second(self.first(x) * float(torch.rand(()) < 2))

    model = Stochastic()
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    assert consecutive_layers(model, ["first", "second"])
    assert torch.rand(()) == expected
