"""One model on many ranks: the same masks on each of them, by construction, and checked.

Every rank draws the same random numbers (:mod:`chtconv.randomness`) and, under data parallelism, holds the same
weights, so that every rank finds the same masks by itself. What differs between ranks is made equal first: gradients
of disabled links, which nothing else reduces, are averaged, and input sizes are those of the first rank that knows
them. Scoring is shared out: each layer regrows on one rank, and its mask travels as packed bits. A hash of what each
rank did is compared before anything is put into force.
"""

import hashlib
import heapq
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from chtconv.enforcement.sharding import is_sharded
from chtconv.enforcement.sparse_layer import SparseLayer
from chtconv.errors import ConfigurationError
from chtconv.layers import input_size

# What regrowth costs beside a price for each weight, in weights: about 5 ms and 85 ns on one core.
_OVERHEAD = 60_000
_AXES = 3


class Ranks:
    """The processes that train one model.

    Attributes:
        size: how many; 1 where this process is alone, and nothing here costs anything.
        rank: which of them this is, from 0.
        sharing: whether regrowth of layers is shared out among them.
    """

    def __init__(self, group: Any = None, device: torch.device | str = "cpu") -> None:
        self._group = group
        self.size = 1 if group is None else distributed.get_world_size(group)
        self.rank = 0 if group is None else distributed.get_rank(group)
        self.sharing = True
        # Gloo talks about tensors of the CPU; others about those of their device.
        gloo = group is None or distributed.get_backend(group) == "gloo"
        self._device = torch.device("cpu") if gloo else torch.device(device)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks, in float32; the same bits on each of them."""
        total = values.to(self._device, torch.float32, copy=True)
        distributed.all_reduce(total, group=self._group)
        return total.div_(self.size).to(values.device)

    def gather(self, values: Tensor) -> list[Tensor]:
        """What each rank gave, on the CPU; of one shape."""
        mine = values.to(self._device).contiguous()
        found = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(found, mine, group=self._group)
        return [each.cpu() for each in found]


def find_ranks(group: object, device: torch.device) -> Ranks:
    """The ranks that hold the model.

    Args:
        group: True for all of ``torch.distributed`` where it runs, a process group for those in it, False for this
            process alone.
        device: of the weights.

    Raises:
        ConfigurationError: anything else, or a group without this process.
    """
    running = distributed.is_available() and distributed.is_initialized()
    if isinstance(group, bool):
        return Ranks(distributed.group.WORLD if running and group else None, device)
    if not running or not isinstance(group, distributed.ProcessGroup):
        raise ConfigurationError(
            f"distributed={group!r}: accepted is True (all ranks, where torch.distributed runs), a process group, or "
            "False (this process has a model of its own)."
        )
    return Ranks(group, device)


def agree(ranks: Ranks, layers: Sequence[SparseLayer], step: int, evolutions: int) -> None:
    """Before an evolution: every rank is at the same step, and goes by the same input sizes.

    Raises:
        ConfigurationError: ranks that counted different steps.
    """
    if ranks.size == 1:
        return
    sizes = [[*(layer.input_size or ()), *[-1] * _AXES][:_AXES] for layer in layers]
    told = ranks.gather(torch.tensor([[step, evolutions, 0], *sizes], device="cpu"))
    counters = [tuple(each[0, :2].tolist()) for each in told]
    if len(set(counters)) > 1:
        raise ConfigurationError(
            f"the ranks are at different (optimizer steps, evolutions): {counters}, in order of rank; every rank of a "
            "model must take the same steps. With distributed=False each process has a model of its own."
        )
    for index, layer in enumerate(layers):
        known = [each[index + 1] for each in told if each[index + 1, 0] >= 0]
        if known:
            input_size.put(layer.module, tuple(known[0][known[0] >= 0].tolist()))


def average_gradients(ranks: Ranks, layers: Sequence[SparseLayer]) -> None:
    """Averages what was kept of dense gradients, which every rank has of its own batches only.

    An average over steps is linear, so that this is enough once, before somebody looks. Of sharded weights the
    gradients are reduced already when they are kept.
    """
    if ranks.size == 1:
        return
    for layer in layers:
        if is_sharded(layer.weight):
            continue
        # A layer that this rank did not use has none.
        dense, nothing = layer.dense_gradient, torch.zeros_like(layer.weight, dtype=torch.float32)
        if layer.settings.method.worth == "momentum":
            dense.momentum = ranks.mean(dense.momentum if dense.momentum is not None else nothing)
        elif layer.settings.method.needs_dense_gradients:
            dense.captured = ranks.mean(dense.captured if dense.captured is not None else nothing)


def verify(ranks: Ranks, names: Sequence[str], tensors: Sequence[Sequence[Tensor]], what: str) -> None:
    """Compares bool tensors of each layer over all ranks.

    Args:
        ranks: all must call this, with the same names.
        names: of the layers.
        tensors: of each layer.
        what: they are, for the message.

    Raises:
        ConfigurationError: on every rank alike, naming the layers and the ranks that differ from rank 0.
    """
    if ranks.size == 1:
        return
    told = ranks.gather(
        torch.tensor([_digest(name, each) for name, each in zip(names, tensors, strict=True)], device="cpu")
    )
    differing = {
        name: [rank for rank, each in enumerate(told) if each[index] != told[0][index]]
        for index, name in enumerate(names)
    }
    wrong = {name: which for name, which in differing.items() if which}
    if wrong:
        listed = "; ".join(f"{name}: rank {', '.join(map(str, which))}" for name, which in wrong.items())
        raise ConfigurationError(
            f"{what} differ from those of rank 0 ({listed}). All ranks must hold the same weights, and be given the "
            "same seed and the same settings; with distributed=False each process has a model of its own."
        )


def _digest(name: str, tensors: Sequence[Tensor]) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8)
    for each in tensors:
        digest.update(repr(tuple(each.shape)).encode())
        digest.update(_packed(each).tobytes())
    return int.from_bytes(digest.digest(), "big", signed=True)


def _packed(mask: Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    return np.packbits(mask.flatten().cpu().numpy())


def share_out(
    ranks: Ranks, sizes: Sequence[int], work: Callable[[int], tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Does a piece of work for each layer, each on one rank, and tells all others.

    Args:
        ranks: all must call this, with the same sizes.
        sizes: number of weights of each layer.
        work: finds the mask of the layer with this index, bool [size], and two numbers about it, float64 [2].

    Returns:
        What ``work`` returns for each layer, the same on every rank; on the CPU where another rank found it.
    """
    owners = assign(sizes, ranks.size)
    done = {index: work(index) for index, owner in enumerate(owners) if owner == ranks.rank}
    starts, filled = [], [0] * ranks.size
    for owner, size in zip(owners, sizes, strict=True):
        starts.append(filled[owner])
        filled[owner] += _NUMBERS + -(-size // 8)
    mine = np.zeros(max(filled), np.uint8)
    for index, (mask_N, numbers) in done.items():
        message = np.concatenate([numbers.cpu().numpy().view(np.uint8), _packed(mask_N)])
        mine[starts[index] : starts[index] + len(message)] = message
    told = [each.numpy() for each in ranks.gather(torch.from_numpy(mine))]

    def read(index: int) -> tuple[Tensor, Tensor]:
        message = told[owners[index]][starts[index] :]
        bits = np.unpackbits(message[_NUMBERS:], count=sizes[index])
        return torch.from_numpy(bits.view(np.bool_)), torch.from_numpy(message[:_NUMBERS].copy().view(np.float64))

    return [done[index] if index in done else read(index) for index in range(len(sizes))]


# Bytes of the two numbers that go with a mask.
_NUMBERS = 16


def assign(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which rank takes each layer: the largest first, each to the rank that has least to do.

    >>> assign([1_000_000, 2_000_000, 1_000_000], 2)
    [1, 0, 1]
    """
    busy = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, rank = heapq.heappop(busy)
        owners[index] = rank
        heapq.heappush(busy, (load + sizes[index] + _OVERHEAD, rank))
    return owners
