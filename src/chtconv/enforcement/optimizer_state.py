"""What optimizers remember of each weight, and what a fresh one would."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from chtconv.enforcement.bits import apply_bits, is_zero_off_mask, matching
from chtconv.errors import ConfigurationError

# Of torch.optim: a zero weight with a zero gradient and fresh state is a fixed point of their step. Whatever is not
# here (Muon, which mixes all weights of a layer, subclasses, and optimizers of other packages) has its weights and
# state masked after each step.
_KEEP_ZEROS = frozenset({
    "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Rprop", "ASGD",
    "Adafactor", "LBFGS",
})  # fmt: skip


def check_supported(optimizer: Optimizer) -> None:
    """Refuses optimizers under which off-mask weights cannot stay at zero.

    Raises:
        ConfigurationError: naming the optimizer and the reason.
    """
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ConfigurationError(
            f"optimizer {kind}: it takes sparse gradients only, and those of convolutions and linear layers are dense; "
            "accepted is torch.optim.Adam, for example."
        )
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ConfigurationError(
            f"optimizer {kind}: it takes no hooks around its steps, which __init__ of torch.optim.Optimizer makes room "
            "for and which masks need; accepted are optimizers that call it."
        )
    for group in optimizer.param_groups:
        eps = group.get("eps")
        # Adafactor has two; the first may be None, which is above 0.
        if (eps[0] if isinstance(eps, tuple | list) else eps) == 0:
            raise ConfigurationError(
                f"optimizer {kind}: eps=0 divides zero by zero where the gradient is always zero; "
                "accepted is an eps above 0."
            )


def moves_zeros(optimizer: Optimizer) -> bool:
    """Whether a step may move weights whose gradient was always zero, so that they have to be masked after it.

    >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
    >>> moves_zeros(torch.optim.SGD([weight]))
    False
    """
    kind = type(optimizer)
    return not (kind.__module__.startswith("torch.optim.") and kind.__name__ in _KEEP_ZEROS)


def reset_off_mask(optimizer: Optimizer, parameter: Tensor, bits: Tensor) -> None:
    """Gives everything the optimizer remembers of off-mask weights the value that a fresh optimizer starts with.

    Afterwards it stays so by itself, since off-mask gradients are zero: a link that comes later finds fresh state.
    LBFGS remembers all weights in long vectors, from which nothing can be cut: where they hold anything off the mask,
    it forgets them and starts again from the gradient. What Adafactor keeps are means over rows and columns of
    kernels, which do not belong to single weights and stay.
    """
    for _, state, fresh in per_weight_state(optimizer, parameter):
        if fresh == 0:
            apply_bits(state, matching(bits, state))
        else:
            state.masked_fill_(matching(bits, state) == 0, fresh)
    if isinstance(optimizer, torch.optim.LBFGS) and any(
        not is_zero_off_mask(each, matching(bits, each)) for each in _slices(optimizer, parameter)
    ):
        optimizer.state.clear()


def _slices(optimizer: torch.optim.LBFGS, parameter: Tensor) -> Iterator[Tensor]:
    """What the long vectors that LBFGS keeps say of one parameter."""
    (group,) = optimizer.param_groups
    start = 0
    for each in group["params"]:
        if each is parameter:
            break
        start += each.numel()
    else:
        return
    remembered = optimizer.state.get(group["params"][0], {})
    singles = (remembered.get(name) for name in ("d", "prev_flat_grad"))
    pairs = (remembered.get(name) or () for name in ("old_dirs", "old_stps"))
    for vector in chain(singles, *pairs):
        if vector is not None:
            yield vector[start : start + parameter.numel()].view(parameter.shape)


def per_weight_state(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor, float]]:
    """The state tensors with an entry for each weight: name, tensor and the value that a fresh optimizer gives it."""
    inner = getattr(optimizer, "optim", None)
    # A ZeroRedundancyOptimizer keeps nothing itself: the one in it has the state that this rank is to keep.
    by_parameter = inner.state if isinstance(inner, Optimizer) else optimizer.state
    for name, state in by_parameter.get(parameter, {}).items():
        if isinstance(state, Tensor) and state.shape == parameter.shape and state.is_floating_point():
            yield name, state, _fresh_value(name, optimizer, parameter)


def count_set(optimizer: Optimizer, parameter: Tensor) -> dict[str, int]:
    """How many entries are not 0 in each of the state tensors that start there.

    What others start with follows settings that change while training, such as the rate.
    """
    return {
        name: int(state.count_nonzero()) for name, state, fresh in per_weight_state(optimizer, parameter) if fresh == 0
    }


def group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    """The parameter group of the optimizer that holds this parameter, None where there is none."""
    return next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)


# State that does not start at 0: where its value stands in the parameter group. Adamax starts at 0 too, but a step
# with a zero gradient makes it eps, and from there the next step is the same.
_FRESH = {"step_size": "lr", "sum": "initial_accumulator_value", "exp_inf": "eps"}


def _fresh_value(name: str, optimizer: Optimizer, parameter: Tensor) -> float:
    if name not in _FRESH:
        return 0.0
    return float((group_of(optimizer, parameter) or {}).get(_FRESH[name], 0.0))
