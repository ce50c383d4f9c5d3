"""Steps put together: batch norm and ReLU go into the convolution before them, and what nobody uses goes away."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from chtconv.sparse_compute.program import CONVOLUTIONS, INPUT, Step, mapped, steps_in


def folded(steps: list[Step], output: Any) -> tuple[list[Step], Any]:
    """Steps that compute the same up to rounding, and the output in terms of these.

    A batch norm goes into the convolution before it, and a ReLU into the one before that, where nothing else uses what
    lies between. Weights and biases are computed in float64 and rounded once. Steps that the output does not depend on
    are dropped, inputs are kept.
    """
    steps = _used(steps, output)
    uses = Counter(steps_in([output, *(step.args for step in steps)]))
    instead: dict[Step, Step] = {}
    for step in steps:
        step.args = _replaced(step.args, instead)
        before = step.args.get("input")
        if not isinstance(before, Step) or before.op not in CONVOLUTIONS or uses[before] != 1:
            continue
        if step.op == "batch_norm" and not before.args.get("rectify") and _folds(before, step):
            _fold(before, step)
        elif step.op == "relu" and not before.args.get("rectify"):
            before.args["rectify"] = True
        else:
            continue
        instead[step], uses[before] = before, uses[step]
    output = _replaced(output, instead)
    return [step for step in steps if step not in instead], output


def _replaced(value: Any, instead: dict[Step, Step]) -> Any:
    return mapped(value, lambda each: instead.get(each, each) if isinstance(each, Step) else each)


def _used(steps: list[Step], output: Any) -> list[Step]:
    used = set(steps_in(output))
    for step in reversed(steps):
        if step in used:
            used.update(steps_in(step.args))
    return [step for step in steps if step in used or step.op == INPUT]


def _folds(convolution: Step, norm: Step) -> bool:
    """Whether all that is needed is constant, and of the same type and number of channels."""
    weight = convolution.args["weight"]
    needed = [norm.args.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
    needed += [convolution.args.get("bias")]
    return isinstance(weight, Tensor) and all(
        isinstance(each, Tensor) and each.shape == weight.shape[:1] and each.dtype == weight.dtype
        for each in needed
        if each is not None
    )


def _fold(convolution: Step, norm: Step) -> None:
    weight, args = convolution.args["weight"], norm.args
    one, none = weight.new_ones(len(weight)), weight.new_zeros(len(weight))
    scale = args.get("weight", one).double() / (args["running_var"].double() + args.get("eps", 1e-5)).sqrt()
    offset = (convolution.args.get("bias", none).double() - args["running_mean"].double()) * scale
    bias = args.get("bias", none).double() + offset
    scaled = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    # Where a scale overflows the type, what was zero would become NaN.
    convolution.args["weight"] = torch.where(weight == 0, 0, scaled).to(weight.dtype)
    convolution.args["bias"] = bias.to(weight.dtype)
