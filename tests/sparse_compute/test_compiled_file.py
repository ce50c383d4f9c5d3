"""Compiled models on disk: small, the same when they are read again, and no file of any kind is run or crashes."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from compiled_models import Forward, identical, same, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from chtconv.errors import ConfigurationError
from chtconv.models import build_model
from chtconv.sparse_compute import compiled_file, positions
from chtconv.sparse_compute.inference import SparseModel, compile_sparse, load_compiled


@pytest.mark.parametrize(("sparsity", "whole", "half"), [(0.7, 0.33, 0.18), (0.9, 0.12, 0.07), (0.95, 0.06, 0.04)])
def test_files_are_as_small_as_we_say(tmp_path, sparsity, whole, half):
    model = trained(build_model("vgg16", 10, width=0.25, seed=0), sparsity)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    compiled = compile_sparse(model)
    images = torch.randn(4, 3, 32, 32)
    expected = compiled(images)
    for values, share in ((None, whole), (torch.float16, half), (torch.bfloat16, half)):
        compiled.save(tmp_path / "file", values=values)
        size = (tmp_path / "file").stat().st_size
        assert size / (tmp_path / "dense.pt").stat().st_size == pytest.approx(share, abs=0.006)
        loaded = load_compiled(tmp_path / "file")
        same(loaded(images), expected, {None: 0.0, torch.float16: 4e-3, torch.bfloat16: 3e-2}[values])


def test_types_that_do_not_hold_the_weights_are_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    model[0].weight.data.fill_(1e5)
    compiled = compile_sparse(model)
    with pytest.raises(ConfigurationError, match=r"step 0 \(conv2d\): a weight of 1e\+05: accepted in torch\.float16"):
        compiled.save(tmp_path / "file", values=torch.float16)
    with pytest.raises(ConfigurationError, match=r"values=torch\.int8: accepted are None, torch\.float16"):
        compiled.save(tmp_path / "file", values=torch.int8)
    assert not list(tmp_path.iterdir())
    compiled.save(tmp_path / "file", values=torch.bfloat16)
    assert load_compiled(tmp_path / "file")(torch.ones(1, 1, 1, 1)).item() == pytest.approx(1e5, rel=1 / 256)


@pytest.mark.parametrize("layer", [nn.Linear(64, 4), nn.Conv2d(3, 8, 3)])
def test_a_sparse_layer_of_a_constant_is_saved(tmp_path, layer):
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.query = (
                layer,
                nn.Parameter(torch.randn((2, 64) if len(layer.weight) == 4 else (9, 3, 4, 4))),
            )

        def forward(self, x):
            return self.layer(self.query) + x

    compiled, x = compile_sparse(trained(Asking(), 0.95), backend="sparse"), torch.randn(1)
    compiled.save(tmp_path / "file")
    identical(load_compiled(tmp_path / "file")(x), compiled(x))


def test_what_could_not_be_read_again_is_not_saved(tmp_path, monkeypatch):
    compiled = compile_sparse(trained(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), 0.97), backend="sparse")
    monkeypatch.setattr(compiled_file, "_MOST", 2 * 64 * 64)
    with pytest.raises(ConfigurationError, match=r"step 1 \(linear\): 4096 numbers: accepted are fewer than 8192"):
        compiled.save(tmp_path / "file")
    monkeypatch.setattr(compiled_file, "_MOST", 2 * 64 * 64 + 1)
    compiled.save(tmp_path / "file")
    load_compiled(tmp_path / "file")


def test_all_weights_are_saved_in_half_the_bytes(tmp_path):
    layers = nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 8)
    compile_sparse(trained(nn.Sequential(*layers), 0.0)).save(tmp_path / "file", values=torch.float16)
    with safe_open(tmp_path / "file", framework="pt") as file:
        types = {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert {kind for key, kind in types.items() if key.endswith("weight")} == {torch.float16}
    assert {kind for key, kind in types.items() if key.endswith("bias")} == {torch.float32}


def test_many_sparse_tensors_may_not_ask_for_much_together(tmp_path):
    content, metadata = small_file(tmp_path / "file")
    program = json.loads(metadata["program"])
    weight = step_of(program, "conv2d", 1)["args"]["weight"]
    # One of them alone would be made.
    program["output"] = [weight | {"shape": [2**30]}] * 2
    write(tmp_path / "file", content, metadata | {"program": json.dumps(program)})
    with pytest.raises(ConfigurationError, match="product below 2147483648, those of all sparse tensors together"):
        load_compiled(tmp_path / "file")


@settings(max_examples=150)
@given(size=st.integers(1, 3000), density=st.sampled_from([0.0, 1e-3, 0.02, 0.2, 0.9, 1.0]), seed=st.integers(0, 99))
def test_positions_come_back(size, density, seed):
    where = torch.from_numpy(np.flatnonzero(np.random.default_rng(seed).random(size) < density))
    high, low, low_bits = positions.encode(where)
    assert torch.equal(positions.decode(high, low, low_bits, len(where), size), where)
    assert len(high) <= -(-size // 8)
    if len(where):
        with pytest.raises(ConfigurationError, match="accepted are positions below"):
            positions.decode(high, low, low_bits, len(where), int(where[-1]))


@settings(max_examples=150)
@given(high=st.binary(max_size=12), low=st.binary(max_size=6), low_bits=st.integers(-1, 22), links=st.integers(0, 40))
def test_any_bytes_are_positions_in_order_or_refused(high, low, low_bits, links):
    parts = [torch.tensor(list(each), dtype=torch.uint8) for each in (high, low)]
    try:
        where = positions.decode(*parts, low_bits, links, 500)
    except ConfigurationError:
        return
    assert len(where) == links
    assert all(0 <= each < 500 for each in where.tolist())
    assert (where.diff() > 0).all()


def test_random_positions_take_little_more_than_they_must():
    for density in (0.3, 0.1, 0.05):
        where = torch.from_numpy(np.flatnonzero(np.random.default_rng(0).random(200_000) < density))
        high, low, _ = positions.encode(where)
        entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density))
        assert 8 * (len(high) + len(low)) / 200_000 < (1.15 if density > 0.2 else 1.06) * entropy


def small_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file of a small model holds: dense and sparse layers, a sum and a constant."""
    torch.manual_seed(0)
    model = Forward(lambda m, x: m.head((m.scale + m.norm(m.b(m.a(x))) + m.a(x)).mean((2, 3))))
    model.b = nn.Conv2d(4, 4, 5, padding=2)
    compile_sparse(trained(model, 0.9), backend="sparse").save(path)
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()  # noqa: SIM118


