"""Two lines make any PyTorch model sparse: what is checked, and how it starts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from chtconv.enforcement.distributed import find_ranks, verify
from chtconv.enforcement.sharding import check_sharding
from chtconv.enforcement.sparse_layer import Settings, SparseLayer
from chtconv.errors import ConfigurationError, unknown
from chtconv.initial import RANDOM, LinearTopology, initial_mask, links_at
from chtconv.initial.distribution import check_sparsity, distributed
from chtconv.layers.consecutive import consecutive_layers
from chtconv.layers.find import Choice, find_layers
from chtconv.layers.matrix import Layer, groups_of, kernel_shape, matrix_shape, positions_of
from chtconv.methods import Method
from chtconv.methods import method as find_method
from chtconv.methods.schedule import USUAL_DECAY, Schedule
from chtconv.randomness import canonical_names, generator
from chtconv.topology.checks import (
    check_layer,
    check_weights,
    warn_of_ignored,
    warn_of_no_end,
    warn_of_no_evolution,
    warn_of_no_paths,
    whole_seed,
    whole_steps,
)
from chtconv.topology.topology import Topology

if TYPE_CHECKING:
    # Not in every build of torch.
    from torch.distributed import ProcessGroup

OVERRIDABLE = ("sparsity", "method", "predictor", "graph", "windows", "allocation", "initial")


def sparsify(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    sparsity: float = 0.7,
    method: str | Method = "chts",
    predictor: str = "ch3_l3n",
    graph: str = "kernel",
    windows: str = "in_bounds",
    zeta: float = 0.3,
    zeta_schedule: str | None = None,
    interval: int = 100,
    stop: int | None = None,
    total_steps: int | None = None,
    layers: Choice | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    allocation: str | None = None,
    distribution: str = "uniform",
    initial: str | LinearTopology = RANDOM,
    initial_sparsity: float | None = None,
    seed: int = 0,
    state: dict[str, Any] | None = None,
    exact: bool = False,
    distributed: "bool | ProcessGroup" = True,
) -> Topology:
    """Makes layers of a model sparse and lets their topology evolve as it trains.

    The model, the optimizer and the training loop stay as they are: masks are enforced by hooks, and evolution runs
    by itself after every ``interval`` optimizer steps.

    Args:
        model: any model; its weights are set to zero off the masks, in place.
        optimizer: the optimizer of its weights, or several. A step is counted when the last of them has stepped:
            list them in the order in which they step, so that an evolution finds no gradients that are still on their
            way to the others.
        sparsity: share of disabled links, in [0, 1): of every kernel, or of the layers as ``allocation`` and
            ``distribution`` say; where the method changes it, that at the end.
        method: a name in :data:`chtconv.METHODS`, or a method put together with :func:`chtconv.method`.
        predictor: link predictor of methods that use one, see :func:`chtconv.link_scores`.
        graph: ``"kernel"``, the graph of the paper, or ``"layer"``, in which all kernels of a layer share one: for
            linear layers, 1x1 convolutions and others whose windows do not overlap, whose kernel graphs have no paths.
        windows: which windows scores are averaged over, see :func:`chtconv.link_scores`.
        zeta: fraction of the links that an evolution removes and regrows, in (0, 1].
        zeta_schedule: ``"constant"``, ``"cosine"`` or ``"linear"`` (both falling to 0 at ``stop``), for all layers; by
            default that of ``method`` or, where it has none, cosine; constant where no end is known from ``stop`` or
            ``total_steps``.
        interval: optimizer steps between two evolutions.
        stop: no evolution at this optimizer step or later; by default three quarters of ``total_steps``.
        total_steps: length of the training in optimizer steps, only used for ``stop``.
        layers: what to make sparse: names of modules with wildcards, types of modules, or a function of name and
            module, which is asked about linear layers, too; by default every convolution, transposed ones too, and no
            linear layer.
        overrides: by name of modules with wildcards, what is different there: any of ``sparsity``, ``method``,
            ``predictor``, ``graph``, ``windows``, ``allocation`` and ``initial``. Where several match, later ones win.
        allocation: ``"kernel"``, the same number of links in every kernel (the paper), or ``"layer"``, where links
            compete within the whole layer (as SET and RigL are usually run; link scores by the method's
            ``kernel_shares``), or ``"model"``, the same but for a density that falls: then one threshold over the
            magnitudes of all layers says which links are pruned, and each layer exchanges its own (as published
            GraNet does; layers with a sparsity of their own are pruned by themselves); by default kernel, but layer
            for methods that move links between kernels or layers.
        distribution: ``"uniform"``, the same sparsity in every layer, or ``"erk"`` (Erdős-Rényi-Kernel); layers with
            a sparsity of their own do not take part.
        initial: initial topology: ``"random"``, or for linear layers ``"small_world"`` or ``"receptive_field"``, see
            :mod:`chtconv.initial.bipartite`.
        initial_sparsity: sparsity before training, for methods that change it; by default that of the method, or for
            layers with a sparsity of their own that one, where it is lower.
        seed: initial masks and evolution depend on this and nothing else that is random.
        state: of a topology that was saved, to go on from at once. Where weights are loaded before ``sparsify`` is
            called, as frameworks do, this keeps them; without it they would be cut to new masks, and loading the
            state afterwards would say so.
        exact: score links with sums that do not depend on the number of threads, at some cost, see
            :func:`chtconv.link_scores`.
        distributed: which processes train this model, where ``torch.distributed`` runs: True for all of them, a
            process group for those in it, False for this one alone. All of them call this together; see
            docs/distributed.md.

    Returns:
        The topology: masks, statistics, state, and ``detach()``.

    Raises:
        ConfigurationError: a value, layer, model or optimizer that cannot be used, with what would be accepted.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> topology = sparsify(model, optimizer, sparsity=0.9, interval=1)
        >>> model(torch.randn(2, 3, 4, 4)).sum().backward()
        >>> optimizer.step()
        >>> topology.evolutions, topology.stats()["links"]
        (1, 24)
    """
    if torch.is_inference_mode_enabled():
        raise ConfigurationError("sparsify in torch.inference_mode(): accepted is outside of it, where models train.")
    seed, optimizers = whole_seed(seed), _optimizers(optimizer)
    modules = find_layers(model, layers)
    general = Settings(sparsity, find_method(method), predictor, graph, exact, allocation, initial, windows)
    settings = _settings(modules, general, overrides or {})
    schedule = _schedule(settings, zeta, zeta_schedule, general.method.zeta_schedule, interval, stop, total_steps)
    check_weights(model, modules, optimizers)
    ranks = find_ranks(distributed, next(iter(modules.values())).weight.device)
    check_sharding(model, modules, optimizers, ranks.size)
    own = {
        name
        for pattern, changes in (overrides or {}).items()
        for name in modules
        if fnmatchcase(name, pattern) and "sparsity" in changes
    }
    for name in own:
        if settings[name].allocation == "model":
            settings[name] = replace(settings[name], allocation="layer")
    warn_of_ignored(settings)
    densities = _densities(modules, settings, own, distribution, sparsity, initial_sparsity)
    for name, module in modules.items():
        check_layer(name, module, settings[name], densities[name])
    warn_of_no_paths(modules, settings)
    warn_of_no_evolution(settings, schedule)
    if schedule.stop is None:
        warn_of_no_end(settings, zeta_schedule)
    chains = None
    if any(each.method.prune_dead for each in settings.values()):
        chains = consecutive_layers(model, list(modules))
    seed_names = canonical_names(_parameter(name) for name in modules)
    sparse = [
        _sparse_layer(name, seed_names[_parameter(name)], module, settings[name], densities[name], seed)
        for name, module in modules.items()
    ]
    verify(ranks, [each.name for each in sparse], [(each.mask,) for each in sparse], "initial masks")
    return Topology(model, optimizers, sparse, schedule, seed, chains, ranks, state)


def _optimizers(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    if not optimizers or not all(isinstance(each, Optimizer) for each in optimizers):
        raise ConfigurationError(f"optimizer={optimizer!r}: accepted is an optimizer of torch, or a list of them.")
    return [_unwrapped(each) for each in optimizers]


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that steps within wrappers: those of frameworks (Lightning, Fabric, Accelerate), SAM, Lookahead."""
    for name in ("optimizer", "base_optimizer"):
        if isinstance(inner := getattr(optimizer, name, None), Optimizer):
            return _unwrapped(inner)
    return optimizer


