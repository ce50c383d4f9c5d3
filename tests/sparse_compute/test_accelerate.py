"""Accelerated models compute what masked dense ones do, whatever happens to them, and are otherwise the same models."""

import copy
import io
import pickle

import pytest
import torch
from support import small_network
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from zoo import ZOO

import chtconv
from chtconv.errors import ConfigurationError
from chtconv.models import build_model
from chtconv.sparse_compute import acceleration, backends
from chtconv.sparse_compute.blocked import Blocked
from chtconv.sparse_compute.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled kernels")

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
}
FLAT = [name for name in ZOO if name not in ("video", "audio", "vit_torch")]


def start(build=small_network, backend=None, optimizer="sgd", dtype=torch.float64, **options):
    """Model, optimizer and topology; the same at every call but for the backend."""
    torch.manual_seed(0)
    model = build().to(dtype)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    options = {"sparsity": 0.8, "method": "static", "seed": 3} | options
    topology = chtconv.sparsify(model, optimizer, **options)
    if backend:
        assert chtconv.accelerate(model, topology, backend=backend) is model
    return model, optimizer, topology


def pair(build=small_network, **options):
    return start(build, **options), start(build, "sparse", **options)


def batch(size=9, seed=0, dtype=torch.float64, shape=(3, 8, 8)):
    return torch.randn(size, *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def step(model, optimizer, images, clip=None, zero=True):
    """A training step: what it computed, after it."""
    if zero:
        optimizer.zero_grad()
    torch.manual_seed(1)
    outputs = model(images)
    loss = functional.mse_loss(outputs, torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs))
    loss.backward()
    norm = clip and nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return {"loss": loss.detach(), "norm": norm, "gradients": gradients, "state": model.state_dict()}


def assert_agree(one, other, **tolerance):
    torch.testing.assert_close(other, one, **tolerance)


def kinds(topology):
    return {name: backend.kind for name, backend in backends(topology).items()}


# ---- The same steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", FLAT)
def test_a_step_of_every_network_is_that_of_the_dense_backend(name, optimizer):
    case = ZOO[name]
    options = {"optimizer": optimizer, "layers": case.layers, "sparsity": 0.7}
    (dense, *rest), (sparse, other, topology) = pair(case.build, **options)
    images = case.inputs(9).double()
    for _ in range(2):
        assert_agree(step(dense, rest[0], images, clip=0.1), step(sparse, other, images, clip=0.1))
    assert "sparse" in kinds(topology).values()


@pytest.mark.parametrize("size", [3, 9])
@pytest.mark.parametrize("name", [name for name in FLAT if name != "vit"])  # its attention has no second derivative
def test_a_step_with_a_penalty_on_gradients_is_that_of_the_dense_backend(name, size):
    """As for flat minima: the backward pass is differentiated."""
    case = ZOO[name]
    images = case.inputs(size).double()

    def penalised(model, optimizer, topology):
        torch.manual_seed(1)
        loss = model(images).square().mean()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = dict(zip(trained, torch.autograd.grad(loss, trained.values(), create_graph=True), strict=True))
        # Before they are accumulated, gradients of dense layers are not zero off the mask.
        gradients |= {name: gradients[name] * mask for name, mask in topology.masks.items()}
        (loss + sum(each.square().sum() for each in gradients.values())).backward()
        optimizer.step()
        return {
            "loss": loss.detach(),
            "gradients": {name: p.grad for name, p in trained.items()},
            "state": model.state_dict(),
        }

    dense, sparse = pair(case.build, layers=case.layers, sparsity=0.7)
    assert_agree(penalised(*dense), penalised(*sparse))
    assert "sparse" in kinds(sparse[2]).values()


