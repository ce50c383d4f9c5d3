"""Sparse convolutions on the CPU beside dense ones: training steps, inference, layers, memory, and what else there is.

Every way of computing runs in a process of its own (ways.py); they are timed in turns (A B C ... C B A) and reported as
the ratio of a round, median and quartiles. The dense model is an ordinary one in channels_last. glibc gives large
tensors back to the system, which costs a dense step page faults that the memory of the sparse kernels saves, so that
the same dense model also runs with glibc told to keep memory ("of dense that keeps memory").

Parts: training (steps of VGG16-BN, batch 128, with the usual perceptron and with a small one), inference (VGG16-BN,
batch 64 and 1), layers (every convolution of VGG16 by itself, and the limits of the processor: needs a C compiler),
resnet (steps of ResNet-18, batch 64), memory (of a training step; Linux only), baselines (torch.compile, bf16 autocast,
and SparseProp where it is installed), masks (trained links beside random ones; only with --masks).

Prints tables, adds a JSON line a part to results/benchmarks.jsonl, and draws a plot of the latest lines where
matplotlib is installed.

    python benchmarks/sparse_compute.py [--parts NAME ...] [--models NAME ...] [--rounds 5] [--threads 2]
        [--masks RUN/masks.safetensors]
"""

import argparse
import importlib.util
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import ROOT, append
from processes import in_turns, over, running, summed
from roofline import limits
from sparse_plot import draw

SPARSITIES = (0.7, 0.9, 0.95)
# Times of a training step, and of inference with a batch of 64 and of 1, as parts of the dense time: first, and then.
TRAINING_GOALS = {0.5: (1.0, 0.85), 0.7: (0.65, 0.50), 0.9: (0.36, 0.26), 0.95: (0.25, 0.20)}
INFERENCE_GOALS = {64: {0.7: (0.60, 0.46), 0.9: (0.30, 0.22), 0.95: (0.20, 0.16)}, 1: {0.9: (0.5, 0.25)}}
MODELS = ("vgg16", "vgg16, head 512")
KEEPING = "dense that keeps memory"
Row = dict[str, Any]
Options = argparse.Namespace


def compared(
    specs: dict[str, Row], options: Options, action: str, bases: dict[str, str]
) -> Iterator[tuple[str, Row, dict[str, list[float]]]]:
    """The rows of a table: each way, its time, and that as a part of the times of others.

    Args:
        specs: of processes, by name.
        options: of the command line.
        action: that is timed.
        bases: what others are compared with: the name of a column, and of a process.

    Returns:
        Names, rows, and the seconds by process and round, from which more can be made.
    """
    with running(specs) as processes:
        times = {name: each[action] for name, each in in_turns(processes, options.rounds).items()}
        for name, process in processes.items():
            row: Row = {"name": name, "seconds": statistics.median(times[name])}
            row |= {key: process.about[key] for key in ("sparse_layers", "empty_slices") if key in process.about}
            row |= {column: over(times[name], times[base]) for column, base in bases.items() if name != base}
            yield name, row, times


def steps(model: str, options: Options, ways: dict[str, Row], **common: Any) -> Iterator[Row]:
    """Training steps beside the dense one, and beside the one that keeps memory."""
    shared = common | {"kind": "training", "model": model, "threads": options.threads, "width": options.width}
    specs = {"dense": {"way": "dense"}, KEEPING: {"way": "dense", "keeping": True}} | ways
    bases = {"of_dense": "dense", "of_keeping": KEEPING}
    for _, row, _ in compared({name: shared | spec for name, spec in specs.items()}, options, "step", bases):
        yield row


def ways_at(sparsities: tuple[float, ...], backend: str = "auto") -> dict[str, Row]:
    return {f"{each:.0%}, {backend}": {"way": backend, "sparsity": each} for each in sparsities}


