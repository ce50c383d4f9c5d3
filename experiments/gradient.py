"""What link scores know of the gradient: how large it is where a rule would put a link, halfway through training.

python experiments/gradient.py --sparsities 0.7 0.9 0.95 --methods set chts --seeds 1 2 3

Trains each network for half of its epochs (recipe cifar-short; resumable; on the CPU), then takes the gradient of the
loss at all places of every kernel, with links or without, from training images that are drawn as the next epoch would.
Half of them choose the places with the largest gradient, the other half judge every rule, so that no rule is judged by
what it chose from. Masks are scored as they are. Adds a line for each network to results/gradient.jsonl.

Shapes: O kernels, C input channels, K positions of a kernel.
"""

import argparse
import json
from contextlib import suppress
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from layout import ROOT, append
from torch import Tensor
from torch.nn import functional

from chtconv import link_scores
from chtconv.explain.layers import MaskedLayer, masked_layers
from chtconv.methods.regrowth import REGROWTHS, choose
from chtconv.models import build_model
from chtconv.selection import Count
from chtconv.training import Config, RunFolder, recipe, train
from chtconv.training.progress import Progress
from chtconv.training.run import Run, prepare

RESULTS = ROOT / "results" / "gradient.jsonl"
BATCHES = 40  # to choose by, and as many to judge by
SCORES: dict[str, dict[str, str]] = {
    "share of windows": {"predictor": "in_bounds"},
    "slice occupancy": {"predictor": "occupancy", "windows": "all"},
    "CH3-L3n, kernel graph": {"predictor": "ch3_l3n", "graph": "kernel", "windows": "all"},
    "CH3-L3n, layer graph": {"predictor": "ch3_l3n", "graph": "layer", "windows": "all"},
}


class Gain(NamedTuple):
    """How many times larger than elsewhere the gradient is where a rule puts links, in the mean.

    Attributes:
        place: where it puts them, and at any free place of the same kernel.
        slice: at any free place of the slices in which it puts them, and of the same kernel.
        position: where it puts them, and at any free place of the same slices. ``place`` is the product of both.
    """

    place: float
    slice: float
    position: float


def gain(worth_OCK: Tensor, gradient_OCK: Tensor, links_OCK: Tensor) -> Gain:
    """The gain of a rule that draws the next link of each kernel with probability proportional to its worth.

    A kernel whose free places are worth nothing draws any of them. Every kernel counts alike.

    >>> worth, gradient = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]]), torch.tensor([[[1.0, 3.0], [1.0, 1.0]]])
    >>> gain(worth, gradient, torch.zeros(1, 2, 2, dtype=torch.bool))
    Gain(place=1.6666666666666667, slice=1.3333333333333333, position=1.25)
    """
    free_OCK = (~links_OCK).double()
    worth_OCK = worth_OCK.double() * free_OCK
    unknown_O11 = worth_OCK.sum(dim=(1, 2), keepdim=True) == 0
    chance_OCK = _shares(torch.where(unknown_O11, free_OCK, worth_OCK), (1, 2))
    in_slice_OCK = chance_OCK.sum(dim=2, keepdim=True) * _shares(free_OCK, (2,))
    size_OCK = gradient_OCK.double().abs()
    here, beside, anywhere = (
        float((chances * size_OCK).sum()) for chances in (chance_OCK, in_slice_OCK, _shares(free_OCK, (1, 2)))
    )
    return Gain(here / anywhere, beside / anywhere, here / beside)


def _shares(values_OCK: Tensor, axes: tuple[int, ...]) -> Tensor:
    sums = values_OCK.sum(dim=axes, keepdim=True)
    return values_OCK / sums.clamp_min(torch.finfo(values_OCK.dtype).tiny)


def largest(gradient_OCK: Tensor, links_OCK: Tensor, zeta: float) -> Tensor:
    """True where RigL would put the links that an evolution exchanges at zeta, one at least; kernels have equally many.

    >>> largest(torch.tensor([[[9.0, -3.0, 1.0]]]), torch.tensor([[[True, False, False]]]), 0.3)
    tensor([[[False,  True, False]]])
    """
    kept_ON = links_OCK.flatten(1)
    count = Count(max(1, round(zeta * int(kept_ON[0].sum()))), torch.zeros(len(kept_ON), 1, dtype=torch.bool))
    ties = torch.Generator().manual_seed(0)
    chosen_ON = choose(REGROWTHS["gradient"], gradient_OCK.flatten(1), kept_ON, kept_ON & False, count, ties)
    return chosen_ON.view(links_OCK.shape)


