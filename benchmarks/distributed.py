"""What sharing an evolution among ranks saves, and what it costs to have ranks at all: VGG16, 32x32 images, gloo.

Every process has one thread. In each round the three ways take turns, in the order A B C C B A, starting together:
every rank for itself without a word to the others (no check that they agree), every rank for itself with the check,
and shared out with the check. The ratios are those of a round. Prints a table and adds a JSON line to
results/benchmarks.jsonl.

    python benchmarks/distributed.py [--rounds 7] [--ranks 2] [--sparsity 0.7]
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import ROOT, append, seconds
from torch import distributed, multiprocessing

import chtconv
from chtconv.models import build_model

WAYS = ("by itself", "checked", "shared")
METHODS = ("chts", "cht", "set", "rigl")
WIDTHS = (1.0, 0.25)


def topology_of(method: str, width: float, sparsity: float, way: str) -> chtconv.Topology:
    model = build_model("vgg16", 10, seed=0, width=width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    topology = chtconv.sparsify(
        model, optimizer, method=method, sparsity=sparsity, interval=10**9, distributed=way != "by itself"
    )
    topology._ranks.sharing = way == "shared"
    topology.capture_gradients()
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    return topology


def measure(rounds: int, sparsity: float) -> dict[str, dict[str, list[float]]]:
    """Seconds of an evolution by method and width, and way; two entries a round, after one to warm up."""
    found: dict[str, dict[str, list[float]]] = {}
    for width in WIDTHS:
        for method in METHODS:
            topologies = {way: topology_of(method, width, sparsity, way) for way in WAYS}
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(rounds + 1):
                for way in (*WAYS, *reversed(WAYS)):
                    distributed.barrier()
                    times[way].append(seconds(topologies[way].evolve))
            masks = [list(topology.masks.values()) for topology in topologies.values()]
            if method != "rigl":  # whose gradients differ between the first way and the others
                assert all(torch.equal(a, b) for other in masks[1:] for a, b in zip(masks[0], other, strict=True))
            found[f"{method}, width {width}"] = {way: values[2:] for way, values in times.items()}
    return found


def work(rank: int, ranks: int, port: int, options: argparse.Namespace, path: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    found = measure(options.rounds, options.sparsity)
    if rank == 0:
        torch.save(found, path)
    distributed.destroy_process_group()


def report(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians in seconds, and of the ratios of each round to the way that is checked and not shared."""

    def rounds(way: str) -> list[float]:
        values = times[way]
        return [(a + b) / 2 for a, b in zip(values[::2], values[1::2], strict=True)]

    row: dict[str, Any] = {way: statistics.median(times[way]) for way in WAYS}
    for name, way in (("check", "by itself"), ("sharing", "shared")):
        ratios = [each / base for each, base in zip(rounds(way), rounds("checked"), strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        row[name] = {"ratio": median, "ratio_low": low, "ratio_high": high}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--port", type=int, default=29517)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "benchmarks.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/times.pt"
        multiprocessing.spawn(work, (options.ranks, options.port, options, path), nprocs=options.ranks)
        rows = {name: report(times) for name, times in torch.load(path).items()}
    print(f"{'':22}" + "".join(f"{way:>12}" for way in WAYS) + f"{'shared/checked':>18}{'quartiles':>18}")
    for name, row in rows.items():
        ratio = row["sharing"]
        quartiles = f"{ratio['ratio_low']:.2f} - {ratio['ratio_high']:.2f}"
        print(f"{name:22}" + "".join(f"{row[way]:12.3f}" for way in WAYS) + f"{ratio['ratio']:18.2f}{quartiles:>18}")
    configuration = {
        "rounds": options.rounds, "ranks": options.ranks, "threads": 1, "sparsity": options.sparsity,
        "precision": "float32",
    }  # fmt: skip
    append(options.results, "distributed", configuration, rows=rows)


if __name__ == "__main__":
    main()
