"""Sparse checkpoints: bit for bit, smaller by as much as we say, and nothing else is read as one."""

import copy
import math
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import small_network, sparse, train
from torch import nn

import chtconv
from chtconv import checkpoint
from chtconv.checkpoint import load_masks, load_sparse, save_sparse
from chtconv.errors import ConfigurationError
from chtconv.models import build_model

TYPES = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}


def bits(tensor):
    """What is in memory: equal NaN count as equal, and zeros of different sign do not."""
    return tensor.contiguous().view(TYPES[tensor.dtype]) if tensor.dtype in TYPES else tensor


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(list(TYPES)),
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=5),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_weights_and_masks_come_back_bit_for_bit(tmp_path_factory, dtype, shape, density, channels_last, seed):
    path = tmp_path_factory.getbasetemp() / "round-trip.safetensors"
    draw = np.random.default_rng(seed)
    mask = torch.from_numpy(np.asarray(draw.random(shape) < density))
    # Any bits at all, so NaN of every kind, infinities and subnormal numbers too; links that are exactly 0 as well.
    whole = torch.from_numpy(np.asarray(draw.integers(-(2**15), 2**15, shape))).to(TYPES[dtype])
    if dtype in (torch.float32, torch.float64):
        whole = whole << 16
    weight = (whole * mask).to(TYPES[dtype]).view(dtype)
    if channels_last and weight.dim() == 4:
        weight = weight.to(memory_format=torch.channels_last)
    state = {"a.weight": weight, "count": torch.tensor(3), "a.bias": torch.full((2,), -0.0).to(dtype)}
    save_sparse(state, {"a.weight": mask}, path)
    loaded, masks = load_sparse(path), load_masks(path)
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(bits(loaded[name]), bits(tensor))
    assert torch.equal(masks["a.weight"], mask)


