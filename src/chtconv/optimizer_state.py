"""What optimizers remember of each weight, and what a fresh one would."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from chtconv.enforcement import apply_bits, matching
from chtconv.errors import ConfigurationError

# Their state is flat, factored or mixed across weights, or their updates are not weight by weight.
_REFUSED = ("LBFGS", "SparseAdam", "Adafactor", "Muon")


def check_supported(optimizer: Optimizer) -> None:
    """Refuses optimizers whose state cannot be reset for a single weight.

    Raises:
        ConfigurationError: naming the optimizer.
    """
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    refused = next((name for name in _REFUSED if name in names), None)
    if refused:
        raise ConfigurationError(
            f"optimizer {type(optimizer).__name__}: {refused} keeps no state weight by weight, so off-mask weights "
            "cannot be held at zero. Accepted are those that do, such as SGD, Adam, AdamW and RMSprop."
        )
    if any(group.get("eps") == 0 for group in optimizer.param_groups):
        raise ConfigurationError(
            f"optimizer {type(optimizer).__name__}: eps=0 divides zero by zero where the gradient is always zero; "
            "accepted is an eps above 0."
        )


def reset_off_mask(optimizer: Optimizer, parameter: Tensor, bits: Tensor) -> None:
    """Gives everything the optimizer remembers of off-mask weights the value that a fresh optimizer starts with.

    Afterwards it stays so by itself, since off-mask gradients are zero: a link that comes later finds fresh state.
    """
    for _, state, fresh in per_weight_state(optimizer, parameter):
        if fresh == 0:
            apply_bits(state, matching(bits, state))
        else:
            state.masked_fill_(matching(bits, state) == 0, fresh)


def per_weight_state(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor, float]]:
    """The state tensors with an entry for each weight: name, tensor and the value that a fresh optimizer gives it."""
    group = group_of(optimizer, parameter)
    for name, state in optimizer.state.get(parameter, {}).items():
        if isinstance(state, Tensor) and state.shape == parameter.shape and state.is_floating_point():
            yield name, state, _fresh_value(name, group or {})


def group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    """The parameter group of the optimizer that holds this parameter, None where there is none."""
    return next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)


def _fresh_value(name: str, group: dict[str, Any]) -> float:
    if name == "step_size":  # Rprop
        return float(group["lr"])
    if name == "sum":  # Adagrad
        return float(group.get("initial_accumulator_value", 0.0))
    return 0.0
