"""What sparse training adds to a dense training step: full VGG16, 32x32 images, batch 128, channels_last.

Everything is measured side by side: each round times a dense step, a masked step and an evolution of each method,
one after the other, and the ratios are those of a round. Prints a table and adds a JSON line to
results/benchmarks.jsonl.

    python benchmarks/evolution.py [--rounds 15] [--sparsity 0.7] [--threads 2]
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import ROOT, append, seconds
from torch import nn

import chtconv
from chtconv.models import build_model

BATCH = 128
EVOLUTIONS = {
    "evolution, SET": {"method": "set"},
    "evolution, CHT, CH3-L3n": {"method": "cht"},
    "evolution, CHTs, CH3-L3n": {"method": "chts"},
    "evolution, CHTs, CH2-L3n": {"method": "chts", "predictor": "ch2_l3n"},
}
NEVER = 10**9


class Trainee:
    """A VGG16 with its optimizer, dense or sparse, and the one step that both take."""

    def __init__(self, **options: Any) -> None:
        self.model = build_model("vgg16", 10, seed=0).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.topology = chtconv.sparsify(self.model, self.optimizer, interval=NEVER, **options) if options else None

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()


def measure(rounds: int, sparsity: float) -> dict[str, list[float]]:
    """Seconds of each action, one entry a round; a round to warm up is left out."""
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))
    dense, masked = Trainee(), Trainee(method="static", sparsity=sparsity)
    evolving = {name: Trainee(sparsity=sparsity, **options) for name, options in EVOLUTIONS.items()}
    for trainee in evolving.values():
        trainee.model(images[:2])
    steps = {"dense step": dense, "masked step": masked}
    times: dict[str, list[float]] = {name: [] for name in (*steps, *evolving)}
    for _ in range(rounds + 1):
        # The two differ by less than the machine's speed drifts: each in every place of A B B A A B B A.
        turns: dict[str, list[float]] = {name: [] for name in steps}
        for name in [*steps, *reversed(steps)] * 2:
            turns[name].append(seconds(lambda trainee=steps[name]: trainee.step(images, labels)))
        for name in steps:
            times[name].append(sum(turns[name]) / 4)
        for name, trainee in evolving.items():
            assert trainee.topology is not None
            # As in training, where an evolution finds the caches full of something else.
            dense.step(images, labels)
            times[name].append(seconds(trainee.topology.evolve))
    return {name: values[1:] for name, values in times.items()}


def import_seconds(repeats: int = 7) -> dict[str, float]:
    """Seconds, as medians of fresh processes: what `import chtconv` takes after torch, and `chtconv --help`."""
    code = "import time, torch; t = time.perf_counter(); import chtconv; print(time.perf_counter() - t)"
    imports = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(repeats)]
    command = [sys.executable, "-m", "chtconv", "--help"]
    helps = [seconds(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True)) for _ in range(repeats)]
    return {"import after torch": statistics.median(imports), "--help": statistics.median(helps)}


def gemm_rate(size: int = 1024, repeats: int = 10) -> float:
    """Multiply-adds a second, times two, that torch reaches in a square float32 product on this machine."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(repeats + 1))


def table_product_flops() -> float:
    """Floating point operations of the one large product of an evolution: histograms times pattern table."""
    weights = [p for p in build_model("vgg16", 10, seed=0).features.parameters() if p.ndim == 4]
    return sum(2.0 * len(weight) * (512 + 81) * 9 * 256 for weight in weights)


def report(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians in seconds and the ratio of each round to its dense step: median, and the quarter of it on each side."""
    rows = {}
    for name, values in times.items():
        ratios = [value / dense for value, dense in zip(values, times["dense step"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows[name] = {"seconds": statistics.median(values), "ratio": median, "ratio_low": low, "ratio_high": high}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "benchmarks.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = report(measure(options.rounds, options.sparsity))
    imports = import_seconds()
    ideal = table_product_flops() / gemm_rate()
    print(f"{'':28}{'seconds':>10}{'of a dense step':>18}{'quartiles':>18}")
    for name, row in rows.items():
        quartiles = f"{row['ratio_low']:.3f} - {row['ratio_high']:.3f}"
        print(f"{name:28}{row['seconds']:10.3f}{row['ratio']:18.3f}{quartiles:>18}")
    print(f"\nthe table product alone, at the rate of a 1024^3 product: {ideal:.3f} s")
    for name, value in imports.items():
        print(f"{name}: {value:.2f} s")
    configuration = {
        "rounds": options.rounds, "threads": options.threads, "sparsity": options.sparsity, "batch": BATCH,
        "precision": "float32",
    }  # fmt: skip
    append(options.results, "evolution", configuration, rows=rows, imports=imports, table_product_seconds=ideal)


if __name__ == "__main__":
    main()