def test_a_run_goes_on_from_a_sparse_checkpoint(tmp_path):
    model, optimizer, topology = sparse(sparsity=0.9, method="set", interval=2)
    train(model, optimizer, 4)
    save_sparse(model, topology, tmp_path / "model.safetensors")
    other = small_network()
    other.load_state_dict(load_sparse(tmp_path / "model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    masks = load_masks(tmp_path / "model.safetensors")
    assert all(torch.equal(masks[name], mask) for name, mask in topology.masks.items())
    # Links that have just come are exactly 0, and in the mask nevertheless.
    assert any((mask & (other.get_parameter(name) == 0)).any() for name, mask in masks.items())


@pytest.mark.parametrize(("sparsity", "share"), [(0.7, 0.332), (0.9, 0.132), (0.95, 0.082)])
def test_a_checkpoint_of_vgg16_is_as_small_as_we_say(tmp_path, sparsity, share):
    """A bit for each position and 32 for each active one: density + 1/32 of the dense file."""
    model = build_model("vgg16", num_classes=10, width=0.25, seed=0)
    topology = chtconv.sparsify(
        model, torch.optim.SGD(model.parameters()), sparsity=sparsity, method="static", layers=["*"]
    )
    save_sparse(model, topology, tmp_path / "sparse.safetensors")
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    ratio = (tmp_path / "sparse.safetensors").stat().st_size / (tmp_path / "dense.pt").stat().st_size
    # The rest is names, biases and norms.
    assert ratio == pytest.approx(1 - sparsity + 1 / 32, abs=0.01)
    assert ratio == pytest.approx(share, abs=0.01)


def test_a_model_is_saved_by_the_topology_of_what_wraps_it(tmp_path):
    network = small_network()
    model, _, topology = sparse(torch.compile(network), sparsity=0.8)
    for name, each in {"inner": network, "outer": model}.items():
        save_sparse(each, topology, tmp_path / name)
    inner, outer = (load_sparse(tmp_path / name) for name in ("inner", "outer"))
    assert [f"_orig_mod.{name}" for name in inner] == list(outer)
    assert all(torch.equal(value, outer[f"_orig_mod.{name}"]) for name, value in inner.items())
    assert len(load_masks(tmp_path / "inner")) == len(topology.masks)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_what_wraps_a_model_is_saved_by_the_topology_of_the_model(tmp_path, wrap):
    network, _, topology = sparse(small_network(), sparsity=0.8)
    wrapped = wrap(network)
    save_sparse(wrapped, topology, tmp_path / "model")
    loaded = load_sparse(tmp_path / "model")
    assert list(loaded) == list(wrapped.state_dict())
    assert [name.partition(".")[2] for name in load_masks(tmp_path / "model")] == list(topology.masks)
    wrapped.load_state_dict(loaded)


def test_files_are_of_the_cpu_whatever_the_usual_device(tmp_path):
    weights = {"weight": torch.tensor([[0.0, 1.5], [0.0, 0.0]])}
    with torch.device("meta"):
        save_sparse(weights, {"weight": weights["weight"] != 0}, tmp_path / "file")
        found = load_sparse(tmp_path / "file")
    assert torch.equal(found["weight"], weights["weight"])


def test_tied_weights_and_bare_mappings_of_masks(tmp_path):
    weight = torch.tensor([[0.0, 1.0]])
    save_sparse({"a": weight, "b": weight, "c": weight}, {"a": weight != 0}, tmp_path / "file")
    assert all(torch.equal(each, weight) for each in load_sparse(tmp_path / "file").values())


@pytest.mark.parametrize(
    ("state", "masks", "message"),
    [
        ({"a": torch.ones(2)}, {"b": torch.ones(2) > 0}, "masks of b, and no such weights; those of the model are a"),
        ({"a": torch.ones(2)}, {"a": torch.ones(3) > 0}, r"a: its mask is torch\.bool of shape \[3\]; accepted is"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2)}, r"a: its mask is torch\.float32"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2) < 0}, "a: there are weights off the mask that are not 0"),
        ({"a": torch.ones(2) * math.nan}, {"a": torch.ones(2) < 0}, "a: there are weights off the mask"),
        ({"a": 1.0}, {}, "a is a float; accepted are tensors"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_nothing_is_written(tmp_path, state, masks, message):
    with pytest.raises(ConfigurationError, match=message):
        save_sparse(state, masks, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_files_that_are_missing_foreign_or_damaged_are_refused(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(ConfigurationError, match="is no sparse checkpoint that can be read"):
        load_sparse(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigurationError, match="is no sparse checkpoint that can be read"):
        load_sparse(path)
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ConfigurationError, match=r"is not a file of .*save_sparse .* safetensors\.torch\.load_file"):
        load_masks(path)


def test_every_damaged_byte_is_noticed(tmp_path):
    path = tmp_path / "file"
    weight = torch.tensor([0.0, 1.5, 0.0, -2.0, 3.0])
    save_sparse({"a": weight, "b": torch.ones(2)}, {"a": weight != 0}, path)
    good = path.read_bytes()
    for index in range(len(good)):
        bad = bytearray(good)
        bad[index] ^= 1
        path.write_bytes(bad)
        try:
            loaded = load_sparse(path)
        except ConfigurationError:
            continue
        # Blanks and the like, in what describes the file.
        assert list(loaded) == ["a", "b"], index
        assert torch.equal(loaded["a"], weight), index
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(ConfigurationError):
            load_sparse(path)


def test_topology_state_is_loaded_without_pickle_and_refuses_to_be_copied_itself(tmp_path):
    model, optimizer, topology = sparse(nn.Sequential(nn.Conv2d(3, 8, 3)), method="snfs", stop=9, interval=2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(1, 3, 6, 6)).sum().backward()
        optimizer.step()
    torch.save(topology.state_dict(), tmp_path / "topology.pt")
    state = torch.load(tmp_path / "topology.pt", weights_only=True)
    other = sparse(nn.Sequential(nn.Conv2d(3, 8, 3)), method="snfs", stop=9, interval=2)[2]
    other.load_state_dict(state)
    assert torch.equal(other.masks["0.weight"], topology.masks["0.weight"])
    assert torch.equal(other._layers[0].dense_gradient.momentum, topology._layers[0].dense_gradient.momentum)


def test_a_model_that_holds_its_topology_can_be_copied_and_the_copy_is_plain():
    model, optimizer, topology = sparse(nn.Sequential(nn.Conv2d(3, 8, 3)), method="set", interval=1)
    model.topology = topology
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.topology is None
        copied(torch.randn(1, 3, 6, 6)).sum().backward()
        assert copied[0].weight.grad.all()
    model(torch.randn(1, 3, 6, 6)).sum().backward()
    optimizer.step()
    assert topology.evolutions == 1


def test_weights_that_were_loaded_before_keep_their_masks_where_the_state_is_given():
    model, optimizer, topology = sparse(nn.Sequential(nn.Conv2d(3, 8, 3)), method="set", interval=1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(1, 3, 6, 6)).sum().backward()
        optimizer.step()
    other = nn.Sequential(nn.Conv2d(3, 8, 3))
    other.load_state_dict(model.state_dict())
    again = chtconv.sparsify(
        other, torch.optim.SGD(other.parameters(), lr=0.1), method="set", interval=1, state=topology.state_dict()
    )
    assert torch.equal(again.masks["0.weight"], topology.masks["0.weight"])
    assert torch.equal(other[0].weight, model[0].weight)
    assert (again.step_count, again.evolutions) == (3, 3)


def test_a_wrapped_optimizer_is_unwrapped():
    class Wrapped(torch.optim.Optimizer):
        """As those of Lightning and Accelerate: an optimizer by type that passes everything on."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, closure=None):
            return self.optimizer.step(closure)

    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    optimizer = Wrapped(torch.optim.SGD(model.parameters(), lr=0.1))
    topology = chtconv.sparsify(model, optimizer, method="set", interval=1)
    model(torch.randn(1, 3, 6, 6)).sum().backward()
    optimizer.step()
    assert topology.step_count == topology.evolutions == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_states_of_torch_distributed_checkpoint(order):
    """Its set_state_dict takes an optimizer step without rate and gradients, which is none of ours."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def start():
        model = small_network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, chtconv.sparsify(model, optimizer, sparsity=0.8, method="set", interval=1)

    model, optimizer, topology = start()
    train(model, optimizer, 3)
    states, saved = get_state_dict(model, optimizer), copy.deepcopy(topology.state_dict())
    states = copy.deepcopy(states)
    train(model, optimizer, 2, seed=1)
    other, others_optimizer, others_topology = start()
    load = (
        lambda: set_state_dict(other, others_optimizer, model_state_dict=states[0], optim_state_dict=states[1]),
        lambda: others_topology.load_state_dict(saved),
    )
    for index in order:
        load[index]()
    assert others_topology.step_count == 3
    train(other, others_optimizer, 2, seed=1)
    assert others_topology.step_count == 5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def without(name):
    def change(content, metadata):
        content.pop(name, None)
        metadata.pop(name, None)

    return change


@pytest.mark.parametrize(
    "change",
    [
        without("shapes"),
        without("names"),
        without("bits:0.weight"),
        without("values:0.weight"),
        lambda content, metadata: metadata.update(shapes="{"),
        lambda content, metadata: metadata.update(shapes='["0.weight"]'),
        lambda content, metadata: metadata.update(shapes='{"0.weight": 3}'),
        lambda content, metadata: metadata.update(shapes='{"0.weight": [-1]}'),
        lambda content, metadata: metadata.update(shapes='{"0.weight": ["a"]}'),
        lambda content, metadata: metadata.update(shapes='{"0.weight": [1000000000000]}'),
        lambda content, metadata: metadata.update(names="[[1]]"),
        lambda content, metadata: content.update({"values:0.weight": torch.ones(1)}),
    ],
)
def test_a_file_that_was_made_to_harm_is_refused_whatever_its_hash(change, tmp_path):
    path = tmp_path / "file"
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    mask = torch.rand(4, 3, 3, 3) < 0.5
    model[0].weight.data.mul_(mask)
    save_sparse(model, {"0.weight": mask}, path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, content = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(content, metadata)
    metadata["hash"] = checkpoint._hash(content, metadata)
    safetensors.torch.save_file(content, path, metadata)
    with pytest.raises(ConfigurationError, match="file is damaged"):
        load_sparse(path)