def _settings(
    modules: Mapping[str, Layer], general: Settings, overrides: Mapping[str, Mapping[str, Any]]
) -> dict[str, Settings]:
    """The settings of each layer."""
    if not isinstance(overrides, Mapping) or not all(
        isinstance(name, str) and isinstance(each, Mapping) for name, each in overrides.items()
    ):
        raise ConfigurationError(
            f"overrides={overrides!r}: accepted is a dict from names to dicts, such as {{'head': {{'sparsity': 0.5}}}}."
        )
    for pattern, changes in overrides.items():
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ConfigurationError(
                f"overrides[{pattern!r}] matches no sparse layer; those of the model are {', '.join(modules)}."
            )
        for key in changes:
            if key not in OVERRIDABLE:
                raise unknown(f"override of {pattern!r}", key, OVERRIDABLE)
    settings = dict.fromkeys(modules, general)
    for name in modules:
        for pattern, changes in overrides.items():
            if fnmatchcase(name, pattern):
                settings[name] = replace(settings[name], **changes)
        each = settings[name]
        chosen = find_method(each.method)
        settings[name] = replace(
            each,
            method=chosen,
            predictor=chosen.predictor or each.predictor,
            allocation=each.allocation or chosen.allocation,
        )
    return settings


def _schedule(
    settings: Mapping[str, Settings],
    zeta: float,
    zeta_schedule: str | None,
    usual: str | None,
    interval: int,
    stop: int | None,
    total_steps: int | None,
) -> Schedule:
    interval = whole_steps("interval", interval, 1)
    stop = None if stop is None else whole_steps("stop", stop, 0)
    if total_steps is not None:
        usual_stop = whole_steps("total_steps", total_steps, 1) * 3 // 4
        stop = usual_stop if stop is None else stop
    for name, each in settings.items():
        if each.method.density != "constant" and stop is None:
            raise ConfigurationError(
                f"layer {name}: the density schedule {each.method.density!r} needs an end: give stop or total_steps."
            )
        if each.method.density != "constant" and stop is not None and stop <= interval:
            raise ConfigurationError(
                f"layer {name}: the density schedule {each.method.density!r} would never begin, because no evolution "
                f"falls between the interval, {interval}, and stop, {stop}; accepted is interval below stop."
            )
    decay = zeta_schedule or ("constant" if stop is None else usual or USUAL_DECAY)
    return Schedule(zeta, decay, interval, stop)


