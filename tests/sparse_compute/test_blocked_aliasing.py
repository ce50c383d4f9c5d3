"""What is computed late, shared or changed in place in the blocked layout is what it would be in ordinary tensors."""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
from blocked_tensors import blocked, close, norm, random
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from chtconv.errors import ConfigurationError
from chtconv.sparse_compute.blocked import Blocked, to_blocked, to_dense
from chtconv.sparse_compute.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled kernels")
SHAPE = (17, 3, 4, 5)


def add_to_view(x, y):
    x.view(-1).add_(1)
    return y * 1


def change_then_relu(x, y):
    x.mul_(2)
    return F.relu(y)


def relu_then_change(x, y):
    z = F.relu(y)
    y.add_(1)
    return z * y


def change_twice(x, y):
    y.relu_()
    y.sub_(0.5)
    return F.relu_(y) + x


def view_of_result(x, y):
    y.flatten(1).relu_()
    return y * 2


def added_to_itself(x, y):
    y.add_(y)
    return F.relu(y) + x


def added_to_a_smaller_one(x, y):
    return F.relu(y + x[:, :1].contiguous()) * F.relu(y[:1] + x)


def view_before(x, y):
    part = x[:, 0]
    late = norm(x * 1 + x)
    later = norm(x)
    part.mul_(5)
    return F.relu(later) + F.relu(late) + part.unsqueeze(1)


def view_kept(x, y):
    part = y[:, 1]
    y.mul_(3)
    part.add_(1)
    y.add_(0.5)
    return y * 2 + part.unsqueeze(1)


def through_data(x, y):
    y.data.mul_(2)
    part = y.data[0]
    z = y * 1
    part.zero_()
    return z + y


def detached(x, y):
    y.detach().mul_(2)
    return F.relu(y)


def shared_sum(x, y):
    z = norm(x * 2)
    s = y + z
    z.mul_(3)
    return F.relu(s) + z


def own_view(x, y):
    alias = y.view(y.shape)
    alias.add_(2)
    return F.relu(y) + alias


def copied(x, y):
    y.copy_(x * 2)
    return F.relu(y)


def copied_from_ordinary(x, y):
    y.copy_(torch.ones(SHAPE, dtype=x.dtype).mT.contiguous().mT * 3)
    return F.relu(y) * x


def copied_from_number(x, y):
    y.copy_(torch.ones(1, dtype=x.dtype))
    return F.relu(y) * x


def into_ordinary(x, y):
    target = torch.zeros(SHAPE, dtype=x.dtype)
    target.add_(y)
    target.copy_(target + y)
    return target


def into_part_of_ordinary(x, y):
    target = torch.zeros((17, 7, 4, 5), dtype=x.dtype)
    target[:, 2:5] = y
    target[:, :3] += x
    return target


def part_assigned(x, y):
    y = y * 1
    y[:, 0] = 2
    y[0] = x[1] * 3
    return F.relu(y)


def zeroed(x, y):
    return y.zero_() + x


def written_by_out(x, y):
    with torch.no_grad():
        target = torch.empty_like(x)
        torch.cumsum(x, 1, out=target)
    return F.relu(target * y)


CHANGES = [
    add_to_view, change_then_relu, relu_then_change, change_twice, added_to_itself, added_to_a_smaller_one,
    view_before, view_of_result, view_kept, through_data, detached, shared_sum, own_view, copied,
    copied_from_ordinary, copied_from_number, into_ordinary, into_part_of_ordinary, part_assigned, zeroed,
    written_by_out,
]  # fmt: skip


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no graph"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_in_place(change, graph):
    """x, and a batch norm of x that is not evaluated yet; the same operations on ordinary tensors, with gradients."""
    outcomes = []
    for convert in (torch.clone, blocked):
        leaf = random(*SHAPE, dtype=torch.float64).requires_grad_()
        with torch.set_grad_enabled(graph):
            x = convert(leaf) * 1
            y = norm(x)
            try:
                result = change(x, y)
                gradient = torch.autograd.grad((result * result).sum(), leaf)[0] if graph else leaf
            except RuntimeError as error:
                outcomes.append([str(error).partition(":")[0]])
            else:
                outcomes.append([to_dense(each.detach()) for each in (result, x, y, gradient)])
    if isinstance(outcomes[0][0], str):
        assert outcomes[0] == outcomes[1]
        return
    for expected, actual in zip(*outcomes, strict=True):
        close(actual, expected)


def test_backward_refuses_inputs_that_were_changed():
    x = blocked(random(*SHAPE).requires_grad_()) * 1
    y = F.relu(norm(x))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("changed", [0, 1], ids=["input", "output"])
def test_changes_that_autograd_does_not_see_change_what_they_change_elsewhere(changed):
    """ReLU masks by its output, whatever becomes of the input of the batch norm before it."""
    results = []
    for convert in (torch.clone, blocked):
        leaf = random(*SHAPE).requires_grad_()
        x = convert(leaf) * 1
        y = F.relu(norm(x))
        (x, y)[changed].data.neg_()
        results.append(torch.autograd.grad((y * y).sum(), leaf)[0])
    close(results[1], results[0])


def test_late_results_do_not_keep_their_input():
    x = to_blocked(random(*SHAPE))
    content = weakref.ref(x._content)
    y = F.relu(norm(x))
    with torch.no_grad():
        z = norm(y)
    del x
    gc.collect()
    assert content() is None
    assert isinstance(z, Blocked)


def test_hooks_see_what_they_would_see():
    seen = []
    for convert in (torch.clone, blocked):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Identity(), nn.MaxPool2d(2), nn.Flatten())
        found = {}
        for name, layer in model.named_children():
            layer.register_forward_hook(lambda m, i, o, name=name, found=found: found.__setitem__(name, o.clone()))
            if name not in "01":
                layer.register_full_backward_hook(
                    lambda m, i, o, name=name, found=found: found.update({name + "in": i[0], name + "out": o[0]})
                )
        x = convert(random(*SHAPE).requires_grad_()) * 1
        x.retain_grad()
        x.register_hook(lambda g, found=found: found.__setitem__("hook", g) or g * 2)
        model(x).square().sum().backward()
        seen.append(found | {"grad": x.grad})
    assert seen[0].keys() == seen[1].keys()
    for name, expected in seen[0].items():
        close(seen[1][name], expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    gradients = []
    for convert in (torch.clone, blocked):
        layer = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2))
        leaf = random(*SHAPE).requires_grad_()
        checkpoint(layer, convert(leaf), use_reentrant=reentrant).square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in layer.parameters())])
    for expected, actual in zip(*gradients, strict=True):
        close(actual, expected)


def test_copies_and_files():
    x = random(*SHAPE)
    b = to_blocked(x)
    for each in (copy.deepcopy(b), copy.copy(b), pickle.loads(pickle.dumps(b)), b.clone().detach()):
        assert torch.equal(to_dense(each), x)
    copy.deepcopy(b).zero_()
    file = io.BytesIO()
    torch.save({"activation": F.relu(norm(b))}, file)
    file.seek(0)
    close(torch.load(file)["activation"], F.relu(norm(x)))
    assert torch.equal(b.detach().cpu(), x)
    assert torch.equal(torch.stack([b, b])[1], x)


def test_it_looks_like_a_tensor():
    x = random(8, 2, 1, 1)
    b = to_blocked(x)
    assert isinstance(b, torch.Tensor)
    assert b.shape == x.shape
    assert b.stride() == x.stride()
    assert (b.dtype, b.device, b.dim(), b.numel(), len(b)) == (x.dtype, x.device, 4, 16, 8)
    assert b.is_contiguous()
    assert repr(b) == f"Blocked({x!r})"
    leaf = b.clone().requires_grad_()
    assert repr(leaf).endswith("requires_grad=True)")
    assert "grad_fn=<ReluBackward0>" in repr(F.relu(leaf))
    assert (b.numpy() == x.numpy()).all()
    assert b.tolist() == x.tolist()
    assert torch.equal(torch.tensor(b.__array__()), x)
    assert torch.equal(torch.from_dlpack(b), x)
    assert (np.from_dlpack(b) == x.numpy()).all()
    with pytest.raises(ConfigurationError, match=r"\(8, 2, 1, 1\) in the blocked layout has no shared memory"):
        b.share_memory_()
    assert b[3, 1].item() == x[3, 1].item()
    assert b.float() is b
    assert b.double().dtype is torch.float64
    assert isinstance(b.to("cpu", torch.float64), Blocked)
    assert b.to("meta").device.type == "meta"
    assert bool((b == x).all())
    assert b.new_zeros(3).shape == (3,)
    assert isinstance(torch.zeros_like(b), Blocked)
    assert torch.equal(torch.ones_like(b), torch.ones_like(x))
    assert torch.equal(torch.full_like(b, 3), torch.full_like(x, 3))
    assert not isinstance(torch.zeros_like(b, dtype=torch.int32), Blocked)
    assert torch.randn_like(b).shape == x.shape


def test_numbers_are_replaced_by_what_a_function_makes_of_them():
    x = random(*SHAPE)
    b = to_blocked(x)
    alias = b.detach()
    assert b.apply_(lambda number: number * 2) is b
    assert torch.equal(to_dense(alias), x * 2)
    with pytest.raises(RuntimeError, match=r"accepted is x\.detach"):
        F.relu(b.requires_grad_()).apply_(abs)


def test_leaves_of_this_kind_are_trained():
    leaf = to_blocked(random(*SHAPE)).detach().requires_grad_()
    optimizer = torch.optim.SGD([leaf], lr=0.1, momentum=0.9)
    other = random(*SHAPE).requires_grad_()
    reference = torch.optim.SGD([other], lr=0.1, momentum=0.9)
    for _ in range(3):
        for x, each in ((leaf, optimizer), (other, reference)):
            each.zero_grad()
            F.relu(norm(x) + x).square().sum().backward()
            each.step()
    close(leaf, other)


def test_gradients_of_ordinary_leaves_can_be_used():
    outcomes = []
    for convert in (torch.clone, blocked):
        leaf = random(*SHAPE, seed=5).requires_grad_()
        for _ in range(2):
            (convert(random(*SHAPE)) * leaf).square().sum().backward()
        torch.nn.utils.clip_grad_norm_([leaf], 1.0)
        torch.optim.Adam([leaf], lr=0.1).step()
        outcomes.append(leaf)
    close(outcomes[1], outcomes[0])


def test_autocast_leaves_the_layout():
    x = blocked(random(*SHAPE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.conv2d(F.relu(norm(x)), torch.ones(2, 3, 2, 2))
    assert y.dtype is torch.bfloat16
    expected = F.conv2d(F.relu(norm(random(*SHAPE))).bfloat16(), torch.ones(2, 3, 2, 2).bfloat16())
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_shapes_cannot_change_in_place():
    x = to_blocked(random(*SHAPE))
    with pytest.raises((ConfigurationError, RuntimeError)):
        x.resize_(3, 3)


def test_inference_mode_sees_changes_through_views():
    with torch.inference_mode():
        x = to_blocked(random(*SHAPE)) * 1
        part = x[:, 0]
        close(F.relu(x), F.relu(random(*SHAPE)))
        part.fill_(7)
        assert (F.relu(x)[:, 0] == 7).all()
        y = norm(x)
        part.fill_(8)
        assert (x[:, 0] == 8).all()
        assert not bool((F.relu(y)[:, 0] > 1).any())


def test_without_kernels_it_is_an_error(monkeypatch):
    from chtconv.sparse_compute import layout

    monkeypatch.setattr(layout, "library", lambda: None)
    with pytest.raises(ConfigurationError, match="needs the compiled kernels"):
        to_blocked(torch.zeros(8, 1, 2, 2))
