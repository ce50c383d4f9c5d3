"""Operations in the blocked layout, and their gradients, against those on ordinary tensors."""

import copy
import pickle

import pytest
import torch
from blocked_tensors import TOLERANCE, blocked, close, norm, random, spoil
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from chtconv.errors import ConfigurationError
from chtconv.sparse_compute.blocked import Blocked, as_blocks, to_blocked, to_dense
from chtconv.sparse_compute.blocked_pooling import Positions
from chtconv.sparse_compute.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled kernels")


def both(function, *shapes, dtype=torch.float32, extra=()):
    """Runs it on ordinary and on blocked tensors: results and gradients agree. Returns the blocked result."""
    outcomes = []
    for convert in (torch.clone, blocked):
        inputs = [random(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
        others = [random(*shape, dtype=dtype, seed=9 + i).requires_grad_() for i, shape in enumerate(extra)]
        result = function(*map(convert, inputs), *others)
        result.register_hook(spoil)
        gradient = random(*result.shape, dtype=result.dtype, seed=77)
        gradient = blocked(gradient) if isinstance(result, Blocked) else gradient
        gradients = torch.autograd.grad(result, [*inputs, *others], gradient)
        outcomes.append((result, gradients))
    (expected, gradients), (actual, others) = outcomes
    close(actual, expected)
    for one, other in zip(others, gradients, strict=True):
        close(one, other)
    return actual


# ---- Conversion ----


@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9)),
    st.permutations(range(4)),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_conversion_of_any_strides_there_and_back(shape, order, step, dtype):
    stored = random(*(shape[axis] * (step if axis == 3 else 1) for axis in order), dtype=dtype)
    x = stored.permute(*(order.index(axis) for axis in range(4)))[..., ::step]
    blocks = as_blocks(x)
    expected = F.pad(x, (0, 0, 0, 0, 0, 0, 0, -shape[0] % 16)).unflatten(0, (-1, 16)).permute(0, 2, 3, 4, 1)
    assert torch.equal(blocks, expected)
    back = Blocked.of(blocks, shape[0])
    assert torch.equal(to_dense(back), x)
    assert to_dense(back).is_contiguous()
    assert torch.equal(torch.zeros_like(x).copy_(back), x)
    target = torch.zeros_like(stored).permute(*(order.index(axis) for axis in range(4)))[..., ::step]
    assert torch.equal(target.copy_(back), x)


def test_large_maps_in_both_memory_formats():
    x = random(33, 32, 16, 16)
    for each in (x, x.contiguous(memory_format=torch.channels_last), x[:1].expand(33, -1, -1, -1), x[:, :3]):
        assert torch.equal(to_dense(to_blocked(each)), each)


def test_conversion_is_differentiable_twice():
    x = random(17, 2, 3, 2, dtype=torch.float64).requires_grad_()
    scale = random(17, 2, 3, 2, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda x: to_dense(to_blocked(x) * scale), x)
    assert torch.autograd.gradgradcheck(lambda x: to_dense(to_blocked(x)) ** 2, x)
    again = to_blocked(x)
    assert to_blocked(again) is again
    assert to_dense(x) is x


def test_what_has_no_blocked_layout():
    for x in (torch.zeros(16, 3), torch.zeros(16, 3, 2, 2, dtype=torch.int32), torch.zeros(8, 1, 1, 1, device="meta")):
        with pytest.raises(ConfigurationError, match="has no blocked layout: accepted"):
            to_blocked(x)


# ---- Operations ----