@pytest.mark.parametrize("size", [1, 3, 8, 17])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_step_of_vgg_for_every_size_of_batch(size, memory_format):
    def build():
        return build_model("vgg16", 10, seed=0, width=1 / 16, head=16).to(memory_format=memory_format)

    (dense, one, _), (sparse, other, topology) = pair(build, sparsity=0.7, dtype=torch.float32)
    images = batch(size, dtype=torch.float32, shape=(3, 32, 32)).contiguous(memory_format=memory_format)
    expected, found = step(dense, one, images, clip=1.0), step(sparse, other, images, clip=1.0)
    # Batch norm over as few as 4 numbers makes much of rounding.
    assert_agree(expected, found, rtol=1e-3, atol=1e-4)
    assert set(kinds(topology).values()) == {"sparse"}
    weight, other = dense.features[3].weight.grad, sparse.features[3].weight.grad
    assert weight.stride() == other.stride()


def test_gradients_are_dense_in_shape_and_zero_off_the_mask_before_the_step():
    model, _, topology = start(backend="sparse")
    for _ in range(2):
        model(batch()).sum().backward()
        for name, mask in topology.masks.items():
            gradient = model.get_parameter(name).grad
            assert gradient.layout == torch.strided
            assert gradient[mask].any()
            assert not gradient[~mask].any()


def test_gradients_of_several_batches_add_up():
    (dense, one, _), (sparse, other, _) = pair()
    for size in (9, 3):
        dense(batch(size)).square().mean().backward()
        sparse(batch(size)).square().mean().backward()
    assert_agree(step(dense, one, batch(), zero=False), step(sparse, other, batch(), zero=False))


def test_evaluation_and_inference_mode():
    (dense, *_), (sparse, *_) = pair()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for training in (False, True):
            with mode():
                assert_agree(dense.train(training)(batch()), sparse.train(training)(batch()).clone())


def test_what_hooks_and_the_caller_see_has_the_shape_that_it_has_otherwise():
    seen = {"dense": [], "sparse": []}
    for key, (model, optimizer, _) in zip(seen, pair(), strict=True):
        for module in model:
            module.register_forward_pre_hook(lambda m, args, k=key: seen[k].append(args[0].shape))
            module.register_forward_hook(lambda m, args, out, k=key: seen[k].append((out.shape, out.sum().item())))
            module.register_full_backward_hook(lambda m, gi, go, k=key: seen[k].append((go[0].shape, go[0].norm())))
        step(model, optimizer, batch())
    assert len(seen["dense"]) == 3 * 8
    assert_agree(seen["dense"], seen["sparse"])


def test_frozen_layers():
    (dense, one, _), (sparse, other, _) = pair()
    for model in (dense, sparse):
        model[0].weight.requires_grad_(False)
        model[3].weight.requires_grad_(False)
        model[3].bias.requires_grad_(False)
    assert_agree(step(dense, one, batch()), step(sparse, other, batch()))
    assert sparse[0].weight.grad is None
    for parameter in sparse.parameters():
        parameter.requires_grad_(False)
    assert not sparse(batch()).requires_grad


def test_layers_that_get_unusual_input_are_dense_for_that_call():
    (dense, *_), (sparse, _, topology) = pair(lambda: nn.Conv2d(3, 4, 3, padding="same"))
    assert_agree(dense(batch()[0]), sparse(batch()[0]))
    assert "shape (3, 8, 8)" in backends(topology)["weight"].reason
    assert sparse(batch(0)).shape == (0, 4, 8, 8)
    with pytest.raises(RuntimeError, match="expected input"):
        sparse(batch(shape=(4, 8, 8)))
    with pytest.raises(RuntimeError, match="type"):
        sparse(batch().float())
    assert_agree(dense(batch()), sparse(batch()))
    assert backends(topology)["weight"] == ("sparse", "", None, None)