def training(options: Options) -> Iterator[Row]:
    ways = ways_at((0.5,), "sparse") | ways_at(tuple(TRAINING_GOALS))
    for model in options.models:
        for row in steps(model, options, ways):
            spec = ways.get(row["name"], {})
            if spec.get("way") == "auto":
                row["sparsity"] = spec["sparsity"]
                row["goal"], row["then"] = TRAINING_GOALS[spec["sparsity"]]
            yield row | {"name": f"{model}: {row['name']}", "model": model}


def resnet(options: Options) -> Iterator[Row]:
    ways = ways_at(SPARSITIES)
    for row in steps("resnet18", options, ways):
        yield row | {"model": "resnet18", "sparsity": ways.get(row["name"], {}).get("sparsity")}


def inference(options: Options) -> Iterator[Row]:
    for model, (batch, goals) in itertools.product(options.models, INFERENCE_GOALS.items()):
        shared = {
            "kind": "inference",
            "model": model,
            "batch": batch,
            "threads": options.threads,
            "width": options.width,
        }
        formats = ("",) if batch > 1 else ("", ", contiguous")
        names = [f"{kind}{form}" for kind in ("dense", "folded") for form in formats]
        specs: dict[str, Row] = {name: {"way": name} for name in names}
        ways = [(way, each) for each in goals for way in ("compile_sparse", "accelerate")]
        specs |= {f"{each:.0%}, {way}": {"way": way, "sparsity": each} for way, each in ways}
        found = list(compared({name: shared | spec for name, spec in specs.items()}, options, "batch", {}))
        for name, row, times in found:
            if name not in names:
                for kind in ("dense", "folded"):
                    formed = [each for each in names if each.startswith(kind)]
                    base = min(formed, key=lambda each: statistics.median(times[each]))
                    row[f"of_{kind}"] = over(times[name], times[base])
                if specs[name]["way"] == "compile_sparse":
                    row["sparsity"] = specs[name]["sparsity"]
                    row["goal"], row["then"] = goals[specs[name]["sparsity"]]
            yield row | {"name": f"{model}, batch {batch}: {name}", "model": f"{model}, inference, batch {batch}"}


def layers(options: Options) -> Iterator[Row]:
    """Each pass of each layer; glibc keeps memory here, so that kernels are compared and not page faults."""
    most = limits(options.threads)
    shared = {"kind": "layers", "threads": options.threads, "width": options.width, "keeping": True}
    with running({str(each): shared | {"sparsity": each} for each in (0.0, *SPARSITIES)}) as processes:
        times = in_turns(processes, options.rounds)
        for name, process in processes.items():
            known = process.about["layers"]
            for layer, one in known.items():
                for each in one["passes"]:
                    action = f"{layer}/{each}"
                    spent = statistics.median(times[name][action])
                    rates = {"multiply_adds": one["multiply_adds"] / spent, "bytes": one["bytes"] / spent}
                    yield {"layer": layer, "count": one["count"], "pass": each, "sparsity": float(name)} | {
                        "seconds": spent,
                        "ratio": over(times[name][action], times["0.0"][action]),
                        "per_cycle": rates["multiply_adds"] / most["hertz"] / options.threads,
                        "of_peak": rates["multiply_adds"] / most["peak"],
                        "of_memory": rates["bytes"] / most["bytes of memory"],
                        "intensity": one["multiply_adds"] / one["bytes"],
                    }
            for each in ("forward", "input gradient", "weight gradient"):
                counts = {f"{layer}/{each}": one["count"] for layer, one in known.items() if each in one["passes"]}
                all_of, dense = (summed(times[way], counts) for way in (name, "0.0"))
                yield {"layer": "all", "pass": each, "sparsity": float(name)} | {
                    "seconds": statistics.median(all_of),
                    "ratio": over(all_of, dense),
                }
    yield {"limits": most}