STAYS, LEAVES = True, False
OPERATIONS = {
    "relu": (F.relu, STAYS),
    "relu in place": (lambda x: F.relu(x * 1, inplace=True), STAYS),
    "relu6": (F.relu6, STAYS),
    "gelu": (F.gelu, STAYS),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), STAYS),
    "silu": (F.silu, STAYS),
    "silu in place": (lambda x: F.silu(x * 1, inplace=True), STAYS),
    "leaky relu": (F.leaky_relu, STAYS),
    "leaky relu in place": (lambda x: F.leaky_relu(x * 1, 0.2, inplace=True), STAYS),
    "sigmoid": (torch.sigmoid, STAYS),
    "tanh": (torch.tanh, STAYS),
    "hardtanh": (F.hardtanh, STAYS),
    "hardtanh in place": (lambda x: F.hardtanh(x * 1, inplace=True), STAYS),
    "elu": (F.elu, STAYS),
    "hardswish": (F.hardswish, STAYS),
    "hardsigmoid": (F.hardsigmoid, STAYS),
    "softplus": (F.softplus, STAYS),
    "mish": (F.mish, STAYS),
    "prelu": (lambda x: F.prelu(x, torch.tensor([0.3], dtype=x.dtype)), STAYS),
    "arithmetic": (lambda x: (2 - (x + 1) * 3 / 2 - x) ** 2, STAYS),
    "own sum": (lambda x: x + x, STAYS),
    "own product in place": (lambda x: (x * 1).mul_(x), STAYS),
    "sum in place": (lambda x: (x * 1).add_(x, alpha=0.5), STAYS),
    "per channel": (
        lambda x: x * torch.arange(3, dtype=x.dtype).view(1, 3, 1, 1) + torch.ones(3, 1, 1, dtype=x.dtype),
        STAYS,
    ),
    "position": (lambda x: x + torch.ones(x.shape[2], x.shape[3], dtype=x.dtype), STAYS),
    "number": (lambda x: x * torch.tensor(2.0, dtype=x.dtype), STAYS),
    "clamp": (lambda x: x.clamp(-0.5, 0.5), STAYS),
    "batch norm": (lambda x: norm(x), STAYS),
    "batch norm, relu": (lambda x: F.relu(norm(x)), STAYS),
    "batch norm, relu in place": (lambda x: norm(x).relu_(), STAYS),
    "batch norm, sum, relu": (lambda x: F.relu(norm(x) + x), STAYS),
    "sum, batch norm, relu": (lambda x: F.relu(x + norm(x)), STAYS),
    "batch norm, sum in place": (
        lambda x: F.relu(norm(x).add_(x), inplace=True),
        STAYS,
    ),
    "batch norm, own sum": (lambda x: (lambda y: F.relu(y + y))(norm(x)), STAYS),
    "batch norm twice": (lambda x: (lambda y: F.relu(y) + y)(norm(x)), STAYS),
    "max pool": (lambda x: F.max_pool2d(x, 2), STAYS),
    "max pool, overlapping": (lambda x: F.max_pool2d(x, 3, 2, 1), STAYS),
    "max pool, ceil": (lambda x: F.max_pool2d(x, (2, 3), 2, ceil_mode=True), STAYS),
    "max pool, dilated": (lambda x: F.max_pool2d(x, 2, 1, dilation=2), STAYS),
    "max pool, apart": (lambda x: F.max_pool2d(x, 2, 3), STAYS),
    "max pool, dilated and padded": (lambda x: F.max_pool2d(x, 2, 1, 1, dilation=2), LEAVES),
    "average pool": (lambda x: F.avg_pool2d(x, 2), STAYS),
    "average pool, padded": (lambda x: F.avg_pool2d(x, 3, 2, 1), STAYS),
    "average pool, padding not counted": (lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), STAYS),
    "average pool, ceil": (lambda x: F.avg_pool2d(x, 2, 2, 1, ceil_mode=True), STAYS),
    "average pool, divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), STAYS),
    "adaptive average, one": (lambda x: F.adaptive_avg_pool2d(x, 1), LEAVES),
    "adaptive average": (lambda x: F.adaptive_avg_pool2d(x, (x.shape[2], 1)), STAYS),
    "adaptive average, unequal": (lambda x: F.adaptive_avg_pool2d(x, 3), LEAVES),
    "adaptive maximum": (lambda x: F.adaptive_max_pool2d(x, 1), LEAVES),
    "mean of maps": (lambda x: x.mean((2, 3)), LEAVES),
    "mean of maps, kept": (lambda x: x.mean([-1, -2], keepdim=True), LEAVES),
    "mean of channels": (lambda x: x.mean((0, 2, 3)), LEAVES),
    "mean of all": (lambda x: x.mean(), LEAVES),
    "mean of rows": (lambda x: x.mean(3), LEAVES),
    "sum of channels": (lambda x: x.sum((0, 2, 3), keepdim=True), LEAVES),
    "sum of all": (lambda x: x.sum(), LEAVES),
    "squeeze and excite": (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), STAYS),
    "concatenation": (lambda x: torch.cat([x, F.relu(x), x * 2], 1), STAYS),
    "concatenation of images": (lambda x: torch.cat([x, x]), LEAVES),
    "clone": (lambda x: x.clone(), STAYS),
    "contiguous": (lambda x: x.contiguous(memory_format=torch.channels_last), STAYS),
    "view of itself": (lambda x: x.view(x.shape), STAYS),
    "flatten": (lambda x: x.flatten(1), LEAVES),
    "reshape": (lambda x: x.reshape(x.shape[0], -1), LEAVES),
    "slices": (lambda x: x[:, 1:, ::2, ::2], LEAVES),
    "permute": (lambda x: x.permute(0, 2, 3, 1), LEAVES),
    "chunks": (lambda x: x.chunk(3, 1)[1], LEAVES),
    "other type": (lambda x: x.double() * 2, STAYS),
    "half": (lambda x: (x.half() * 2).to(x.dtype), LEAVES),
    "comparison": (lambda x: torch.where(x > 0, x, x * 0.1), LEAVES),
    "softmax": (lambda x: F.softmax(x, 1), LEAVES),
    "convolution": (lambda x: F.conv2d(x, torch.ones(2, 3, 2, 2, dtype=x.dtype)), LEAVES),
    "interpolation": (lambda x: F.interpolate(x, scale_factor=2), LEAVES),
    "padding": (lambda x: F.pad(x, (1, 1, 1, 1)), LEAVES),
    "unknown in place": (lambda x: (x * 1).addcmul_(x, x).cumsum_(1), STAYS),
    "group norm": (lambda x: F.group_norm(x, 3), LEAVES),
    "instance norm": (lambda x: F.instance_norm(x), LEAVES),
    "evaluated dropout": (lambda x: F.dropout(x, training=False), STAYS),
}


