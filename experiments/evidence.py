"""CIFAR-10 on a CPU: every method at 70 and 95 % sparsity, one JSON line a run in results/cifar10.jsonl.

VGG16 at a quarter of its width, 12 epochs, the recipe `cifar-short`. Runs that are in the results already are not
run again; a run that was stopped goes on from its last epoch. Hours on two cores: start it and come back.

    python experiments/evidence.py --dataset uoft-cs/cifar10        (or a folder of parquet files)
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from chtconv.training import Config, recipe, train
from chtconv.training.progress import Lines

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("chts", "set", "cht", "static", "dense")
SPARSITIES = (0.95, 0.7)


def cells(seeds: list[int], methods: list[str], sparsities: list[float]) -> list[dict[str, Any]]:
    """The runs, the most telling first."""
    sparse = [(method, sparsity) for sparsity in sparsities for method in methods if method != "dense"]
    dense = [("dense", 0.0)] if "dense" in methods else []
    return [{"method": m, "sparsity": s, "seed": seed} for seed in seeds for m, s in sparse + dense]


def is_done(config: Config, lines: list[dict[str, Any]]) -> bool:
    """Whether a line has this configuration, whatever the data set was called on that machine."""
    wanted = config.to_dict() | {"dataset": None}
    return any(line["config"] | {"dataset": None} == wanted for line in lines)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def result(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One line: the summary without its table of layers, and what the evolutions did on average."""
    records = read(folder / "evolution.jsonl")
    removed, new = (sum(record[key] for record in records) for key in ("removed", "new"))
    last = [record for record in records if record["evolution"] == records[-1]["evolution"]]
    evolved = {
        "turnover": new / removed if removed else None,
        "empty_slices": _mean(last, "empty_slices"),
        "zero_scores": _mean(last, "zero_scores"),
    }
    dataset = summary["dataset"] | {"name": Path(summary["dataset"]["name"]).name}
    config = summary["config"] | {"dataset": dataset["name"]}
    kept = {key: value for key, value in summary.items() if key != "layers"}
    return kept | {"dataset": dataset, "config": config, "evolution": evolved}


def _mean(records: list[dict[str, Any]], key: str) -> float | None:
    known = [record[key] for record in records if record[key] is not None]
    return sum(known) / len(known) if known else None


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="uoft-cs/cifar10")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "cifar10.jsonl")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "evidence", help="folder of the run folders")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[14])
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number")
    options = parser.parse_args()
    for cell in cells(options.seeds, options.methods, options.sparsities):
        config = recipe("cifar-short").replace(dataset=options.dataset, threads=options.threads, **cell)
        if is_done(config, read(options.results)):
            print("done already:", cell)
            continue
        folder = options.runs / f"{cell['method']}-{cell['sparsity']:g}-seed{cell['seed']}"
        print("running:", cell, flush=True)
        summary = train(config, folder, resume=(folder / "config.json").exists(), progress=Lines(sys.stdout))
        options.results.parent.mkdir(parents=True, exist_ok=True)
        with options.results.open("a") as file:
            file.write(json.dumps(result(summary, folder)) + "\n")


if __name__ == "__main__":
    main()
