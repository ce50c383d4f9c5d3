"""One evolution of the layers of a model: removal, link prediction, regrowth (paper, section 3.2.2).

Data flows one way: weights -> removal -> kept links -> worth of the other positions -> regrowth -> mask. Nothing is
changed in place here; :mod:`chtconv.topology.topology` puts the new masks into force.

Shapes: a layer is a matrix of O kernels and I positions; links compete within R rows of N positions, which are the
kernels, or one row for the whole layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from chtconv.enforcement.distributed import Ranks, share_out
from chtconv.enforcement.sharding import gathered, local, whole
from chtconv.enforcement.sparse_layer import SparseLayer
from chtconv.errors import ConfigurationError, RuleError
from chtconv.layers.chains import Link, remove_dead
from chtconv.layers.matrix import by_channel, from_channels, groups_of, matrix_shape
from chtconv.methods import Method
from chtconv.methods.redistribution import redistribute
from chtconv.methods.regrowth import PRIOR, REGROWTHS, choose, shared_out, smoothed, usual_shares
from chtconv.methods.removal import REMOVALS, least_important, sampled_by_importance
from chtconv.methods.schedule import density_between
from chtconv.selection import Count, count_true, in_chunks, stochastic_round
from chtconv.topology.metrics import tied_scores


class Turnover(NamedTuple):
    """How many links go and come in each row."""

    removed: Count
    regrown: Count


class Evolved(NamedTuple):
    """What an evolution did to the links of a layer; bool tensors of shape [O, I], a row a kernel.

    Attributes:
        layer: which.
        mask: the links that are active now.
        removed: the links that were removed, whether they were chosen again or not.
        new: the links that were not there before.
        scored: float64 [2], how many link scores are positive, and the share that is tied (see
            :func:`chtconv.topology.metrics.tied_scores`); None for a method without link prediction.
        links: number of links afterwards, of each kernel or of the layer, as its allocation says.
    """

    layer: SparseLayer
    mask: Tensor
    removed: Tensor
    new: Tensor
    scored: Tensor | None
    links: int


class _Removed(NamedTuple):
    """A layer between removal and regrowth."""

    layer: SparseLayer
    kept: Tensor
    removed: Tensor
    regrown: Count
    links: int
    generator: torch.Generator


def evolve(
    layers: Sequence[SparseLayer],
    *,
    zeta: float,
    progress: float,
    generator_of: Callable[[SparseLayer], torch.Generator],
    chains: Sequence[Link] = (),
    ranks: Ranks | None = None,
) -> list[Evolved]:
    """One evolution of layers, each by its own method.

    Args:
        layers: those that evolve.
        zeta: share of the links to exchange.
        progress: of the evolution, from 0 to 1, for schedules.
        generator_of: the generator of every random choice in a layer, on the device of its weight.
        chains: which layers feed which, by module name, for methods that remove dead channels.
        ranks: those that share the work, where there are several.

    Returns:
        What became of each layer, in the order of ``layers``.

    Raises:
        ConfigurationError: a rule gave something that cannot be used; it names the layer and the rule.
    """
    generators = {layer: generator_of(layer) for layer in layers}
    plan = _plan(layers, zeta, progress, generators)
    removed = [_remove(layer, *plan[layer], progress, generators[layer]) for layer in layers]
    return _regrow_all(_without_dead(removed, chains) if chains else removed, ranks)


def _plan(
    layers: Sequence[SparseLayer], zeta: float, progress: float, generators: Mapping[SparseLayer, torch.Generator]
) -> dict[SparseLayer, tuple[int, float]]:
    """Links of a row after the evolution, and how many are exchanged, for each layer."""
    targets = {layer: _links_at(layer, progress) for layer in layers}
    together = {layer: targets[layer] for layer in layers if layer.settings.allocation == "model"}
    if together:
        targets |= _pruned_together(together, generators[next(iter(together))])
    plan = {}
    for layer, target in targets.items():
        kernel = layer.settings.allocation == "kernel"
        positions = matrix_shape(layer.module)[1] if kernel else layer.weight.numel()
        # A row without a free position has nothing to exchange its links for.
        fixed = layer.settings.method.regrowth is None or layer.stopped or min(layer.links, target) == positions
        plan[layer] = target, 0.0 if fixed else zeta * min(layer.links, target)
    return plan | _moved(layers, zeta)


def _links_at(layer: SparseLayer, progress: float) -> int:
    """Links of a row that a layer has by itself at this point."""
    method, (first, last) = layer.settings.method, layer.densities
    if method.redistribute:
        return layer.links
    return layer.links_at(density_between(first, last, method.density, progress))


def _pruned_together(targets: Mapping[SparseLayer, int], generator: torch.Generator) -> dict[SparseLayer, int]:
    """Links of layers after pruning by one threshold over the magnitudes of all of them, as in GraNet.

    The largest of each layer stays, because without any no input would reach those behind it.

    Args:
        targets: links that the layers would have if each were pruned by itself; their sum is what is left in all.
        generator: breaks ties.
    """
    sizes = [whole(layer.weight.detach())[layer.mask].float().abs().to(generator.device) for layer in targets]
    prunable = [torch.ones_like(size, dtype=torch.bool) for size in sizes]
    for size, may_go in zip(sizes, prunable, strict=True):
        may_go[size.argmax()] = False
    surplus = max(0, sum(map(len, sizes)) - sum(targets.values()))
    count = Count(surplus, torch.zeros(1, 1, dtype=torch.bool, device=generator.device))
    gone_N = least_important(torch.cat(sizes)[None], torch.cat(prunable)[None], count, generator)[0]
    gone = torch.stack([part.sum() for part in gone_N.split([len(size) for size in sizes])]).tolist()
    return {layer: layer.links - fewer for layer, fewer in zip(targets, gone, strict=True)}


def _moved(layers: Sequence[SparseLayer], zeta: float) -> dict[SparseLayer, tuple[int, float]]:
    """The plan of layers between which links move: to those with the larger mean momentum of active links."""
    moving = [layer for layer in layers if layer.settings.method.redistribute and not layer.stopped]
    if not moving:
        return {}
    sums = [(_finite(layer.dense_gradient.momentum, layer).abs() * layer.mask).sum() for layer in moving]
    means = torch.stack([each / max(1, layer.links) for each, layer in zip(sums, moving, strict=True)]).tolist()
    # At least one, because a layer without any has no momentum to get one back by.
    kept = [max(1, layer.links - round(zeta * layer.links)) for layer in moving]
    regrown = sum(layer.links for layer in moving) - sum(kept)
    targets = redistribute(kept, regrown, means, [layer.weight.numel() for layer in moving])
    return {
        layer: (target, float(min(layer.links, target) - left))
        for layer, target, left in zip(moving, targets, kept, strict=True)
    }


def turnover(links: int, target: int, exchanged: float, rows: int, generator: torch.Generator) -> Turnover:
    """How many links go and come where so many are exchanged while their number changes as well.

    Pruning comes first, as in GraNet: of the links that remain, so many are exchanged.

    Args:
        links: links of a row now.
        target: links of a row afterwards.
        exchanged: how many of the smaller number are exchanged; a fraction of a link is rounded up or down at random,
            row by row, so that rows with few links evolve too.
        rows: number of rows.
        generator: rounds.

    >>> [count.most for count in turnover(10, 8, 2.0, 1, torch.Generator())]
    [4, 2]
    """
    most, fewer_R1 = stochastic_round(exchanged, rows, generator)
    pruned, grown = max(0, links - target), max(0, target - links)
    return Turnover(Count(pruned + most, fewer_R1), Count(grown + most, fewer_R1))


def _rows(matrix_OI: Tensor, layer: SparseLayer) -> Tensor:
    return matrix_OI if layer.settings.allocation == "kernel" else matrix_OI.reshape(1, -1)


def _remove(layer: SparseLayer, target: int, exchanged: float, progress: float, generator: torch.Generator) -> _Removed:
    mask_OI = layer.matrix(layer.mask)
    mask_RN = _rows(mask_OI, layer)
    counts = turnover(layer.links, target, exchanged, len(mask_RN), generator)
    groups = groups_of(layer.module)
    weight_GOI = layer.matrix(whole(layer.weight.detach())).unflatten(0, (groups, -1))
    gradient_GOI = None
    if REMOVALS[str(layer.settings.method.removal)].needs_gradient:
        gradient = layer.weight.grad if layer.weight.grad is not None else torch.zeros_like(layer.weight)
        gradient_GOI = layer.matrix(whole(gradient)).unflatten(0, (groups, -1))
    with _named(layer, f"removal {layer.settings.method.removal!r}"):
        removed_RN = choose_removed(
            layer.settings.method,
            weight_GOI,
            gradient_GOI,
            mask_RN,
            counts.removed,
            progress,
            generator,
            layer.links,
        )
    removed_OI = removed_RN.view(mask_OI.shape)
    return _Removed(layer, mask_OI & ~removed_OI, removed_OI, counts.regrown, target, generator)


def choose_removed(
    method: Method,
    weight_GOI: Tensor,
    gradient_GOI: Tensor | None,
    mask_RN: Tensor,
    count: Count,
    progress: float,
    generator: torch.Generator,
    links: int | None = None,
) -> Tensor:
    """The links that go.

    Args:
        method: whose removal it is; it must have one.
        weight_GOI: weights of the layer, by group.
        gradient_GOI: gradients of its active links, for a removal that looks at them.
        mask_RN: bool, active links in the rows within which they compete.
        count: how many go in each row.
        progress: of the evolution, from 0 to 1.
        generator: every random choice.
        links: active links of each row, where all have as many: saves most of the time.

    Returns:
        bool of shape [R, N].

    Raises:
        RuleError: an importance that is not of the shape of the weights.
    """
    assert method.removal is not None
    rule = REMOVALS[method.removal]
    importance_GOI = rule.importance(weight_GOI, gradient_GOI)
    shape = getattr(importance_GOI, "shape", ())
    if shape != weight_GOI.shape:
        raise RuleError(
            f"gave {type(importance_GOI).__name__} of shape {list(shape)}; accepted is a tensor of the shape of the "
            f"weights, {list(weight_GOI.shape)}."
        )
    importance_RN = importance_GOI.float().reshape(mask_RN.shape)
    removed = []
    for some in in_chunks(mask_RN):
        rows = importance_RN[some], mask_RN[some], count.of(some), generator
        removed.append(sampled_by_importance(*rows, progress) if rule.soft else least_important(*rows, links))
    return torch.cat(removed)


def _without_dead(removed: list[_Removed], chains: Sequence[Link]) -> list[_Removed]:
    """Removal carried on along the chain of layers; as many links more will regrow."""
    pruning = {each.layer.module_name: each for each in removed if each.layer.settings.method.prune_dead}
    kept = {name: by_channel(each.kept, each.layer.module) for name, each in pruning.items()}
    alive = remove_dead(kept, [link for link in chains if link.producer in kept and link.consumer in kept])
    result = []
    for each in removed:
        name = each.layer.module_name
        if name in alive and not each.layer.stopped:
            left_OI = from_channels(alive[name])
            regrown = each.regrown._replace(
                most=each.links - int(left_OI.sum()), fewer_O=torch.zeros_like(each.regrown.fewer_O)
            )
            each = each._replace(kept=left_OI, removed=each.removed | each.kept & ~left_OI, regrown=regrown)
        result.append(each)
    return result


def _regrow_all(removed: Sequence[_Removed], ranks: Ranks | None) -> list[Evolved]:
    """Regrowth of each layer; where ranks share it, on one of them, unless gradients have to be gathered for it."""
    if ranks is None or ranks.size == 1 or not ranks.sharing:
        return [_regrow(each) for each in removed]
    shared = [each for each in removed if not each.layer.settings.method.needs_dense_gradients]

    def work(index: int) -> tuple[Tensor, Tensor]:
        evolved = _regrow(shared[index])
        nothing = torch.zeros(2, dtype=torch.float64, device="cpu")
        return evolved.mask.flatten(), evolved.scored if evolved.scored is not None else nothing

    found = iter(share_out(ranks, [each.kept.numel() for each in shared], work))
    return [
        _regrow(each) if each.layer.settings.method.needs_dense_gradients else _told(each, *next(found))
        for each in removed
    ]


def _evolved(each: _Removed, mask_OI: Tensor, scored: Tensor | None) -> Evolved:
    new_OI = mask_OI & ~(each.kept | each.removed)
    return Evolved(each.layer, mask_OI, each.removed, new_OI, scored, each.links)


def _told(each: _Removed, mask_N: Tensor, scored: Tensor) -> Evolved:
    """What another rank has found."""
    mask_OI = mask_N.to(each.kept.device).view(each.kept.shape)
    return _evolved(each, mask_OI, scored if each.layer.settings.method.uses_scores and each.regrown.most else None)


@contextmanager
def _named(layer: SparseLayer, rule: str) -> Iterator[None]:
    """Errors of what a rule gave name the layer and the rule."""
    try:
        yield
    except RuleError as error:
        raise ConfigurationError(f"layer {layer.name}: {rule} {error}") from error


def _regrow(each: _Removed) -> Evolved:
    with _named(each.layer, f"regrowth {each.layer.settings.method.regrowth!r}"):
        return _with_regrown(each)


def _with_regrown(each: _Removed) -> Evolved:
    layer, method = each.layer, each.layer.settings.method
    if method.regrowth is None or not each.regrown.most:
        return _evolved(each, each.kept, None)
    scores_OI = layer.link_scores(each.kept) if method.uses_scores else None
    worth_OI = _worth(layer, _comparable(scores_OI, each)) if method.worth != "nothing" else each.kept
    kept_RN, removed_RN = _rows(each.kept, layer), _rows(each.removed, layer)
    worth_RN = worth_OI.reshape(kept_RN.shape)
    regrown_RN = torch.cat([
        choose(
            REGROWTHS[method.regrowth], worth_RN[some], kept_RN[some], removed_RN[some], each.regrown.of(some),
            each.generator, temperature=method.temperature, explore=method.explore,
            kernels=len(each.kept) // len(kept_RN),
        )
        for some in in_chunks(kept_RN)
    ])  # fmt: skip
    scored = None
    if scores_OI is not None:
        scored = torch.stack([count_true(scores_OI > 0).double(), tied_scores(scores_OI, each.kept).double()])
    return _evolved(each, each.kept | regrown_RN.view(each.kept.shape), scored)


def _comparable(scores_OI: Tensor | None, each: _Removed) -> Tensor | None:
    """The link scores as positions and kernels compete with them."""
    settings = each.layer.settings
    if scores_OI is None:
        return None
    if settings.method.smoothing:
        prior_OI = each.layer.link_scores(each.kept, predictor=PRIOR)
        scores_OI = smoothed(scores_OI, prior_OI, settings.method.smoothing)
    if settings.allocation == "kernel":
        return scores_OI
    shares = settings.method.kernel_shares or usual_shares(settings.predictor, settings.graph)
    return shared_out(scores_OI, each.kept, shares)


def _worth(layer: SparseLayer, scores_OI: Tensor | None) -> Tensor:
    """What positions are worth to the regrowth of the layer: float32 [O, I]."""
    if not layer.settings.method.needs_dense_gradients:
        assert scores_OI is not None
        return scores_OI
    dense = layer.dense_gradient
    gradient = dense.momentum if layer.settings.method.worth == "momentum" else dense.captured
    gradient_OI = layer.matrix(_finite(gradient, layer))
    return gradient_OI if scores_OI is None else scores_OI * gradient_OI.abs()


def _finite(values: Tensor | None, layer: SparseLayer) -> Tensor:
    """Gradients of the whole layer in float32; what is not finite counts as 0, and so does a layer without use."""
    part = torch.zeros_like(local(layer.weight), dtype=torch.float32) if values is None else values.float()
    return gathered(part, layer.weight).nan_to_num(0.0, 0.0, 0.0)
