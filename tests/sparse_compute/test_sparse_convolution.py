"""Sparse convolutions against torch's dense ones, on weights that are masked."""

import contextlib
import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from chtconv.errors import ConfigurationError
from chtconv.sparse_compute.blocked import Blocked, as_blocks, to_blocked, to_dense
from chtconv.sparse_compute.convolution import sparse_conv2d, sparse_outputs
from chtconv.sparse_compute.library import library
from chtconv.sparse_compute.links import Links

kernels = library()
pytestmark = pytest.mark.skipif(kernels is None, reason="the compiled kernels are not there")
SETS = kernels.supported if kernels is not None else ()
TYPES = (torch.float32, torch.float64)


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = library().isa
    library().use(name)
    try:
        yield
    finally:
        library().use(before)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@st.composite
def problems(draw: st.DrawFn) -> dict:
    """A convolution whose output has at least one position."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    window = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)) | st.sampled_from([(1, 1), (3, 3), (5, 5), (7, 7)]))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 3)))
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    extents = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, window, padding, strict=True)]
    return {
        "batch": draw(st.sampled_from([1, 2, 7, 8, 15, 16, 17, 31, 33, 65])),
        "channels": groups * draw(st.integers(1, 9)),
        "kernels": groups * draw(st.integers(1, 9)),
        "size": tuple(draw(st.integers(max(1, extent), max(1, extent) + 9)) for extent in extents),
        "window": window,
        "stride": draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2), (3, 1)])),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "density": draw(st.sampled_from([0.02, 0.1, 0.5, 1.0])),
        "dtype": draw(st.sampled_from(TYPES)),
        "bias": draw(st.booleans()),
        "isa": draw(st.sampled_from(SETS)),
        "seed": draw(st.integers(0, 2**20)),
    }


def tensors(p: dict, *, whole: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Input, weight, bias and mask; whole numbers are small, so that float32 sums of them are exact."""
    generator = torch.Generator().manual_seed(p["seed"])

    def draw(*shape: int) -> Tensor:
        if whole:
            return torch.randint(-4, 5, shape, generator=generator).to(p["dtype"])
        return torch.randn(shape, generator=generator, dtype=p["dtype"])

    shape = (p["kernels"], p["channels"] // p["groups"], *p["window"])
    mask = torch.rand(shape, generator=generator) < p["density"]
    x, weight = draw(p["batch"], p["channels"], *p["size"]), draw(*shape) * mask
    return x, weight, draw(p["kernels"]) if p["bias"] else None, mask


def options(p: dict) -> dict:
    return {key: p[key] for key in ("stride", "padding", "dilation", "groups")}


def passes(function, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The output, and gradients of all inputs for a gradient that depends on nothing but the shape."""
    given_ = [each.clone().requires_grad_() for each in (x, weight, bias) if each is not None]
    y = function(given_[0], given_[1], given_[2] if bias is not None else None)
    gradient = (torch.arange(y.numel()) % 7 - 3).view(y.shape).to(y.dtype)
    return [
        to_dense(each) if each.dim() == 4 else each for each in (y.detach(), *torch.autograd.grad(y, given_, gradient))
    ]


def dense(p: dict, mask: Tensor):
    def function(x, weight, bias):
        return functional.conv2d(x, weight * mask, bias, **options(p))

    return function


def sparse(p: dict, mask: Tensor, **more):
    links = Links.of(mask, p["groups"])

    def function(x, weight, bias):
        return sparse_conv2d(x, weight, bias, links, **options(p), **more)

    return function


@given(problems())
@settings(max_examples=250, deadline=None)
def test_whole_numbers_agree_bit_for_bit(p):
    x, weight, bias, mask = tensors(p, whole=True)
    with instruction_set(p["isa"]):
        found = passes(sparse(p, mask), x, weight, bias)
    for ours, torchs in zip(found, passes(dense(p, mask), x, weight, bias), strict=True):
        assert torch.equal(ours, torchs)


@given(problems())
@settings(max_examples=60, deadline=None)
def test_real_numbers_agree_within_rounding(p):
    x, weight, bias, mask = tensors(p, whole=False)
    with instruction_set(p["isa"]):
        found = passes(sparse(p, mask), x, weight, bias)
    exact = passes(dense(p, mask), x.double(), weight.double(), None if bias is None else bias.double())
    for ours, reference in zip(found, exact, strict=True):
        scale = reference.abs().max().clamp_min(1)
        assert (ours - reference).abs().max() <= 300 * torch.finfo(p["dtype"]).eps * scale


@pytest.mark.parametrize(
    ("channels", "outputs", "window", "padding", "dilation", "stride", "size"),
    [(256, 8, 1, 40, 1, 1, 8), (512, 16, 3, 8, 1, 1, 8), (16, 300, 3, 0, 31, 2, 64), (16, 200, 2, 0, 21, 2, 24)],
)
def test_units_beside_the_map_are_zeros_and_nothing_else(channels, outputs, window, padding, dilation, stride, size):
    """More padding than a tile, or taps further apart, as of the gradient of the input of dilated convolutions."""
    torch.manual_seed(0)
    mask = torch.rand(outputs, channels, window, window) < 0.02
    x = torch.randint(-3, 4, (16, channels, size, size)).float()
    weight = torch.randint(-3, 4, mask.shape) * mask.float()
    p = {"groups": 1, "padding": (padding,) * 2, "dilation": (dilation,) * 2, "stride": (stride,) * 2}
    bias = torch.zeros(outputs)
    for ours, torchs in zip(
        passes(sparse(p, mask), x, weight, bias), passes(dense(p, mask), x, weight, bias), strict=True
    ):
        assert torch.equal(ours, torchs)


CASES = {
    "vgg": {"batch": 33, "channels": 20, "kernels": 70, "size": (8, 8), "window": (3, 3), "padding": (1, 1)},
    "map of one tile": {"batch": 20, "channels": 40, "kernels": 5, "size": (4, 4), "window": (3, 3), "padding": (1, 1)},
    "2x2": {"batch": 90, "channels": 12, "kernels": 6, "size": (2, 2), "window": (3, 3), "padding": (1, 1)},
    "1x1 map": {"batch": 300, "channels": 12, "kernels": 6, "size": (1, 1), "window": (3, 3), "padding": (1, 1)},
    "row": {"batch": 16, "channels": 4, "kernels": 6, "size": (1, 21), "window": (1, 5), "padding": (0, 2)},
    "strided": {"batch": 9, "channels": 6, "kernels": 6, "size": (15, 14), "window": (3, 3), "stride": (2, 2)},
    "stem": {"batch": 8, "channels": 3, "kernels": 8, "size": (29, 29), "window": (7, 7), "stride": (2, 2)},
    "steps over": {"batch": 17, "channels": 6, "kernels": 6, "size": (9, 9), "window": (1, 1), "stride": (3, 3)},
    "one image": {"batch": 1, "channels": 9, "kernels": 33, "size": (13, 11), "window": (3, 3), "padding": (1, 1)},
    "few images": {"batch": 5, "channels": 9, "kernels": 8, "size": (4, 4), "window": (3, 3), "stride": (2, 2)},
    "grouped": {"batch": 16, "channels": 12, "kernels": 8, "size": (6, 6), "window": (3, 3), "groups": 4},
    "depthwise": {"batch": 16, "channels": 12, "kernels": 12, "size": (6, 6), "window": (3, 3), "groups": 12},
}
DEFAULTS = {
    "stride": (1, 1),
    "padding": (0, 0),
    "dilation": (1, 1),
    "groups": 1,
    "density": 0.2,
    "bias": True,
    "seed": 3,
}


def case(name: str, **changes) -> dict:
    return DEFAULTS | {"dtype": torch.float32} | CASES[name] | changes


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_cases_agree_bit_for_bit(name, isa, dtype):
    p = case(name, dtype=dtype)
    x, weight, bias, mask = tensors(p, whole=True)
    with instruction_set(isa):
        found = passes(sparse(p, mask), x, weight, bias)
    for ours, torchs in zip(found, passes(dense(p, mask), x, weight, bias), strict=True):
        assert torch.equal(ours, torchs)


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_threads_does_not_matter(name):
    p = case(name)
    x, weight, bias, mask = tensors(p, whole=False)
    results = []
    for count in (1, 2, 4):
        with threads(count):
            results.append(passes(sparse(p, mask), x, weight, bias))
    for each in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], each, strict=True))


@pytest.mark.parametrize("name", ["vgg", "strided", "one image", "grouped", "2x2"])
def test_gradcheck(name):
    p = case(name, dtype=torch.float64, batch=min(CASES[name]["batch"], 9), kernels=4, channels=4)
    x, weight, bias, mask = tensors(p, whole=False)
    function = sparse(p, mask)
    inputs = [each.requires_grad_() for each in (x[..., :5, :5].contiguous(), weight, bias)]
    # Off the mask, gradients are zero by definition.
    masked = lambda x, weight, bias: to_dense(function(x, weight * mask, bias))  # noqa: E731
    torch.autograd.gradcheck(masked, inputs, fast_mode=True)


def twice(function, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """First gradients, and those of a penalty on them, which depends on all that the first ones depend on."""
    given_ = [each.clone().requires_grad_() for each in (x, weight, bias)]
    y = to_dense(function(*given_))
    first = torch.autograd.grad(y.square().sum(), given_, create_graph=True)
    second = torch.autograd.grad(sum(each.square().sum() for each in first), given_)
    return [to_dense(each.detach()) if each.dim() == 4 else each.detach() for each in (*first, *second)]


@pytest.mark.parametrize("padding", [None, "same"])
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_gradients_are_those_of_dense_convolutions(name, blocked, padding):
    p = case(name, dtype=torch.float64) | ({"padding": padding, "stride": (1, 1), "window": (4, 3)} if padding else {})
    x, weight, bias, mask = tensors(p, whole=False)
    function = sparse(p, mask)
    if blocked:
        function = lambda x, w, b, function=function: function(to_blocked(x), w, b)  # noqa: E731
    # What stands off the mask is in none of them.
    found = twice(function, x, torch.where(mask, weight, torch.nan), bias)
    for ours, torchs in zip(found, twice(dense(p, mask), x, weight, bias), strict=True):
        torch.testing.assert_close(ours, torchs)
        assert ours.any()


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_dense_gradients(name):
    p = case(name, dtype=torch.float64)
    x, weight, bias, mask = tensors(p, whole=False)
    found = twice(sparse(p, mask, dense_gradient=True), x, weight, bias)
    everywhere = twice(lambda x, w, b: functional.conv2d(x, w, b, **options(p)), x, weight, bias)
    for ours, torchs in zip(found, everywhere, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("links", [0, 1])
@pytest.mark.parametrize("batch", [1, 16])
def test_hardly_any_link(links, batch):
    p = case("vgg", batch=batch, density=0)
    x, weight, bias, mask = tensors(p, whole=True)
    if links:
        mask[7, 3, 2, 0], weight[7, 3, 2, 0] = True, 3.0
    found = passes(sparse(p, mask), x, weight, bias)
    for ours, torchs in zip(found, passes(dense(p, mask), x, weight, bias), strict=True):
        assert torch.equal(ours, torchs)


@pytest.mark.parametrize("batch", [3, 16])
def test_nothing_is_computed_off_the_links(batch):
    """What is not finite and has no link does not reach any result, as zero times it would."""
    p = case("vgg", batch=batch)
    x, weight, bias, mask = tensors(p, whole=True)
    mask[:, 2] = False
    x[:, 2] = torch.inf
    function = sparse(p, mask)
    y, of_x, of_weight, _ = passes(function, x, torch.where(mask, weight, torch.nan), bias)
    assert y.isfinite().all()
    assert of_x.isfinite().all()
    assert of_weight.shape == weight.shape
    assert not of_weight[~mask].any()
    assert torch.equal(of_x[:, 2], torch.zeros_like(of_x[:, 2]))


def test_dense_gradients_where_they_are_asked_for():
    for name in ("vgg", "strided", "one image", "grouped", "steps over"):
        p = case(name)
        x, weight, bias, mask = tensors(p, whole=True)
        found = passes(sparse(p, mask, dense_gradient=True), x, weight, bias)
        everywhere = passes(lambda x, w, b, p=p: functional.conv2d(x, w, b, **options(p)), x, weight, bias)
        for ours, torchs in zip(found, everywhere, strict=True):
            assert torch.equal(ours, torchs)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("window", [(3, 3), (4, 2)])
def test_padding_by_name(padding, window):
    p = case("vgg", window=window, dilation=(2, 1), padding=padding)
    x, weight, bias, mask = tensors(p, whole=True)
    for extra in ({}, {"dense_gradient": True}):
        found = passes(sparse(p, mask, **extra), x, weight, bias)
        reference = dense(p, mask) if not extra else lambda x, w, b: functional.conv2d(x, w, b, **options(p))
        for ours, torchs in zip(found, passes(reference, x, weight, bias), strict=True):
            assert torch.equal(ours, torchs)


def _formats(x: Tensor) -> dict[str, Tensor]:
    padded = torch.zeros(*x.shape[:3], x.shape[3] + 3, dtype=x.dtype)
    padded[..., 1:-2] = x
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "unaligned": padded[..., 1:-2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch last": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "flipped and back": x.flip(0).flip(0),
    }


@pytest.mark.parametrize("layout", list(_formats(torch.zeros(1, 1, 1, 1))))
@pytest.mark.parametrize("name", ["vgg", "one image"])
def test_any_memory_layout_of_input_and_gradient(name, layout):
    p = case(name)
    x, weight, bias, mask = tensors(p, whole=True)
    weights = {"contiguous": weight, "channels_last": weight.contiguous(memory_format=torch.channels_last)}
    weights["cut"] = torch.cat([weight, weight], 1)[:, : weight.shape[1]]
    expected = functional.conv2d(x, weight, bias, **options(p))
    gradient = (torch.arange(expected.numel()) % 5 - 2.0).view(expected.shape)
    reference = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, p["stride"], p["padding"], p["dilation"], False, [0, 0], 1, [True, True, False]
    )
    for own in weights.values():
        a, b = _formats(x)[layout].detach().requires_grad_(), own.detach().requires_grad_()
        y = sparse(p, mask)(a, b, bias)
        assert torch.equal(to_dense(y), expected)
        y.backward(_formats(gradient)[layout])
        assert torch.equal(a.grad, reference[0])
        assert torch.equal(b.grad, reference[1] * mask)


@pytest.mark.parametrize("batch", [8, 17, 63])
def test_lanes_without_an_image_do_not_count(batch):
    p = case("vgg", batch=batch)
    x, weight, bias, mask = tensors(p, whole=True)
    blocks = as_blocks(to_blocked(x)).clone()
    blocks[-1, ..., (batch - 1) % 16 + 1 :] = torch.nan
    expected = passes(dense(p, mask), x, weight, bias)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    y = sparse(p, mask)(Blocked.of(blocks, batch), weight, bias)
    assert torch.equal(to_dense(y), expected[0])
    gradient = (torch.arange(y.numel()) % 7 - 3).view(y.shape).to(y.dtype)
    spoilt = as_blocks(to_blocked(gradient)).clone()
    spoilt[-1, ..., (batch - 1) % 16 + 1 :] = torch.nan
    of_weight, of_bias = torch.autograd.grad(y, (weight, bias), Blocked.of(spoilt, batch))
    assert torch.equal(of_weight, expected[2])
    assert torch.equal(of_bias, expected[3])


def test_a_weight_that_changes_is_followed():
    p = case("vgg")
    x, weight, bias, mask = tensors(p, whole=True)
    function = sparse(p, mask)
    for _ in range(3):
        weight = weight + mask
        assert torch.equal(to_dense(function(x, weight, bias)), functional.conv2d(x, weight, bias, padding=(1, 1)))


def test_sizes_that_change_are_followed():
    p = case("vgg")
    _, weight, bias, mask = tensors(p, whole=True)
    function = sparse(p, mask)
    for batch, height in [(16, 9), (1, 9), (16, 4), (40, 9), (16, 9)]:
        x = torch.randint(-4, 5, (batch, 20, height, 7)).float()
        assert torch.equal(to_dense(function(x, weight, bias)), functional.conv2d(x, weight, bias, padding=(1, 1)))


@pytest.mark.parametrize("name", ["vgg", "one image", "strided", "2x2"])
def test_values_without_a_weight(name):
    p = case(name)
    x, weight, bias, mask = tensors(p, whole=True)
    links = Links.of(mask)
    wanted = {key: value for key, value in options(p).items() if key != "groups"}
    for rectify in (False, True):
        y = sparse_outputs(x, weight[mask], bias, links, **wanted, rectify=rectify)
        expected = functional.conv2d(x, weight, bias, **options(p))
        assert torch.equal(to_dense(y), expected.relu() if rectify else expected)


def test_not_a_number_is_not_rectified():
    links = Links.of(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    for batch in (1, 16):
        x = torch.full((batch, 1, 3, 3), torch.nan)
        assert to_dense(sparse_outputs(x, torch.ones(1), None, links, rectify=True)).isnan().all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_of_links_prepare_their_own(copied):
    p = case("vgg")
    x, weight, bias, mask = tensors(p, whole=True)
    links = Links.of(mask)
    before = to_dense(sparse_conv2d(x, weight, bias, links, **options(p)))
    other = copied(links)
    del links
    assert torch.equal(to_dense(sparse_conv2d(x, weight, bias, other, **options(p))), before)


def test_lists():
    mask = torch.tensor([[[[1, 0]], [[1, 1]]], [[[0, 0]], [[0, 1]]]]).bool()
    links = Links.of(mask)
    assert links.starts.tolist() == [0, 3, 4]
    assert links.codes.tolist() == [0, 2, 3, 3]
    assert Links.of(mask, groups=2).codes.tolist() == [0, 2, 3, 7]
    for groups in (1, 2):
        links = Links.of(mask, groups)
        again = Links.of_lists(links.starts, links.codes, links.shape, groups)
        assert torch.equal(again.positions(torch.empty(mask.shape)), mask.flatten().nonzero().flatten().int())


@pytest.mark.parametrize(
    ("starts", "codes", "shape", "groups"),
    [
        ([0, 1], [0], (2, 1, 1, 1), 1),
        ([0, 1, 3], [0, 0], (2, 1, 1, 1), 1),
        ([0, 2, 1], [0], (2, 1, 1, 1), 1),
        ([0, 1, 2], [0, 1], (2, 1, 1, 1), 1),
        ([0, 1, 2], [0, -1], (2, 1, 1, 1), 1),
        ([0, 2, 2], [1, 0], (2, 2, 1, 1), 1),
        ([0, 2, 2], [1, 1], (2, 2, 1, 1), 1),
        ([0, 1, 2], [0, 0], (2, 1, 1, 1), 2),
        ([0, 1], [0], (1, 1, 1), 1),
        ([0, 1], [0], (1, 1, 1, 0), 1),
        ([0, 1], [0], (1, 2**20, 2**10, 2), 1),
    ],
)
def test_lists_that_fit_no_weight_are_refused(starts, codes, shape, groups):
    with pytest.raises(ConfigurationError):
        Links.of_lists(torch.tensor(starts), torch.tensor(codes, dtype=torch.int32), shape, groups)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 2, 5, 5)}, r"accepted is \[N, 3, H, W\]"),
        ({"x": torch.zeros(3, 5, 5)}, r"accepted is \[N, 3, H, W\]"),
        ({"x": torch.zeros(0, 3, 5, 5)}, "at least 1"),
        ({"x": torch.zeros(1, 3, 2, 5)}, "does not fit"),
        ({"x": torch.zeros(1, 3, 5, 5, dtype=torch.float64)}, "float32 or torch.float64 alone"),
        ({"x": torch.zeros(1, 3, 5, 5, dtype=torch.bfloat16)}, "bfloat16"),
        ({"weight": torch.zeros(4, 3, 3, 2)}, "the links are of"),
        ({"groups": 3}, "groups=3"),
        ({"bias": torch.zeros(1)}, r"bias of shape \[1\]: accepted is \[4\]"),
        ({"bias": torch.zeros(1, 4)}, r"bias of shape \[1, 4\]"),
        ({"padding": "full"}, "padding='full': accepted are two whole numbers of at least 0, or 'valid' or 'same'"),
        ({"padding": "same", "stride": (2, 2)}, "padding='same': accepted are .* or 'valid' with this stride"),
        ({"padding": (-1, -1)}, r"padding=\(-1, -1\): accepted are"),
        ({"padding": (1,)}, r"padding=\(1,\): accepted are"),
        ({"stride": (0, 0)}, r"stride=\(0, 0\): accepted are two whole numbers of at least 1"),
        ({"dilation": (0, 1)}, r"dilation=\(0, 1\): accepted are"),
        ({"x": torch.zeros(1, 3, 5, 5, requires_grad=True), "rectify": True}, "without gradients"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    arguments = {"x": torch.zeros(1, 3, 5, 5), "weight": torch.zeros(4, 3, 3, 3), "bias": None}
    links = Links.of(torch.ones(4, 3, 3, 3, dtype=torch.bool))
    with pytest.raises(ConfigurationError, match=message):
        sparse_conv2d(**(arguments | {"links": links} | changes))


def test_no_memory_is_an_error():
    """In a process whose memory is limited after everything is loaded."""
    program = """
import resource, torch
from chtconv.sparse_compute.convolution import sparse_conv2d
from chtconv.sparse_compute.links import Links
mask = torch.ones(64, 64, 1, 1, dtype=torch.bool)
links, weight, x = Links.of(mask), torch.ones(64, 64, 1, 1), torch.zeros(16, 64, 64, 64)
sparse_conv2d(x, weight, None, links)
from chtconv.sparse_compute.memory import release_memory
release_memory()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), -1))
try:
    sparse_conv2d(x, weight, None, links)
except (MemoryError, RuntimeError) as error:
    print("refused:", error)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("limits of memory are those of Linux")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout
