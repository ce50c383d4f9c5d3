"""What forward changes of a model: left out where no result depends on it, else the model is not compiled."""

import math
import operator

import pytest
import torch
from compiled_models import same
from torch import nn
from torch.nn import functional

from chtconv.errors import ConfigurationError
from chtconv.sparse_compute.inference import compile_sparse


class Counting(nn.Module):
    """Tensors of its own, which ``forward`` may change."""

    def __init__(self, forward):
        super().__init__()
        self.register_buffer("buffer", torch.zeros(3))
        self.bias = nn.Parameter(torch.zeros(3))
        self.plain, self.kept, self.number, self._forward = torch.zeros(3), torch.zeros(3), 0, forward
        self.linear, self.relu, self.late = nn.Linear(3, 3), nn.LeakyReLU(0.1, inplace=True), None

    def forward(self, x):
        return self._forward(self, x)


def _replaced(name, computed):
    def forward(m, x):
        setattr(m, name, computed(m, x))
        return x + getattr(m, name)

    return forward


CHANGING = {
    "a buffer that is written to": ("buffer", lambda m, x: (m.buffer.add_(x.mean(0)), x + m.buffer)[1]),
    "a buffer that is added to": ("buffer", _replaced("buffer", lambda m, x: operator.iadd(m.buffer, 1))),
    "a buffer that is replaced": ("buffer", _replaced("buffer", lambda m, x: m.buffer + 1)),
    "a parameter that is written to": ("bias", lambda m, x: (m.bias.mul_(2), x + m.bias)[1]),
    "a tensor that is written to": ("plain", lambda m, x: (m.plain.add_(1), x + m.plain)[1]),
    "a tensor that is replaced": ("plain", _replaced("plain", lambda m, x: m.plain + 1)),
    "an average": ("plain", _replaced("plain", lambda m, x: torch.lerp(m.plain, x.mean(0), 0.1))),
    "after it was read": ("buffer", lambda m, x: (x + m.buffer, m.buffer.add_(1))[0]),
    "past autograd": ("bias", lambda m, x: (m.bias.data.clamp_(0, 1), x + m.bias)[1]),
    "detached": ("bias", lambda m, x: (m.bias.detach().clamp_(0, 1), x + m.bias)[1]),
    "a view": ("buffer", lambda m, x: (m.buffer.view(3, 1).add_(1), x + m.buffer)[1]),
    "a part": ("buffer", lambda m, x: (m.buffer[0].add_(1), x + m.buffer)[1]),
    "a number": ("number", _replaced("number", lambda m, x: m.number + 1)),
    "computed of it": ("plain", lambda m, x: (m.plain.add_(1), x + m.plain * 2)[1]),
    "read into what is new": (
        "buffer",
        lambda m, x: (t := torch.zeros(2, 3), t.add_(x * m.buffer), m.buffer.add_(1))[0],
    ),
    "in a function": ("buffer", lambda m, x: x + functional.leaky_relu(m.buffer, 0.1, inplace=True)),
    "in a module": ("buffer", lambda m, x: x + m.relu(m.buffer)),
    "of a module of torch": ("linear.bias", lambda m, x: (m.linear.bias.data.add_(1), m.linear(x))[1]),
    "after it was read, to the same": ("plain", lambda m, x: (x + m.plain, m.plain.fill_(1.0))[0]),
    "what was not there at first": ("late", _replaced("late", lambda m, x: x if m.late is None else 0.9 * m.late + x)),
}


@pytest.mark.parametrize("case", CHANGING)
def test_models_that_change_what_they_compute_with_are_refused(case):
    name, forward = CHANGING[case]
    model = Counting(forward).eval()
    before = operator.attrgetter(name)(model)
    numbers = None if before is None else torch.as_tensor(before).clone()
    with pytest.raises(ConfigurationError, match=f"^{name}: forward computes with it and changes it in eval mode"):
        compile_sparse(model)
    now = operator.attrgetter(name)(model)
    assert now is before
    assert now is None or torch.equal(torch.as_tensor(now), numbers)


def test_a_tensor_under_two_names_is_one():
    model = Counting(lambda m, x: (m.linear.alias.add_(1), x + m.plain)[1]).eval()
    model.linear.alias = model.plain
    with pytest.raises(ConfigurationError, match=r"^plain, linear\.alias: forward computes with it"):
        compile_sparse(model)


KEPT = [torch.zeros(3)]


def _a_column(m, x):
    total = torch.zeros(2, 3)
    total[:, 0].add_(x[:, 0])
    return total


def _an_entry(m, x):
    total = torch.zeros(2, 3)
    total[:, 0] = x[:, 0]
    return total


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda m, x: (KEPT[0].add_(x.mean(0)), x + KEPT[0])[1],
            "a tensor that is no attribute: forward computes with it",
        ),
        (_a_column, "a tensor that is no attribute: forward computes with it"),
        (_an_entry, "__setitem__: accepted in place"),
        (lambda m, x: x + torch.randn(3), "a tensor that is no attribute: forward computes with it"),
    ],
)
def test_tensors_that_are_no_attributes_are_written_into_where_that_can_be_followed(forward, message):
    with pytest.raises(ConfigurationError, match=message):
        compile_sparse(Counting(forward).eval())


def _lazily(m, x):
    if not m.number:
        m.plain, m.number = torch.arange(3.0), 1
    return x + m.plain


def _summed(m, x):
    total = torch.zeros(2, 3)
    total.add_(x)
    total += m.bias
    return total


def _changed_again(m, x):
    m.plain = torch.arange(3.0)
    return x * m.plain


LEAVING = {
    "a result": lambda m, x: setattr(m, "kept", x * 2) or m.kept + m.plain + m.buffer,
    "a result in a buffer": lambda m, x: setattr(m, "buffer", x.mean(0)) or x * 2,
    "a counter": lambda m, x: (m.buffer.add_(1), setattr(m, "number", m.number + 1), x)[-1],
    "a counter that is no buffer": lambda m, x: (operator.iadd(m.plain, 1), x)[1],
    "a buffer that counts": lambda m, x: setattr(m, "buffer", operator.iadd(m.buffer, 1)) or x,
    "what it saw": lambda m, x: setattr(m, "kept", torch.maximum(m.kept, x.abs().amax(0))) or x * 2,
    "a table, made when it is needed": _lazily,
    "a table, made anew": _changed_again,
    "another view": lambda m, x: setattr(m, "plain", m.plain.view(1, 3)) or x + m.plain,
    "the same numbers": lambda m, x: x + m.plain.fill_(1.0),
    "a tensor of another size": lambda m, x: m.plain.resize_(5) is None or x,
    "what is new in every call": _summed,
    "a buffer that is filled": lambda m, x: (m.buffer.copy_(x.mean(0)), x * 2)[1],
    "an infinite number": lambda m, x: (setattr(m, "number", m.number + 1), x.masked_fill(x > 9, math.nan))[1],
    "a sparse tensor": lambda m, x: (setattr(m, "number", m.number + 1), torch.sparse.mm(torch.eye(2).to_sparse(), x))[
        1
    ],
    "another type": lambda m, x: setattr(m, "buffer", m.buffer.to(x.dtype)) or x + m.buffer,
    "a result that was not there": lambda m, x: setattr(m, "late", x * 2) or m.late + 1,
}


@pytest.mark.parametrize("case", LEAVING)
def test_models_may_leave_behind_what_they_do_not_compute_with(case):
    model, images = Counting(LEAVING[case]).eval(), torch.randn(2, 3)
    before = {key: value for key, value in {**vars(model), **model._buffers}.items() if not key.startswith("_")}
    numbers = {key: torch.as_tensor(value or 0 if value is None else value).clone() for key, value in before.items()}
    compiled = compile_sparse(model)
    now = {key: value for key, value in {**vars(model), **model._buffers}.items() if not key.startswith("_")}
    assert now.keys() == before.keys()
    for key, value in before.items():
        assert now[key] is value
        assert value is None or torch.equal(torch.as_tensor(value), numbers[key])
    for _ in range(2):
        assert torch.equal(compiled(images), model(images))


def test_modules_of_other_kinds_are_traced_past():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lazy = nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()
            self.register_buffer("later", nn.UninitializedBuffer())
            self.scripted = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))

        @property
        def plain(self):
            raise AssertionError("nobody asked for it")

        def forward(self, x):
            return self.conv(x)

    model, images = Several().eval(), torch.randn(2, 3, 6, 6)
    vars(model)["plain"] = torch.zeros(3)
    same(compile_sparse(model)(images), model(images).detach())