@pytest.mark.parametrize("shape", [(8, 3, 4, 4), (17, 3, 5, 7), (33, 3, 6, 4)], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name, shape):
    function, stays = OPERATIONS[name]
    assert isinstance(both(function, shape), Blocked) is stays


TWO = {
    "sum": (lambda x, y: x + y, STAYS),
    "difference": (lambda x, y: torch.sub(x, y, alpha=2), STAYS),
    "number less": (lambda x, y: torch.sub(1.0, x) * (2 - y), STAYS),
    "product": (lambda x, y: x * y, STAYS),
    "sum of norms": (lambda x, y: F.relu(norm(x) + norm(y)), STAYS),
    "maximum": (lambda x, y: torch.maximum(x, y), STAYS),
    "concatenation": (lambda x, y: torch.cat([x, y], 1), STAYS),
    "matrix product": (lambda x, y: x @ y.mT, LEAVES),
}  # fmt: skip


@pytest.mark.parametrize("name", TWO)
def test_operations_on_two(name):
    function, stays = TWO[name]
    assert isinstance(both(function, (17, 3, 5, 7), (17, 3, 5, 7)), Blocked) is stays


@pytest.mark.parametrize("shape", [(17, 3, 5, 7), (17, 3, 1, 1), (1, 3, 1, 1), (3, 1, 1), (1,), (5, 7)], ids=str)
@pytest.mark.parametrize(
    "operation", [torch.add, torch.mul, lambda x, y: torch.sub(y, x), lambda x, y: (x * 1).add_(y)]
)
def test_operations_with_ordinary_tensors(operation, shape):
    both(operation, (17, 3, 5, 7), extra=[shape])


def test_one_image_broadcasts_over_many():
    assert not isinstance(both(torch.add, (1, 3, 2, 2), extra=[(16, 3, 2, 2)]), Blocked)
    assert not isinstance(both(torch.mul, (16, 1, 2, 2), extra=[(1, 16, 3, 1, 1)]), Blocked)
    assert isinstance(both(torch.mul, (1, 3, 2, 2), extra=[(3, 1, 1)]), Blocked)
    result = random(1, 3, 4, 5).contiguous(memory_format=torch.channels_last).maximum(blocked(random(1, 3, 4, 5)))
    assert result.blocks.is_contiguous()
    close(result, random(1, 3, 4, 5))


