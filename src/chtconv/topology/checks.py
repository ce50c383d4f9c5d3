"""What can be wrong with what :func:`chtconv.sparsify` is given, found before anything is touched."""

import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from chtconv.enforcement.attachment import is_attached
from chtconv.enforcement.optimizer_state import check_supported, group_of
from chtconv.enforcement.sparse_layer import Settings
from chtconv.errors import ChtconvWarning, ConfigurationError, check_name
from chtconv.initial import ALLOCATIONS, links_at
from chtconv.layers.find import weight_of
from chtconv.layers.matrix import TRANSPOSED, Layer, matrix_shape, positions_of
from chtconv.methods.removal import REMOVALS
from chtconv.methods.schedule import Schedule
from chtconv.scores.api import check_names, check_paths
from chtconv.scores.controls import CONTROLS


def check_weights(model: nn.Module, modules: Mapping[str, Layer], optimizers: Sequence[Optimizer]) -> None:
    """Every weight is a plain one of its own that an optimizer trains; before anything is touched."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in dict.fromkeys(module.parameters(recurse=False)):
            owners.setdefault(parameter, []).append(name or type(module).__name__)
    for name, module in modules.items():
        weight = weight_of(module, name)
        if is_attached(module):
            raise ConfigurationError(f"layer {name} is sparse already; call detach() on its topology first.")
        if len(owners[weight]) > 1:
            raise ConfigurationError(
                f"layers {' and '.join(owners[weight])} share a weight; leave them out with layers=[...]."
            )
        if not any(group_of(optimizer, weight) for optimizer in optimizers):
            raise ConfigurationError(f"layer {name}: no optimizer holds its weight; pass the one that trains it.")
    for optimizer in optimizers:
        check_supported(optimizer)


def check_layer(name: str, module: Layer, settings: Settings, densities: tuple[float, float]) -> None:
    """Everything about a layer that can be wrong before anything is touched."""
    method, allocation = settings.method, settings.allocation
    check_names(settings.predictor, settings.graph, settings.windows)
    check_name("allocation", allocation, ALLOCATIONS)
    if method.uses_scores:
        check_paths(f"layer {name}", positions_of(module), settings.predictor, settings.graph)
    if method.moves_links and allocation == "kernel":
        raise ConfigurationError(
            f"layer {name}: a method with redistribute=True or prune_dead=True changes the number of links of "
            f"kernels; accepted is allocation='layer' with it, not {allocation!r}."
        )
    falling = method.density != "constant" and densities[0] >= densities[1]
    if allocation == "model" and not (falling and method.removal == "magnitude"):
        raise ConfigurationError(
            f"layer {name}: allocation='model' prunes layers together by magnitude where their density falls; accepted "
            "with it are removal='magnitude' and a density that falls, as in 'granet' and 'gmp', not removal="
            f"{method.removal!r} and density={method.density!r} from {densities[0]:.6g} to {densities[1]:.6g}. A layer "
            f"can differ: overrides={{{name!r}: {{'allocation': 'layer'}}}}."
        )
    for density in densities:
        links_at(density, matrix_shape(module), allocation, name)


def warn_of_ignored(settings: Mapping[str, Settings]) -> None:
    """Of values that make no difference: who varies one of them would see no effect where there can be none."""
    told: set[str] = set()
    for name, each in settings.items():
        method = each.method
        ignored = set(replace(method, predictor=each.predictor).ignored)
        if each.allocation == "kernel" and method.kernel_shares is not None:
            ignored.add("kernel_shares")
        for field in sorted(ignored - told):
            warnings.warn(
                f"layer {name}: {field}={getattr(method, field)!r} makes no difference with regrowth "
                f"{method.regrowth!r}, predictor {each.predictor!r} and allocation {each.allocation!r}.",
                ChtconvWarning,
                stacklevel=3,
            )
        told |= ignored


def warn_of_no_end(settings: Mapping[str, Settings], zeta_schedule: str | None) -> None:
    """Where evolution never ends: of what methods would change until then, and stays what it is.

    Args:
        settings: of each layer.
        zeta_schedule: that was asked for, None where it is that of the method.
    """
    told: set[str] = set()
    for name, each in settings.items():
        method = each.method
        falling = zeta_schedule is None and method.zeta_schedule not in (None, "constant")
        stays = {"zeta": falling, "delta of its removal": method.removal is not None and REMOVALS[method.removal].soft}
        for what in (what for what, changes in stays.items() if changes and what not in told):
            warnings.warn(
                f"layer {name}: {what} stays what it is, because evolution has no end to go by; give stop or "
                "total_steps.",
                ChtconvWarning,
                stacklevel=3,
            )
            told.add(what)


def warn_of_no_evolution(settings: Mapping[str, Settings], schedule: Schedule) -> None:
    """Where it ends before it begins, as of a length in epochs; somebody who wants none says so by ``stop=0``."""
    evolving = [name for name, each in settings.items() if each.method.evolves]
    if evolving and schedule.stop and schedule.stop <= schedule.interval:
        warnings.warn(
            f"layer{'s' if len(evolving) > 1 else ''} {', '.join(evolving)}: no evolution falls between the interval, "
            f"{schedule.interval}, and stop, {schedule.stop}, so that masks change by evolve() alone; accepted is "
            "interval below stop. Both, and total_steps, of which stop is three quarters, are optimizer steps.",
            ChtconvWarning,
            stacklevel=3,
        )


def warn_of_no_paths(modules: Mapping[str, Layer], settings: Mapping[str, Settings]) -> None:
    """Of layers whose kernel graph has no paths: who predicts links there would train SET and not know it."""
    without = [
        name
        for name, each in settings.items()
        if each.method.uses_scores
        and each.predictor not in CONTROLS
        and each.graph == "kernel"
        and not _has_paths(modules[name])
    ]
    if without:
        warnings.warn(
            f"layer{'s' if len(without) > 1 else ''} {', '.join(without)}: the kernel graph has no path of length 3 "
            "there, so that every link score is 0 and says nothing of which links come; with graph='layer', in general "
            "or in overrides, there are some.",
            ChtconvWarning,
            stacklevel=3,
        )


def _has_paths(module: Layer) -> bool:
    """Whether a disabled position can be at the end of a path of length 3 on the kernel graph of a layer.

    That takes two windows that share an activation, or, since the sides of a transposed convolution are exchanged, two
    activations that share a window.
    """
    if isinstance(module, nn.Linear):
        return False
    if isinstance(module, TRANSPOSED) or module.padding_mode == "circular":
        return positions_of(module) > 1
    axes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    return any(stride // math.gcd(stride, dilation) < kernel for kernel, stride, dilation in axes)


def whole_steps(name: str, value: Any, least: int) -> int:
    """A number of optimizer steps, of any type of whole numbers."""
    steps = _whole(value)
    if steps is None or steps < least:
        raise ConfigurationError(f"{name}={value!r}: accepted is a whole number of at least {least} optimizer steps.")
    return steps


def whole_seed(value: Any) -> int:
    """A seed, of any type of whole numbers."""
    seed = _whole(value)
    if seed is None:
        raise ConfigurationError(f"seed={value!r}: accepted is a whole number.")
    return seed


def _whole(value: Any) -> int | None:
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