@pytest.mark.parametrize("size", [3, 9])
def test_autocast(size):
    (dense, one, _), (sparse, other, topology) = pair(dtype=torch.float32)
    results = []
    for model, optimizer in ((dense, one), (sparse, other)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(batch(size, dtype=torch.float32)).square().mean()
        loss.backward()
        results.append([loss.detach().float(), *(p.grad for p in model.parameters())])
    assert_agree(*results, rtol=0.05, atol=0.02)
    assert set(kinds(topology).values()) == {"sparse"}
    assert all(p.grad.dtype == torch.float32 for p in sparse.parameters())


# ---- Evolution -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["set", "cht", "chts", "rigl", "snfs", "granet"])
def test_links_evolve_as_with_the_dense_backend(method):
    options = {"method": method, "interval": 2, "total_steps": 12}
    (dense, one, expected), (sparse, other, found) = pair(**options)
    before = found.masks
    for index in range(6):
        images = batch(seed=index)
        assert_agree(step(dense, one, images), step(sparse, other, images))
        assert found.evolutions == expected.evolutions == (index + 1) // 2
        assert_agree(expected.masks, found.masks)
    assert not all(torch.equal(mask, before[name]) for name, mask in found.masks.items())
    assert found.stats() == expected.stats()


@pytest.mark.parametrize("after_the_forward_pass", [False, True])
def test_gradients_can_be_asked_for_by_hand(after_the_forward_pass):
    masks = []
    for model, _, topology in pair(method="rigl", interval=1000):
        if not after_the_forward_pass:
            topology.capture_gradients()
        loss = model(batch()).square().mean()
        if after_the_forward_pass:
            topology.capture_gradients()
        loss.backward()
        topology.evolve()
        masks.append(topology.masks)
    assert_agree(*masks)


@pytest.mark.parametrize("size", [3, 9])
def test_the_default_device_is_not_that_of_the_model(size):
    images, states = batch(size), []
    for backend, device in ((None, "cpu"), ("sparse", "meta")):
        model, optimizer, topology = start(method="rigl", interval=2)
        with torch.device(device):
            if backend:
                chtconv.accelerate(model, topology, backend=backend)
            for _ in range(4):
                optimizer.zero_grad()
                model(images).square().mean().backward()
                optimizer.step()
        states.append(model.state_dict())
    assert_agree(*states)


def test_two_topologies_of_one_model():
    def build(backend):
        torch.manual_seed(0)
        model = small_network().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"interval": 2, "sparsity": 0.7}
        topologies = [chtconv.sparsify(model, optimizer, layers=[each], **options) for each in ("0", "3")]
        if backend:
            for topology in topologies:
                chtconv.accelerate(model, topology, backend=backend)
        return model, optimizer, topologies

    (dense, one, _), (sparse, other, (first, second)) = build(None), build("sparse")
    for index in range(4):
        assert_agree(step(dense, one, batch(seed=index)), step(sparse, other, batch(seed=index)))
    assert (list(backends(first)), list(backends(second))) == (["0.weight"], ["3.weight"])
    first.detach()
    assert (type(sparse[0]), kinds(second)) == (nn.Conv2d, {"3.weight": "sparse"})
    assert type(sparse[3]) is not nn.Conv2d


@pytest.mark.parametrize("order", [("topology", "model"), ("model", "topology")])
def test_states_are_loaded_in_any_order(order):
    model, optimizer, topology = start(method="set", interval=2)
    for index in range(4):
        step(model, optimizer, batch(seed=index))
    state = {"model": copy.deepcopy(model.state_dict()), "topology": topology.state_dict()}
    (dense, one, _), (sparse, other, found) = pair(method="set", interval=2)
    for target, own, its in ((dense, one, _), (sparse, other, found)):
        step(target, own, batch())
        for each in order:
            {"model": target, "topology": its}[each].load_state_dict(state[each])
        target.eval()
    assert_agree(model.eval()(batch()), sparse(batch()))
    assert_agree(step(dense, one, batch()), step(sparse, other, batch()))
    assert set(kinds(found).values()) == {"sparse"}


def test_weights_off_the_mask_count_until_they_are_cut():
    (dense, *_), (sparse, optimizer, topology) = pair()
    sparse(batch())
    whole = small_network().double().state_dict()
    for model in (dense, sparse):
        model.load_state_dict(whole)
    assert_agree(dense(batch()), sparse(batch()))
    assert "not zero off the mask" in backends(topology)["3.weight"].reason
    topology.enforce()
    step(sparse, optimizer, batch())
    sparse(batch())
    assert set(kinds(topology).values()) == {"sparse"}


# ---- The same model --------------------------------------------------------------------------------------------------