def gradients(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Gradients at all places of the layers with masks: of a first batch, of as many as choose, of those that judge.

    The network is a plain one with the run's weights, so that no gradient is masked, in training mode, and stays as it
    is. Dropout is seeded by the run.
    """
    config, data = run.config, run.dataset
    network = config.network
    plain = build_model(
        network.model, len(data.classes), seed=0, width=network.width, head=network.head, dropout=network.dropout,
        in_channels=data.train.images.shape[1],
    ).to(run.device)  # fmt: skip
    plain.load_state_dict(run.weights())
    weights = {name: plain.get_parameter(name) for name in run.masks()}
    torch.manual_seed(config.machine.seed)
    draws = run.batches.draws(run.epoch)

    def sum_of(batches: int) -> dict[str, Tensor]:
        plain.zero_grad()
        for draw in islice(draws, batches):
            images, labels = run.batches.make(draw)
            functional.cross_entropy(plain(images), labels).backward()
        return {name: weight.grad.clone() for name, weight in weights.items()}

    batches = min(BATCHES, len(run.batches) // 2)
    first, rest, judging = sum_of(1), sum_of(batches - 1), sum_of(batches)
    return first, {name: first[name] + rest[name] for name in first}, judging


def gains(run: Run) -> dict[str, dict[str, Any]]:
    """The gain of every rule in every layer."""
    image = run.dataset.train.images[:1]
    layers = masked_layers(run.model, run.masks(), torch.zeros(image.shape))
    first, choosing, judging = gradients(run)
    zeta = run.config.topology.zeta
    chosen = {"gradient of one batch": first, "gradient of all batches": choosing}
    found = {}
    for name, layer in layers.items():
        links_OCK, judging_OCK = layer.mask.flatten(2), judging[name].flatten(2)
        worths = {rule: _scores(layer, options) for rule, options in SCORES.items()}
        worths |= {rule: largest(by[name].flatten(2), links_OCK, zeta) for rule, by in chosen.items()}
        found[name] = {
            "input_size": layer.input_size[0],
            "links": int(links_OCK.sum()),
            "gains": {rule: gain(worth, judging_OCK, links_OCK)._asdict() for rule, worth in worths.items()},
        }
    return found


def _scores(layer: MaskedLayer, options: dict[str, str]) -> Tensor:
    return link_scores(layer.mask, layer.input_size, **layer.arguments, **options).flatten(2)


class HalfDone(Exception):  # noqa: N818 - what was wanted
    """The run is where it is looked at."""


class StopAt(Progress):
    """Ends training once an epoch is kept."""

    def __init__(self, last: int) -> None:
        self._last = last

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        print(f"epoch {row['epoch']} of {self._last}", flush=True)
        if row["epoch"] >= self._last:
            raise HalfDone


def half_trained(config: Config, out: Path) -> Run:
    """The run after half of its epochs, trained as far as it was not yet."""
    folder, half = RunFolder(out), config.optimisation.epochs // 2
    if folder.epochs() < half:
        with suppress(HalfDone):
            train(config, out, resume=folder.holds_run(), progress=StopAt(half))
    run = prepare(config)
    run.load_state_dict(folder.load_checkpoint(run.device))
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="uoft-cs/cifar10", help="as in chtconv train (uoft-cs/cifar10)")
    parser.add_argument("--methods", nargs="+", default=["set", "chts"], help="which trained the masks (set chts)")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.7, 0.9, 0.95], help="(0.7 0.9 0.95)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="(1 2 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's own number)")
    parser.add_argument("--out", type=Path, default=Path("runs/gradient"), help="folder of the runs (runs/gradient)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the lines")
    options = parser.parse_args()
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    done = [(line["config"]["dataset"], line["configuration"]) for line in map(json.loads, lines)]
    for seed, sparsity, method in product(options.seeds, options.sparsities, options.methods):
        known = {"method": method, "sparsity": sparsity, "seed": seed}
        if (Path(options.dataset).name, known) in done:
            continue
        print(known, flush=True)
        config = recipe("cifar-short").replace(
            dataset=options.dataset, precision="float32", windows="all", device="cpu", threads=options.threads, **known
        )
        run = half_trained(config, options.out / f"{method}-{sparsity:g}-seed{seed}")
        # The data set has the same name wherever the images lie.
        name = {"dataset": Path(run.config.data.dataset).name}
        parts = {"epoch": run.epoch, "layers": gains(run), "config": run.config.to_dict() | name}
        append(options.results, "gradient", run.device, {"configuration": known} | parts)


if __name__ == "__main__":
    main()