def write(path: Path, content: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a file whose hash is right, whatever it holds."""
    metadata = metadata | {"hash": compiled_file.digest(content, metadata)}
    path.write_bytes(safetensors.torch.save(content, metadata))


def step_of(program: dict, op: str, number: int = 0) -> dict:
    return [each for each in program["steps"] if each["op"] == op][number]


def changed(op: str, **args: object):
    return lambda program: step_of(program, op, 1 if op == "conv2d" else 0)["args"].update(args)


HOSTILE = {
    "unknown word": (lambda p: p["steps"][0].update(op="system"), "unknown operation 'system'"),
    "word of ours": (lambda p: p["steps"][0].update(op="call"), "unknown operation 'call'"),
    "input as a step": (lambda p: p["steps"][0].update(op="input"), "unknown operation 'input'"),
    "later step": (changed("add", other={"step": 3}), "takes the result of step 3; accepted are earlier steps"),
    "itself": (lambda p: p["steps"][0]["args"].update(input={"step": 1}), "takes the result of step 1; accepted are"),
    "before the first": (changed("mean", input={"step": -1}), "takes the result of step -1"),
    "no number": (changed("mean", input={"step": True}), "takes the result of step True"),
    "missing argument": (lambda p: step_of(p, "mean")["args"].pop("input"), "input is missing; accepted is a tensor"),
    "unknown argument": (changed("mean", out={"step": 0}), "out; accepted are input, dim, keepdim"),
    "wrong argument": (changed("mean", dim="x"), "dim='x'; accepted is whole numbers"),
    "huge number": (changed("mean", dim=10**30), "dim=1000000"),
    "infinite number": (changed("add", other=math.inf), "other=inf; accepted is a tensor or a number"),
    "unknown object": (changed("mean", input={"file": "x"}), "accepted are steps, tensors, tuples"),
    "missing tensor": (changed("linear", weight={"tensor": "x", "type": "float32"}), "tensor 'x' is missing"),
    "unknown type": (changed("linear", weight={"tensor": "x", "type": "object"}), "tensor 'x' is missing|unknown type"),
    "stride of three": (changed("conv2d", stride=[1, 1, 1]), r"stride=\[1, 1, 1\]; accepted are one number, or 2"),
    "stride of three, as a tuple": (
        changed("conv2d", stride={"tuple": [1, 1, 2]}),
        r"stride=\(1, 1, 2\); accepted are one number, or 2",
    ),
    "stride of zero": (changed("conv2d", stride=0), "stride=0; accepted is whole numbers above 0"),
    "negative padding": (changed("conv2d", padding=[-1, 0]), r"padding=\[-1, 0\]; accepted is whole numbers from 0"),
    "groups": (changed("conv2d", groups=3), "a weight of shape .* in 3 groups; accepted are 4 axes"),
    "low bits": (lambda p: step_of(p, "conv2d", 1)["args"]["weight"].update(low_bits=63), "low_bits=63; accepted"),
    "low bits, others": (lambda p: step_of(p, "conv2d", 1)["args"]["weight"].update(low_bits=0), "low bits each"),
    "smaller shape": (
        lambda p: step_of(p, "conv2d", 1)["args"]["weight"].update(shape=[4, 1, 5, 5]),
        "accepted are positions below 100",
    ),
    "larger shape": (
        lambda p: step_of(p, "conv2d", 1)["args"]["weight"].update(shape=[8, 4, 5, 5]),
        r"a bias of shape \[4\]; accepted is \[8\]",
    ),
    "other rank": (
        lambda p: step_of(p, "conv2d", 1)["args"]["weight"].update(shape=[4, 4, 25]),
        r"a weight of shape \[4, 4, 25\]",
    ),
    "huge shape": (
        lambda p: step_of(p, "conv2d", 1)["args"]["weight"].update(shape=[2**20, 2**20, 5, 5]),
        "accepted are sizes above 0 with a product below",
    ),
    "no list": (lambda p: p.update(steps={}), "steps: accepted is a list"),
    "no names": (lambda p: p.update(inputs=[1]), "inputs: accepted is a list of names"),
    "no output": (lambda p: p.pop("output"), "accepted is an object of inputs, steps, output"),
    "output of nothing": (lambda p: p.update(output={"step": 99}), "takes the result of step 99"),
    "no step": (lambda p: p["steps"].insert(0, 7), "step 1: 7; accepted is an object of op, name, args"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_programs_are_refused(tmp_path, case):
    tamper, message = HOSTILE[case]
    content, metadata = small_file(tmp_path / "file")
    program = json.loads(metadata["program"])
    tamper(program)
    write(tmp_path / "file", content, metadata | {"program": json.dumps(program)})
    with pytest.raises(ConfigurationError, match=message) as error:
        load_compiled(tmp_path / "file")
    assert str(error.value).startswith(str(tmp_path / "file"))


def test_hostile_tensors_are_refused(tmp_path):
    path = tmp_path / "file"
    content, metadata = small_file(path)
    assert load_compiled(path)(torch.zeros(1, 3, 6, 6)).shape == (1, 5)
    name = next(key for key in content if key.endswith(".values")).removesuffix(".values")
    for changes, message in (
        ({f"{name}.values": content[f"{name}.values"][1:]}, "index lists of"),
        ({f"{name}.values": content[f"{name}.values"][None]}, "with one axis"),
        ({f"{name}.high": content[f"{name}.high"].int()}, "torch.int32; accepted are torch.uint8"),
        ({f"{name}.high": torch.zeros(50, dtype=torch.uint8)}, "index lists of 0 links"),
        ({f"{name}.low": content[f"{name}.low"][:0]}, "with 0 low bits"),
        ({name.replace("weight", "bias"): torch.zeros(3)}, r"a bias of shape \[3\]"),
    ):
        write(path, content | changes, metadata)
        with pytest.raises(ConfigurationError, match=message):
            load_compiled(path)
    for program in (
        "[" * 100_000,
        "{}",
        "7",
        "",
        '{"inputs": [], "steps": [], "output": ' + "[" * 500 + "]" * 500 + "}",
    ):
        write(path, content, metadata | {"program": program})
        try:
            assert load_compiled(path)() is not None
        except ConfigurationError:
            assert program.count("]") == 0 or program.count("[") > 400 or program in ("{}", "7")
    for other, message in (
        ({"format": "chtconv-compiled-2"}, "of another version: its format is 'chtconv-compiled-2'; accepted is"),
        ({"format": "chtconv-sparse-1"}, "no compiled model: its format is 'chtconv-sparse-1'"),
        ({"hash": "x"}, "is damaged"),
    ):
        path.write_bytes(safetensors.torch.save(content, metadata | other))
        with pytest.raises(ConfigurationError, match=message):
            load_compiled(path)
    path.unlink()
    with pytest.raises(ConfigurationError, match="is no compiled model that can be read"):
        load_compiled(path)


def test_every_damaged_byte_is_noticed(tmp_path):
    path = tmp_path / "file"
    small_file(path)
    good = path.read_bytes()
    images = torch.randn(1, 3, 6, 6)
    expected = load_compiled(path)(images)
    for index in range(0, len(good), 7):
        path.write_bytes(good[:index] + bytes([good[index] ^ (1 << index % 8)]) + good[index + 1 :])
        try:
            loaded = load_compiled(path)
        except ConfigurationError:
            continue
        # Blanks and the like, in what describes the file.
        identical(loaded(images), expected)
    for length in range(0, len(good), 61):
        path.write_bytes(good[:length])
        with pytest.raises(ConfigurationError):
            load_compiled(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small_file(tmp_path_factory.mktemp("whole") / "file")


@settings(max_examples=250)
@given(data=st.data())
def test_damaged_programs_with_a_right_hash_never_crash(tmp_path_factory, whole, data):
    path = tmp_path_factory.getbasetemp() / "damaged-program"
    content, metadata = whole
    text = metadata["program"]
    place = data.draw(st.integers(0, len(text) - 1))
    length = data.draw(st.sampled_from([0, 1, 1, 5]))
    instead = data.draw(st.text('0123456789-{}[]",: abcdefx.\\\ud7ff', max_size=3))
    write(path, content, metadata | {"program": text[:place] + instead + text[place + length :]})
    try:
        assert isinstance(load_compiled(path), SparseModel)
    except ConfigurationError:
        return


@settings(max_examples=100)
@given(data=st.data())
def test_damaged_tensors_with_a_right_hash_never_crash(tmp_path_factory, whole, data):
    path = tmp_path_factory.getbasetemp() / "damaged-tensors"
    content, metadata = whole
    name = data.draw(st.sampled_from([key for key in content if re.search("high|low|values", key)]))
    raw = content[name].clone().view(torch.uint8)
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
        raw[place] = data.draw(st.integers(0, 255))
    write(path, content | {name: raw.view(content[name].dtype)}, metadata)
    try:
        loaded = load_compiled(path)
    except ConfigurationError:
        return
    for batch in (1, 8):
        assert loaded(torch.randn(batch, 3, 6, 6)).shape == (batch, 5)
