"""How much of a kernel link prediction reaches: masks as random as training starts with, and those that it ended with.

python experiments/reach.py                 random masks of VGG16, at two widths and six sparsities
python experiments/reach.py FOLDER...       these and the masks of complete runs, of which the folder is one or has some

Each adds a line to results/reach.jsonl, unless it has one: `reach` and `unscored` of each layer, see
chtconv.explain.score_statistics. Masks are scored as they are. An evolution removes links before it scores, so what it
reaches is less.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from layout import ROOT, append

from chtconv import sparsify
from chtconv.comparison.cell import variant_name
from chtconv.explain.layers import MaskedLayer, masked_layers, statistics
from chtconv.explain.sources import layers_of_run
from chtconv.models import build_model
from chtconv.training import Config, RunFolder, recipe
from chtconv.training.config import DENSE

RESULTS = ROOT / "results" / "reach.jsonl"
PREDICTOR = {"predictor": "ch3_l3n", "graph": "kernel", "windows": "all"}
WIDTHS = (0.25, 1.0)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


def random_masks(width: float, sparsity: float, seed: int) -> dict[str, MaskedLayer]:
    """The layers of VGG16 on 32x32 images, as sparse training begins."""
    model = build_model("vgg16", 10, seed=seed, width=width, in_channels=3)
    topology = sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), sparsity=sparsity, seed=seed)
    return masked_layers(model, topology.masks, torch.zeros(1, 3, 32, 32))


def measured(layers: Mapping[str, MaskedLayer]) -> dict[str, dict[str, Any]]:
    """What link prediction reaches in each layer."""
    return {
        name: {
            "input_size": layers[name].input_size[0],
            "links": found.links,
            "candidates": found.candidates,
            "zero_scores": found.zero_scores,
            "reach": found.reach,
            "unscored": found.ties.unscored,
        }
        for name, found in statistics(layers, **PREDICTOR).items()
    }


def layers_of(run: Path) -> dict[str, MaskedLayer]:
    """The sparse layers of a complete run with its masks."""
    return layers_of_run(run, [])[1]


def variant(config: Config) -> str:
    """The name of the run's variant, as a comparison calls it that does not name it otherwise."""
    return variant_name(config, recipe("cifar-short"))


def complete_runs(folder: Path) -> list[Path]:
    """The folder itself if it is that of a complete sparse run, and those in it."""
    folders = (folder, *sorted(each.parent for each in folder.glob("*/summary.json")))
    complete = [each for each in folders if RunFolder(each).is_complete()]
    return [each for each in complete if RunFolder(each).stored_config().topology.method != DENSE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="of a complete run, or of several")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the random masks (0 1)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the lines")
    options = parser.parse_args()
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    done = [(line["masks"], line["configuration"]) for line in map(json.loads, lines)]

    def add(masks: str, known: dict[str, Any], layers: Callable[[], Mapping[str, MaskedLayer]]) -> None:
        """Adds a line, unless there is one of these masks."""
        configuration = known | PREDICTOR
        if (masks, configuration) not in done:
            parts = {"masks": masks, "configuration": configuration, "layers": measured(layers())}
            append(options.results, "reach", torch.device("cpu"), parts)
            done.append((masks, configuration))

    for seed, width, sparsity in product(options.seeds, WIDTHS, SPARSITIES):
        known = {"model": "vgg16", "width": width, "sparsity": sparsity, "seed": seed, "epochs": 0}
        add("random", known, partial(random_masks, width, sparsity, seed))
    for run in [run for folder in options.folders for run in complete_runs(folder)]:
        config = RunFolder(run).stored_config()
        known = {"model": config.network.model, "width": config.network.width, "sparsity": config.topology.sparsity}
        known |= {"seed": config.machine.seed, "epochs": config.optimisation.epochs}
        add(variant(config), known, partial(layers_of, run))


if __name__ == "__main__":
    main()