def _densities(
    modules: Mapping[str, Layer],
    settings: Mapping[str, Settings],
    own: Collection[str],
    distribution: str,
    sparsity: float,
    initial_sparsity: float | None,
) -> dict[str, tuple[float, float]]:
    """Density of each layer before training and at the end."""
    if initial_sparsity is not None:
        check_sparsity(initial_sparsity, "initial_sparsity")
    shapes = {
        name: (matrix_shape(module)[0], *kernel_shape(module)) for name, module in modules.items() if name not in own
    }

    last = distributed(distribution, shapes, sparsity) | {
        name: _density(each.sparsity, name) for name, each in settings.items() if name not in shapes
    }
    densities = {}
    for name, each in settings.items():
        start = initial_sparsity if initial_sparsity is not None else each.method.initial_sparsity
        if each.method.density == "constant":
            if initial_sparsity is not None:
                raise ConfigurationError(
                    f"layer {name}: initial_sparsity={initial_sparsity!r} with a method of constant density; accepted "
                    "are methods that change it, such as method='granet', or chtconv.method(..., density='sigmoid')."
                )
            densities[name] = (last[name], last[name])
        elif start is None:
            raise ConfigurationError(
                f"layer {name}: the density schedule {each.method.density!r} needs a start: give initial_sparsity."
            )
        else:
            first = distributed(distribution, shapes, start)[name] if name in shapes else _density(start, name)
            if name not in shapes and initial_sparsity is None:
                first = max(first, last[name])
            if each.method.regrowth is None and first < last[name]:
                raise ConfigurationError(
                    f"layer {name}: from sparsity {1 - first:.6g} to {1 - last[name]:.6g} links would have to come, "
                    "and the method has no regrowth; accepted is a start that is no sparser than the end."
                )
            densities[name] = (first, last[name])
    return densities


def _density(sparsity: float, name: str) -> float:
    check_sparsity(sparsity, f"layer {name}: sparsity")
    return 1 - float(sparsity)


def _parameter(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"


def _sparse_layer(
    layer: str, seed_name: str, module: Layer, settings: Settings, densities: tuple[float, float], seed: int
) -> SparseLayer:
    shape, name = matrix_shape(module), _parameter(layer)
    mask_OI = initial_mask(
        settings.initial,
        shape,
        links_at(densities[0], shape, settings.allocation, layer),
        settings.allocation,
        generator(seed, "mask", seed_name, device=module.weight.device),
        layer,
        linear=positions_of(module) == 1 and groups_of(module) == 1,
    )
    return SparseLayer(name, seed_name, module, settings, densities, mask_OI)