@settings(max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.tuples(*[st.integers(1, 4)] * 2),
    st.tuples(*[st.integers(1, 4)] * 2), st.integers(0, 2), st.booleans(), st.booleans(),
)  # fmt: skip
def test_pooling_of_any_geometry(n, c, h, w, kernel, stride, padding, ceil, count_pad):
    padding = min(padding, min(kernel) // 2)
    if h + 2 * padding < kernel[0] or w + 2 * padding < kernel[1]:
        return
    both(lambda x: F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil), (n, c, h, w))
    both(lambda x: F.avg_pool2d(x, kernel, stride, padding, ceil, count_pad), (n, c, h, w))


def test_indices_of_maxima_are_those_of_torch():
    x = random(17, 3, 7, 6)
    expected, positions = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    actual, indices = F.max_pool2d(blocked(x), 3, 2, 1, return_indices=True)
    assert isinstance(indices, Positions)
    assert torch.equal(indices, positions)
    assert repr(indices) == repr(positions)
    assert indices.tolist() == positions.tolist()
    assert (indices.numpy() == positions.numpy()).all()
    assert torch.equal(pickle.loads(pickle.dumps(indices)), positions)
    assert torch.equal(
        F.max_unpool2d(actual, indices, 3, 2, 1, (7, 6)), F.max_unpool2d(expected, positions, 3, 2, 1, (7, 6))
    )

    def shown(x):
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        assert str(indices)
        return y * 1

    both(shown, (17, 3, 6, 6))
    both(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (17, 3, 6, 6))


def test_maxima_of_equal_and_missing_numbers():
    x = random(17, 3, 6, 6).round()
    x[0, 0, 0, 0] = x[3, 1, 2, 3] = float("nan")
    x[5] = -float("inf")
    expected, positions = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    actual, indices = F.max_pool2d(to_blocked(x), 3, 2, 1, return_indices=True)
    assert torch.equal(indices, positions)
    torch.testing.assert_close(to_dense(actual), expected, equal_nan=True)
    assert to_dense(F.relu(to_blocked(x))).isnan().equal(x.isnan())


def test_dropout_drops_and_scales():
    x = torch.ones(33, 20, 5, 5, requires_grad=True)
    for drop, group in ((F.dropout, 1), (F.dropout2d, 25)):
        y = drop(blocked(x), 0.25)
        assert isinstance(y, Blocked)
        kept = (to_dense(y) != 0).flatten(2)
        assert abs(kept.float().mean() - 0.75) < 0.05
        assert group == 1 or ((kept.sum(2) == 0) | (kept.sum(2) == group)).all()
        torch.testing.assert_close(to_dense(y), (to_dense(y) != 0) / 0.75)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient, to_dense(y))
    assert isinstance(nn.Dropout(0.5, inplace=True)(to_blocked(x) * 1), Blocked)


# ---- Batch normalisation ----


@settings(max_examples=40)
@given(
    st.integers(1, 40), st.integers(1, 5), st.integers(1, 20), st.integers(1, 20), st.sampled_from([0.1, 1.0, None]),
    st.booleans(), st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([0.0, 5.0]),
)  # fmt: skip
def test_batch_norm(n, c, h, w, momentum, affine, tracked, rectified, dtype, mean):
    if n * h * w < 4:
        return
    norm = nn.BatchNorm2d(c, momentum=momentum, affine=affine, track_running_stats=tracked, dtype=dtype)
    if affine:
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    layers = [copy.deepcopy(norm) for _ in range(2)]
    for train in (True, False, True):
        results = []
        for layer, convert in zip(layers, (torch.clone, blocked), strict=True):
            x = (random(n, c, h, w, dtype=dtype) + mean).requires_grad_()
            y = layer.train(train)(convert(x))
            y = F.relu(y) if rectified else y
            wanted = [x, *layer.parameters()]
            gradient = random(n, c, h, w, dtype=dtype, seed=2)
            gradients = torch.autograd.grad(y, wanted, blocked(gradient) if isinstance(y, Blocked) else gradient)
            results.append([y, *gradients, *layer.buffers()])
        for expected, actual in zip(*results, strict=True):
            # A number near zero may be on either side of it.
            torch.testing.assert_close(
                to_dense(actual.detach()), expected.detach(), rtol=1e-3, atol=3e-4 * max(1, mean)
            )