def test_the_model_is_the_same_to_everyone_else():
    (dense, *_), (sparse, optimizer, topology) = pair()
    assert repr(sparse) == repr(dense)
    assert list(sparse.state_dict()) == list(dense.state_dict())
    assert all(isinstance(sparse[index], nn.Conv2d) for index in (0, 3, 5))
    assert type(sparse[0]).__name__ == "Conv2d"
    nodes = [str(node) for node in torch.fx.symbolic_trace(dense).graph.nodes]
    assert [str(node) for node in torch.fx.symbolic_trace(sparse).graph.nodes] == nodes
    assert len(topology.masks) == 3
    step(sparse, optimizer, batch())
    assert {"0.weight", "3.weight"} <= set(sparse.state_dict())
    assert chtconv.count_flops(sparse, batch(1)) == chtconv.count_flops(dense, batch(1))


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": _saved,
    "shallow": lambda model: nn.Sequential(*map(copy.copy, model)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_plain_and_dense(how):
    model, optimizer, _ = start(backend="sparse")
    step(model, optimizer, batch())
    other = COPIES[how](model)
    assert [type(module) for module in other] == [type(module) for module in small_network()]
    assert not [key for key in vars(other[0]) if key in ("_chtconv_computation", "_chtconv_number", "forward")]
    assert_agree(model.eval()(batch()), other.eval()(batch()))
    assert isinstance(model[3](torch.randn(9, 8, 8, 8).double()), Blocked)


def test_averages_follow():
    model, optimizer, topology = start(backend="sparse", method="set", interval=1)
    average = AveragedModel(model)
    topology.follow(average)
    for index in range(3):
        step(model, optimizer, batch(seed=index))
        average.update_parameters(model)
    topology.evolve()
    for name, mask in topology.masks.items():
        weight = average.module.get_parameter(name)
        assert weight[mask].any()
        assert not weight[~mask].any()
    assert type(average.module[0]) is nn.Conv2d


def test_detached_topologies_leave_plain_models():
    (dense, one, expected), (sparse, other, topology) = pair()
    for t in (expected, topology):
        t.detach()
    assert all(type(module) is type(same) for module, same in zip(sparse, dense, strict=True))
    assert not [key for key in vars(sparse[0]) if key.startswith("_chtconv")]
    assert_agree(step(dense, one, batch()), step(sparse, other, batch()))
    assert topology.acceleration is None


def test_dense_takes_it_back():
    model, _, topology = start(backend="sparse")
    chtconv.accelerate(model, topology, backend="dense")
    assert type(model[0]) is nn.Conv2d
    assert backends(topology)["0.weight"] == ("dense", "not accelerated", None, None)
    chtconv.accelerate(model, topology, backend="sparse")
    chtconv.accelerate(model, topology, backend="sparse")
    assert type(model[0]).__mro__[2] is nn.Conv2d
    assert isinstance(model[0](batch()), Blocked)


@torch.no_grad()
def test_models_moved_and_converted():
    model, _, topology = start(backend="sparse")
    expected = model.eval()(batch())
    assert_agree(expected.float(), model.float()(batch().float()), rtol=1e-4, atol=1e-5)
    assert set(kinds(topology).values()) == {"sparse"}
    model.bfloat16()(batch().bfloat16())
    assert backends(topology)["0.weight"].reason == "its weight is torch.bfloat16"
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float()(batch().float())
        assert set(kinds(topology).values()) == {"sparse"}
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.to("meta")(batch(dtype=torch.float32).to("meta")).device.type == "meta"


def test_weights_computed_from_others_are_dense():
    class Twice(nn.Module):
        def forward(self, weight):
            return weight * 2 + 1

    (dense, *_), (sparse, _, topology) = pair()
    for model in (dense, sparse):
        parametrize.register_parametrization(model[3], "weight", Twice())
    assert_agree(dense(batch()), sparse(batch()))
    assert kinds(topology) == {"0.weight": "sparse", "3.weight": "dense", "5.weight": "sparse"}
    assert_agree(dense.eval()(batch()), copy.deepcopy(sparse).eval()(batch()))


def test_weights_of_functional_calls_are_dense():
    model, _, _ = start(backend="sparse")
    weights = {name: torch.randn_like(weight) for name, weight in model.eval().named_parameters()}
    expected = torch.func.functional_call(start()[0].eval(), weights, batch())
    assert_agree(expected, torch.func.functional_call(model, weights, batch()))


@pytest.mark.parametrize("compiler", [lambda call: call, lambda call: torch.compile(call, backend="aot_eager")])
@pytest.mark.filterwarnings("ignore")
def test_aliases_of_the_weights_in_functional_calls_have_dense_gradients(compiler):
    (dense, *_), (sparse, _, topology) = pair()
    found = []
    for model in (dense, sparse):
        weights = {name: weight.detach().requires_grad_() for name, weight in model.named_parameters()}
        call = compiler(lambda weights, model=model: torch.func.functional_call(model, weights, batch()))
        gradients = torch.autograd.grad(call(weights).square().sum(), [*weights.values()])
        found.append(dict(zip(weights, gradients, strict=True)))
    assert_agree(*found)
    assert all(found[1][name][~mask].any() for name, mask in topology.masks.items())


# ---- Transforms ------------------------------------------------------------------------------------------------------


def _gradients_by_image(model):
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, batch())


