"""Numbers that describe a sparse topology."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chtconv.enforcement.sparse_layer import SparseLayer
from chtconv.flops import layer_flops, training_flops
from chtconv.layers.chains import Link, active_rate, remove_dead
from chtconv.layers.matrix import Layer, by_channel
from chtconv.methods.regrowth import ROUNDING_BITS

# What the statistics of a layer take from the record of the last evolution.
FROM_RECORD = ("overlap", "turnover", "survival", "zero_scores", "tied_scores")
_SUMS = ("links", "size", "explored", "forward_flops", "dense_forward_flops", "training_flops", "dense_training_flops")
_SAMPLE = 8


def layer_stats(layer: SparseLayer, steps: int) -> dict[str, Any]:
    """Statistics of a layer after so many optimizer steps.

    * ``shape``, ``links``, ``size``, ``density``, ``sparsity``;
    * ``itop``: share of all links that were ever active (in-time over-parametrisation), and their number, ``explored``;
    * ``empty_slices``: share of (kernel, input channel) pairs without any link;
    * ``stopped``: whether it stopped evolving;
    * ``forward_flops``: floating point operations of one call for one sample (one row of input of a linear layer), at
      the size of the last input in training mode (of the last one, where there was none yet), with
      ``dense_forward_flops`` beside it; ``training_flops``: of all steps so far for one sample a step, so times the
      batch size, with dense weight gradients where the method asked for them. None before the first forward pass. Of a
      layer that is called several times in a pass, :func:`chtconv.count_flops` counts all calls.
    """
    mask = layer.mask
    links, size, explored = int(mask.sum()), mask.numel(), int(layer.explored.sum())
    return {
        "shape": list(mask.shape),
        "links": links,
        "size": size,
        "density": links / size,
        "sparsity": 1 - links / size,
        "itop": explored / size,
        "explored": explored,
        "empty_slices": float(empty_slices(layer.matrix(mask), layer.module)),
        "stopped": layer.stopped,
    } | _flops(layer, links / size, steps)


def _flops(layer: SparseLayer, density: float, steps: int) -> dict[str, Any]:
    if layer.input_size is None:
        return dict.fromkeys(_SUMS[3:])
    module = layer.module
    channels = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    dense = layer_flops(module, (1, channels, *layer.input_size))
    mean = {layer.name: layer.link_steps / (layer.weight.numel() * steps) if steps else density}
    dense_steps = layer.dense_gradient.steps
    return {
        "forward_flops": dense * density,
        "dense_forward_flops": dense,
        "training_flops": training_flops({layer.name: dense}, steps, mean, dense_gradient_steps=dense_steps),
        "dense_training_flops": 3 * dense * steps,
    }


def overall_stats(by_layer: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The same over all layers, each weighted by its size; FLOPs are those of the sparse layers, not of the model."""
    columns = {key: [stats[key] for stats in by_layer.values()] for key in _SUMS}
    sums: dict[str, Any] = {key: None if None in values else sum(values) for key, values in columns.items()}
    density, explored = sums["links"] / sums["size"], sums.pop("explored")
    return sums | {"density": density, "sparsity": 1 - density, "itop": explored / sums["size"]}


def overall_evolution(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Overlap and turnover of an evolution over all layers, from its rows; None without any.

    >>> first = {"removed": 6, "rechosen": 3, "new": 3, "links": 20}
    >>> rows = [first, {"removed": 2, "rechosen": 1, "new": 1, "links": 5}]
    >>> overall_evolution(rows), overall_evolution([])
    ({'overlap': 0.5, 'turnover': 0.16}, {'overlap': None, 'turnover': None})
    """
    if not rows:
        return {"overlap": None, "turnover": None}
    removed, rechosen, new, links = (sum(row[key] for row in rows) for key in ("removed", "rechosen", "new", "links"))
    return {"overlap": rechosen / removed if removed else 0.0, "turnover": new / links if links else 0.0}


def anp(layers: Sequence[SparseLayer], chains: Sequence[Link]) -> float | None:
    """ANP rate: share of the channels between consecutive sparse layers that links connect to both sides.

    After percolation: channels that are connected only to dead ones count as dead. None where no two sparse layers
    are known to follow each other.
    """
    masks = {layer.module_name: by_channel(layer.matrix(layer.mask), layer.module) for layer in layers}
    known = [link for link in chains if link.producer in masks and link.consumer in masks]
    return active_rate(remove_dead(masks, known), known) if known else None


def empty_slices(mask_OI: Tensor, layer: Layer) -> Tensor:
    """Share of the slices (kernel, input channel) of a mask without any link."""
    # The largest byte of a slice: several times faster than ``any``.
    return 1 - by_channel(mask_OI, layer).view(torch.uint8).amax(dim=2).float().mean()


def tied_scores(scores_OI: Tensor, active_OI: Tensor) -> Tensor:
    """Share of the candidates whose score is positive and equal to another one of their kernel.

    Equal to the precision at which regrowth compares, and in up to 8 kernels, evenly spread.
    """
    kernels = len(scores_OI)
    chosen_S = torch.arange(min(kernels, _SAMPLE), device=scores_OI.device) * kernels // min(kernels, _SAMPLE)
    scores_SI, active_SI = scores_OI[chosen_S], active_OI[chosen_S]
    order_SI = scores_SI.view(torch.int32).add(1 << ROUNDING_BITS - 1) >> ROUNDING_BITS
    ordered_SI = order_SI.mul_(~active_SI).sort(dim=1).values
    same = (ordered_SI[:, 1:] == ordered_SI[:, :-1]) & (ordered_SI[:, 1:] > 0)
    tied = torch.zeros_like(active_SI)
    tied[:, 1:] |= same
    tied[:, :-1] |= same
    return tied.sum() / (~active_SI).sum().clamp_min(1)