def memory(options: Options) -> Iterator[Row]:
    shared = {"kind": "training", "model": "vgg16", "threads": options.threads, "width": options.width}
    specs: dict[str, Row] = {"dense": {"way": "dense"}, KEEPING: {"way": "dense", "keeping": True}}
    specs |= ways_at(SPARSITIES, "sparse") | ways_at((0.9,))
    dense = 0
    for name, spec in specs.items():
        with running({name: shared | spec}) as processes:
            peak, about = processes[name].peak(), processes[name].about
        dense = dense or peak
        row: Row = {"name": name, "megabytes": peak / 1e6, "of_dense": peak / dense if dense else None}
        yield row | {key: about[key] for key in ("sparse_layers",) if key in about}


def baselines(options: Options) -> Iterator[Row]:
    ways = {
        "dense, torch.compile": {"way": "dense", "compiled": True},
        "dense, torch.compile, keeps memory": {"way": "dense", "compiled": True, "keeping": True},
        "dense, bf16 autocast": {"way": "dense", "bf16": True},
        "90%, auto, torch.compile": {"way": "auto", "sparsity": 0.9, "compiled": True},
        "90%, auto, bf16 autocast": {"way": "auto", "sparsity": 0.9, "bf16": True},
    } | ways_at((0.9, 0.95))
    if importlib.util.find_spec("sparseprop") is None:
        print("no rows of SparseProp: it is not installed (pip install --no-deps sparseprop)\n")
    else:
        ways |= {f"{each:.0%}, SparseProp": {"way": "sparseprop", "sparsity": each} for each in (0.9, 0.95)}
    yield from steps("vgg16", options, ways)


def masks(options: Options) -> Iterator[Row]:
    """Trained links beside as many random ones: the convolutions by themselves, and whole steps."""
    for path in options.masks:
        file = str(path.resolve())
        ways: dict[str, Row] = {"trained": {"masks": file}, "random": {"masks": file, "at_random": True}}
        shared = {"threads": options.threads, "width": options.width}
        one_by_one = shared | {"kind": "layers", "distinct": False, "keeping": True}
        with running({"dense": one_by_one} | {name: one_by_one | way for name, way in ways.items()}) as processes:
            times = in_turns(processes, options.rounds)
            alone = {name: summed(each, dict.fromkeys(each, 1)) for name, each in times.items()}
        for row in steps("vgg16", options, {name: {"way": "auto"} | way for name, way in ways.items()}):
            name = row["name"]
            if name in alone:
                row["convolutions_seconds"] = statistics.median(alone[name])
                row["convolutions"] = over(alone[name], alone["dense"])
            if name in ways:
                row["of_random"] = over(alone[name], alone["random"])
            yield row | {"name": f"{path.parent.name}: {name}"}


PARTS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "training": training,
    "inference": inference,
    "layers": layers,
    "resnet": resnet,
    "memory": memory,
    "baselines": baselines,
    "masks": masks,
}


def shown(row: Row) -> str:
    """A line of a table: the name, and what was measured."""
    names = ("name", "layer", "pass")
    first = ", ".join(str(row[name]) for name in names if name in row)
    return f"{first:50}" + "  ".join(f"{k}: {_cell(v)}" for k, v in row.items() if k not in names and v is not None)


def _cell(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="of training and inference")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=float, default=1.0, help="of all models; for trying it out")
    parser.add_argument("--masks", type=Path, nargs="+", default=[], help="of run folders with a VGG16 of that width")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "benchmarks.jsonl")
    parser.add_argument("--plot", type=Path, default=ROOT / "results" / "sparse_compute.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.masks:
        options.parts = [part for part in options.parts if part != "masks"]
    for part in options.parts:
        print(f"== {part} ==", flush=True)
        rows = []
        for row in PARTS[part](options):
            rows.append(row)
            print(shown(row), flush=True)
        configuration = {"rounds": options.rounds, "threads": options.threads, "width": options.width, "part": part,
                         "precision": "float32"}  # fmt: skip
        append(options.results, "sparse_compute", configuration, rows=rows)
    draw(options.results, options.plot)


if __name__ == "__main__":
    main()
