"""Two lines make any PyTorch model sparse: what is checked, and how it starts."""

import math
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from chtconv.errors import ConfigurationError
from chtconv.hooks import WeakHook
from chtconv.initial import links_per_kernel, random_mask
from chtconv.layers import Convolution, SparseLayer, find_layers, weight_of
from chtconv.methods import find_method
from chtconv.optimizer_state import check_supported, group_of
from chtconv.randomness import canonical_names, generator
from chtconv.schedule import Schedule
from chtconv.scores.api import check_names, check_paths
from chtconv.topology import MARK, LinkPrediction, Topology


def sparsify(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    sparsity: float = 0.7,
    method: str = "chts",
    predictor: str = "ch3_l3n",
    graph: str = "kernel",
    zeta: float = 0.3,
    zeta_schedule: str | None = None,
    interval: int = 100,
    stop: int | None = None,
    total_steps: int | None = None,
    layers: Sequence[str] | None = None,
    seed: int = 0,
    exact: bool = False,
) -> Topology:
    """Makes the convolutions of a model sparse and lets their topology evolve as it trains.

    The model, the optimizer and the training loop stay as they are: masks are enforced by hooks, and evolution runs
    by itself after every ``interval`` optimizer steps.

    Args:
        model: any model; its weights are set to zero off the masks, in place.
        optimizer: the optimizer of its weights, or several. A step is counted when the last of them has stepped.
        sparsity: share of disabled links of every kernel, in [0, 1).
        method: ``"static"``, ``"set"``, ``"cht"`` or ``"chts"``, see :data:`chtconv.methods.METHODS`.
        predictor: link predictor of CHT and CHTs, see :func:`chtconv.link_scores`.
        graph: ``"kernel"``, the graph of the paper, or ``"layer"``, in which all kernels of a layer share one.
        zeta: fraction of the links of a kernel that an evolution removes and regrows, in (0, 1].
        zeta_schedule: ``"constant"`` or ``"cosine"`` (falling to 0 at ``stop``); by default cosine where the end is
            known from ``stop`` or ``total_steps``, else constant.
        interval: optimizer steps between two evolutions.
        stop: no evolution at this optimizer step or later; by default three quarters of ``total_steps``.
        total_steps: length of the training in optimizer steps, only used for ``stop``.
        layers: names of the convolutions to make sparse, with wildcards; all by default.
        seed: initial masks and evolution depend on this and nothing else that is random.
        exact: score links with sums that do not depend on the number of threads, at some cost, see
            :func:`chtconv.link_scores`.

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
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    if not optimizers or not all(isinstance(each, Optimizer) for each in optimizers):
        raise ConfigurationError(f"optimizer={optimizer!r}: accepted is an optimizer of torch, or a list of them.")
    if total_steps is not None and total_steps < 1:
        raise ConfigurationError(f"total_steps={total_steps!r}: accepted is at least 1 optimizer step.")
    check_names(predictor, graph)
    if stop is None and total_steps is not None:
        stop = total_steps * 3 // 4
    decay = zeta_schedule or ("constant" if stop is None else "cosine")
    schedule = Schedule(zeta, decay, interval, stop)
    chosen = find_method(method)
    modules = find_layers(model, layers)
    links = _links(modules, optimizers, sparsity)
    if chosen.uses_scores:
        for name, module in modules.items():
            check_paths(f"layer {name}", math.prod(module.kernel_size), predictor, graph)
    seed_names = canonical_names(_parameter(name) for name in modules)
    sparse = [
        _sparse_layer(_parameter(name), seed_names[_parameter(name)], module, links[name], seed)
        for name, module in modules.items()
    ]
    return Topology(optimizers, sparse, chosen, LinkPrediction(predictor, graph, exact), schedule, seed)


def _links(modules: dict[str, Convolution], optimizers: list[Optimizer], sparsity: float) -> dict[str, int]:
    """Links of a kernel of each layer, after every layer and optimizer was checked and before any is touched."""
    owner: dict[nn.Parameter, str] = {}
    links = {}
    for name, module in modules.items():
        weight = weight_of(module, name)
        if getattr(module, MARK, WeakHook()).alive:
            raise ConfigurationError(f"layer {name} is sparse already; call detach() on its topology first.")
        if weight in owner:
            raise ConfigurationError(
                f"layers {owner[weight]} and {name} share a weight; leave both out with layers=[...]."
            )
        if not any(group_of(optimizer, weight) for optimizer in optimizers):
            raise ConfigurationError(f"layer {name}: no optimizer holds its weight; pass the one that trains it.")
        owner[weight] = name
        links[name] = links_per_kernel(sparsity, weight[0].numel(), name)
    for optimizer in optimizers:
        check_supported(optimizer)
    return links


def _parameter(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"


def _sparse_layer(name: str, seed_name: str, module: Convolution, links: int, seed: int) -> SparseLayer:
    weight = weight_of(module, name)
    draw = generator(seed, "mask", seed_name, device=weight.device)
    return SparseLayer(name, seed_name, module, links, random_mask(len(weight), weight[0].numel(), links, draw))