def _tangent(model):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(batch(), batch(seed=1))
        return torch.autograd.forward_ad.unpack_dual(model(dual)).tangent


TRANSFORMS = {
    "vmap": _gradients_by_image,
    "forward": _tangent,
    "export": lambda model: torch.export.export(model, (batch(),)).module()(batch()),
    "trace": lambda model: torch.jit.trace(model, batch())(batch(seed=1)),
}


@pytest.mark.parametrize("how", [*TRANSFORMS, "compiled"])
@pytest.mark.filterwarnings("ignore")
def test_transforms_see_the_dense_layers(how):
    (dense, *_), (sparse, *_) = pair()
    transform = TRANSFORMS.get(how) or torch.compile(_gradients_by_image, backend="aot_eager")
    assert_agree(transform(dense.eval()), transform(sparse.eval()))


def test_exported_graphs_hold_no_kernels():
    model, *_ = start(backend="sparse")
    assert "chtconv" not in str(torch.export.export(model.eval(), (batch(),)).graph)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ["sparse", "auto"])
def test_checkpointing(backend, reentrant):
    (dense, one, _), (sparse, other, _) = start(), start(backend=backend)
    images = batch().requires_grad_()
    for _ in range(2):
        other.zero_grad()
        loss = checkpoint(sparse, images, use_reentrant=reentrant).square().mean()
        loss.backward()
        other.step()
        one.zero_grad()
        expected = dense(images).square().mean()
        expected.backward()
        one.step()
        assert_agree(expected, loss)