def test_batch_norm_of_numbers_far_from_zero_is_as_exact_as_that_of_torch():
    x = random(33, 2, 30, 30, dtype=torch.float64) + torch.tensor([3000.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
    x = x.float()
    errors = []
    for convert in (torch.clone, blocked):
        norm = nn.BatchNorm2d(2, momentum=1.0)
        norm(convert(x))
        errors.append((norm.running_var.double() - x.double().var((0, 2, 3))).abs())
    assert (errors[1] <= 1e-6 + 2 * errors[0]).all(), errors


def test_batch_norm_of_one_image_alone_is_refused_as_torch_does():
    with pytest.raises(ValueError, match="more than 1 value"):
        nn.BatchNorm2d(3)(to_blocked(torch.zeros(1, 3, 1, 1)))


def network(seed=0):
    torch.manual_seed(seed)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(8)
            self.pool, self.last, self.relu = nn.MaxPool2d(2, 2), nn.Linear(8, 3), nn.ReLU(inplace=True)
            for layer in (self.one, self.two, self.three):
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)

        def forward(self, x):
            y = self.relu(self.one(x))
            y = self.two(y)
            y += x
            y = self.pool(self.relu(y))
            y = self.relu(self.three(torch.cat([y, F.silu(y)], 1)))
            return self.last(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))

    return Residual()


@pytest.mark.parametrize("n", [8, 16, 17, 33, 128])
def test_a_network_in_training_and_evaluation(n):
    networks = [network(), network()]
    x = random(n, 4, 9, 7)
    for train in (True, True, False):
        results = []
        for model, convert in zip(networks, (torch.clone, blocked), strict=True):
            model.train(train).zero_grad()
            leaf = x.clone().requires_grad_()
            y = model(convert(leaf) * 1)
            F.cross_entropy(y, torch.arange(n) % 3).backward()
            results.append([y, leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(networks[1](to_blocked(x)), networks[0](x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        lambda x, w, b: F.batch_norm(x, torch.ones(2).double(), torch.full((2,), 3.0).double(), w, b),
        lambda x, w, b: F.relu(F.batch_norm(x, None, None, w, b, training=True)),
        lambda x, w, b: F.relu(F.batch_norm(x, None, None, w, b, training=True) + x),
        lambda x, w, b: F.max_pool2d(x * w.view(1, 2, 1, 1), 2, 1, 1),
        lambda x, w, b: F.avg_pool2d(x, 2, 1, 1) * b.view(2, 1, 1),
        lambda x, w, b: torch.cat([x, F.gelu(x)], 1),
    ],
)
def test_gradients_against_differences(function):
    x, w, b = (
        random(*shape, dtype=torch.float64, seed=i).requires_grad_()
        for i, shape in enumerate([(9, 2, 2, 3), (2,), (2,)])
    )
    assert torch.autograd.gradcheck(lambda x, w, b: to_dense(function(to_blocked(x), w, b)), (x, w, b), fast_mode=True)


def test_second_derivatives():
    results = []
    for convert in (torch.clone, to_blocked):
        x = random(9, 2, 3, 3, dtype=torch.float64).requires_grad_()
        y = F.max_pool2d(F.silu(F.batch_norm(convert(x), None, None, training=True)), 2)
        (gradient,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        results.append(torch.autograd.grad((gradient * gradient).sum(), x)[0])
    close(results[1], results[0])


# ---- The same whatever computes it ----


def everything(dtype):
    """Numbers that all kernels had a part in."""
    x = random(37, 6, 17, 15, dtype=dtype).requires_grad_()
    norm = nn.BatchNorm2d(6, dtype=dtype)
    y = F.relu(norm(blocked(x)))
    y = F.avg_pool2d(F.max_pool2d(F.relu(norm(y) + y), 3, 2, 1), 2, 1)
    y = norm.eval()(y)
    gradient = blocked(random(*y.shape, dtype=dtype, seed=3))
    return [to_dense(y.detach()), *torch.autograd.grad(y, [x, *norm.parameters()], gradient), *norm.buffers()]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("isa", library().supported if library() else [])
def test_threads_change_no_bit_and_instruction_sets_only_rounding(isa, dtype):
    kernels, threads, widest = library(), torch.get_num_threads(), library().isa
    expected = everything(dtype)
    try:
        kernels.use(isa)
        outcomes = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            outcomes.append(everything(dtype))
    finally:
        torch.set_num_threads(threads)
        kernels.use(widest)
    for one, two, four, other in zip(*outcomes, expected, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, four)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