def test_operations_are_counted_as_those_of_dense_layers():
    counts = []
    for model, *_ in pair():
        with FlopCounterMode(display=False) as counter:
            model(batch()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def _showing(code):
    def backend(graph, inputs):
        code.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return backend


@pytest.mark.parametrize("size", [3, 9])
@pytest.mark.parametrize("method", ["chts", "rigl"])
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_models_need_no_break_and_are_not_compiled_anew(method, size):
    (dense, one, expected), (sparse, other, found) = pair(method=method, interval=2)
    code = []
    compiled = torch.compile(sparse, backend=_showing(code), fullgraph=True)
    for index in range(5):
        with torch.compiler.set_stance("default" if index == 0 else "fail_on_recompile"):
            images = batch(size, seed=index)
            result = step(compiled, other, images)
            reference = step(dense, one, images)
            assert_agree(reference["loss"], result["loss"])
            assert_agree(list(reference["gradients"].values()), list(result["gradients"].values()))
    assert_agree(expected.masks, found.masks)
    assert found.evolutions == 2
    assert set(kinds(found).values()) == {"sparse"}
    assert [text.count("chtconv.convolution") for text in code] == [3]
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_parts_of_a_model_can_be_compiled():
    (dense, *_), (sparse, *_) = pair()
    sparse[3] = torch.compile(sparse[3], backend="aot_eager")
    assert_agree(dense(batch()), sparse(batch()))


# ---- What stays dense ------------------------------------------------------------------------------------------------


class OwnForward(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


class OwnName(nn.Conv2d):
    pass


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.circular = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.own = OwnForward(4, 4, 3)
        self.named = OwnName(4, 4, 3)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2)
        self.line = nn.Conv1d(4, 4, 3)

    def forward(self, x):
        return self.line(self.up(self.named(self.own(self.circular(x)))).flatten(2))


def test_layers_that_cannot_be_sparse_say_why():
    (dense, one, _), (sparse, other, topology) = pair(Mixed, sparsity=0.5)
    assert_agree(step(dense, one, batch()), step(sparse, other, batch()))
    assert {name: (kind, reason) for name, (kind, reason, *_) in backends(topology).items()} == {
        "circular.weight": ("dense", "padding_mode='circular'"),
        "own.weight": ("dense", "its class OwnForward has a forward of its own"),
        "named.weight": ("sparse", ""),
        "up.weight": ("dense", "a ConvTranspose2d is no 2-D convolution"),
        "line.weight": ("dense", "a Conv1d is no 2-D convolution"),
    }
    assert type(sparse.own) is OwnForward
    assert isinstance(sparse.named, OwnName)
    assert type(copy.deepcopy(sparse).named) is OwnName


def test_without_kernels_everything_is_dense(monkeypatch):
    monkeypatch.setattr(acceleration, "library", lambda: None)
    (dense, one, _), (sparse, other, topology) = pair()
    assert type(sparse[0]) is nn.Conv2d
    assert set(backends(topology).values()) == {("dense", "there are no compiled kernels", None, None)}
    assert_agree(step(dense, one, batch()), step(sparse, other, batch()))


def test_errors_name_what_is_accepted():
    model, _, topology = start()
    with pytest.raises(ConfigurationError, match=r"topology=None: accepted is what chtconv\.sparsify returned"):
        chtconv.accelerate(model, None)
    with pytest.raises(ConfigurationError, match=r"unknown backend 'sparce': did you mean 'sparse'\? Accepted: 'auto'"):
        chtconv.accelerate(model, topology, backend="sparce")
    with pytest.raises(
        ConfigurationError, match=r"does not have layer 0\.weight .*accepted is the model that sparsify"
    ):
        chtconv.accelerate(copy.deepcopy(model), topology)
    topology.detach()
    with pytest.raises(ConfigurationError, match="was detached; call sparsify again"):
        chtconv.accelerate(model, topology)


def test_nothing_is_kept_alive():
    import gc
    import weakref

    model, optimizer, topology = start(backend="auto")
    step(model, optimizer, batch())
    kept = weakref.ref(topology._layers[0])
    expected = model.eval()(batch())
    del optimizer, topology
    gc.collect()
    assert kept() is None
    assert_agree(expected, model(batch()))


def test_a_bias_of_another_shape_is_left_to_torch():
    """Which refuses it; the kernels would read beyond its end."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    topology = chtconv.sparsify(model, torch.optim.SGD(model.parameters()), sparsity=0.9)
    chtconv.accelerate(model, topology, backend="sparse")
    images = torch.randn(16, 3, 8, 8)
    model(images)
    model[0].bias.data = torch.zeros(1)
    with pytest.raises(RuntimeError, match="bias"):
        model(images)


def test_what_somebody_writes_off_the_mask_counts_until_the_next_step():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.9)
    chtconv.accelerate(model, topology, backend="sparse")
    images = torch.randn(16, 3, 8, 8)

    def step():
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    def right():
        with torch.no_grad():
            expected = nn.functional.conv2d(images, model[0].weight, model[0].bias)
            return torch.allclose(model(images), expected, atol=1e-4)

    assert right()
    step()
    assert right()
    assert next(iter(backends(topology).values())).kind == "sparse"
    nn.init.kaiming_normal_(model[0].weight)
    assert model[0].weight.count_nonzero() == model[0].weight.numel()
    assert right()
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert right()
    step()
    assert model[0].weight.count_nonzero() < model[0].weight.numel() / 2
    assert right()
