"""What masks add to a dense training step, and an evolution every 100 steps to dense training, beside rigl-torch.

Every kind of step is timed in turns (A B C C B A) and reported as the ratio of a round. 100 steps of a full network
take minutes, so their overhead is composed of what a dense step, a masked step, a step with the gradients of disabled
links and an evolution take; at a quarter of the width 100 real steps check the composition. RigL saves nothing on a
CPU by asking for dense gradients on one step in 100: the gradient of a weight is always computed densely here, and
that step only keeps a copy.

rigl-torch is `RigLScheduler` as its README uses it, where `pip install --no-deps rigl-torch` was run; else its rows are
left out. Its evolution refuses channels_last, so it runs in the contiguous format, beside a dense step in that.
Prints tables and adds a JSON line to results/benchmarks.jsonl.

    python benchmarks/training_step.py [--rounds 7] [--threads 2] [--models vgg16 resnet18] [--optimizers sgd adamw]
"""

import argparse
import gc
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, append, seconds
from torch import Tensor, nn
from trainees import BATCHES, MODELS, OPTIMIZERS, Contiguous, Dense, RigLTorch, Sparse, random_batch, rigl_scheduler

INTERVAL = 100
METHODS = ("set", "rigl", "chts")


def measure(
    model: str, optimizer: str, width: float, sparsity: float, rounds: int, methods: Iterable[str]
) -> dict[str, list[float]]:
    """Seconds of each kind of step, one entry a round; a round to warm up is left out.

    For each method, and for rigl-torch where there are methods, also those of a step before an evolution and of the
    evolution, as "NAME, last step" and "NAME, evolution".
    """
    which, batch = (model, optimizer, width), random_batch(model)
    steps: dict[str, Dense] = {"dense": Dense(*which), "masked": Sparse(*which, method="static", sparsity=sparsity)}
    evolving: dict[str, Any] = {name: Sparse(*which, method=name, sparsity=sparsity) for name in methods}
    if rigl_scheduler():
        steps |= {"dense, contiguous": Contiguous(*which), "rigl-torch": RigLTorch(*which, sparsity=sparsity)}
        if evolving:
            evolving["rigl-torch"] = steps["rigl-torch"]
    times: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        spent: dict[str, float] = {}
        kinds = [*((steps, name) for name in steps), *((evolving, name) for name in evolving)]
        for group, name in [*kinds, *reversed(kinds)]:
            if group is steps:
                parts = {name: seconds(lambda trainee=steps[name]: trainee.step(batch))}
            else:
                last, evolution = evolving[name].evolving_step(batch)
                parts = {f"{name}, last step": last, f"{name}, evolution": evolution}
            for part, value in parts.items():
                spent[part] = spent.get(part, 0.0) + value / 2
        if turn:
            for name, value in spent.items():
                times.setdefault(name, []).append(value)
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Median and the quarter of it on each side."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def over(times: dict[str, list[float]], name: str, base: str) -> dict[str, float]:
    return summary([a / b for a, b in zip(times[name], times[base], strict=True)])


def masked_steps(times: dict[str, list[float]]) -> dict[str, Any]:
    """A masked step as a part of the dense step of its round."""
    row = {"dense_seconds": statistics.median(times["dense"]), "chtconv": over(times, "masked", "dense")}
    if "rigl-torch" in times:
        row["rigl-torch"] = over(times, "rigl-torch", "dense, contiguous")
    return row


def evolutions(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """What each method adds to INTERVAL dense steps, composed in every round of what was timed separately.

    All methods of chtconv take the masked step on the other steps, with the same hooks (RigL has one more, which looks
    whether there is a gradient yet).
    """
    rows: dict[str, dict[str, Any]] = {"static": overheads(times, "masked", "dense")}
    for name in [key.removesuffix(", evolution") for key in times if key.endswith(", evolution")]:
        step, dense = ("rigl-torch", "dense, contiguous") if name == "rigl-torch" else ("masked", "dense")
        rows[name] = {
            "evolution_seconds": statistics.median(times[f"{name}, evolution"]),
            "evolution": over(times, f"{name}, evolution", dense),
            "last_step": over(times, f"{name}, last step", step),
        } | overheads(times, step, dense, name)
    return rows


def overheads(times: dict[str, list[float]], step: str, dense: str, name: str = "") -> dict[str, dict[str, float]]:
    """Added to INTERVAL dense steps, as a part of their time: in all, and by the evolution and the step before it."""
    last = times[f"{name}, last step" if name else step]
    evolution = times[f"{name}, evolution"] if name else [0.0] * len(last)
    rounds = list(zip(times[step], last, evolution, times[dense], strict=True))
    by_evolution = [(l + e - s) / (INTERVAL * d) for s, l, e, d in rounds]
    added = [s / d - 1 + more for (s, _, _, d), more in zip(rounds, by_evolution, strict=True)]
    return {"overhead": summary(added), "by_evolution": summary(by_evolution)}


def real_overheads(model: str, optimizer: str, width: float, sparsity: float) -> dict[str, float]:
    """What each method adds to INTERVAL dense steps, all of them made, step by step in turns."""
    which, batch = (model, optimizer, width), random_batch(model)
    options: dict[str, Any] = {"sparsity": sparsity, "interval": INTERVAL}
    trainees: dict[str, Dense] = {"dense": Dense(*which)}
    trainees |= {name: Sparse(*which, method=name, **options) for name in ("static", *METHODS)}
    if rigl_scheduler():
        trainees |= {"dense, contiguous": Contiguous(*which), "rigl-torch": RigLTorch(*which, **options)}
    for name in ("dense", "dense, contiguous"):
        if name in trainees:
            trainees[name].step(batch)
    spent = dict.fromkeys(trainees, 0.0)
    for turn in range(INTERVAL):
        for name in reversed(trainees) if turn % 2 else trainees:
            spent[name] += seconds(lambda trainee=trainees[name]: trainee.step(batch))
    dense = {name: "dense, contiguous" if name == "rigl-torch" else "dense" for name in trainees}
    return {name: spent[name] / spent[dense[name]] - 1 for name in trainees if not name.startswith("dense")}


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the memory behind tensors, each piece of it once, by its address."""
    pieces = [tensor.untyped_storage() for tensor in tensors]
    return {piece.data_ptr(): piece.nbytes() for piece in pieces}


def extra_bytes(make: Callable[[], Any], weights: int) -> dict[str, float]:
    """Bytes a sparse weight of all tensors that came with a trainee, but for parameters, gradients and state."""

    def alive() -> dict[int, int]:
        gc.collect()
        return storages(each for each in gc.get_objects() if issubclass(type(each), Tensor))

    def extra() -> float:
        state = (value for values in trainee.optimizer.state.values() for value in values.values())
        model = (*trainee.model.parameters(), *trainee.model.buffers())
        gradients = (parameter.grad for parameter in trainee.model.parameters())
        own = storages(each for each in (*model, *gradients, *state) if isinstance(each, Tensor))
        return sum(size for piece, size in alive().items() if piece not in own and piece not in before) / weights

    batch = random_batch("vgg16", size=2)
    before = alive()
    trainee = make()
    trainee.step(batch)
    between = extra()
    trainee.last_gradients(batch)
    return {"between_evolutions": between, "before_an_evolution": extra()}


def memory(model: str, optimizer: str, width: float, sparsity: float) -> dict[str, dict[str, float]]:
    """Bytes a weight of RigL, which keeps the most."""
    which = (model, optimizer, width)
    convolutions = (m for m in MODELS[model](width).modules() if isinstance(m, nn.Conv2d))
    weights = sum(convolution.weight.numel() for convolution in convolutions)
    made: dict[str, Callable[[], Any]] = {"chtconv": lambda: Sparse(*which, method="rigl", sparsity=sparsity)}
    if rigl_scheduler():
        made["rigl-torch"] = lambda: RigLTorch(*which, sparsity=sparsity)
    return {name: extra_bytes(make, weights) for name, make in made.items()}


def quartiles(values: dict[str, float], form: str = ".3f", unit: float = 1) -> str:
    low, median, high = (f"{unit * values[key]:{form}}" for key in ("low", "median", "high"))
    return f"{median} ({low} to {high})"


def show(rows: list[list[str]]) -> None:
    """Prints a table with its first column to the left; the first row is its header."""
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        print(f"{first:{widths[0]}}" + "".join(f"{cell:>{w}}" for cell, w in zip(rest, widths[1:], strict=True)))
    print(flush=True)


def steps_table(rows: dict[str, Any]) -> list[list[str]]:
    header = ["masked step / dense step", "dense, s", "chtconv, goal 1.03", "rigl-torch"]
    return [header] + [
        [name, f"{row['dense_seconds']:.3f}"]
        + [quartiles(row[key]) if key in row else "" for key in ("chtconv", "rigl-torch")]
        for name, row in rows.items()
    ]


def evolutions_table(rows: dict[str, Any], narrow: float) -> list[list[str]]:
    header = [f"% added to {INTERVAL} steps", "evolution / dense step", "step before it / masked step", "all"]
    header += ["by evolution", f"width {narrow:g}: all", "real"]
    return [header] + [
        [name]
        + [quartiles(row[key]) if key in row else "" for key in ("evolution", "last_step")]
        + [quartiles(row[key], ".2f", 100) for key in ("overhead", "by_evolution", "narrow_overhead")]
        + [f"{100 * row['narrow_real']:.2f}"]
        for name, row in rows.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=float, default=1.0, help="the check with real steps runs at a quarter of it")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="first: evolutions too")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS), help="as models")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "benchmarks.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if not rigl_scheduler():
        print("no rows of rigl-torch: it is not installed (pip install --no-deps rigl-torch)\n")

    first, narrow = (options.models[0], options.optimizers[0]), options.width / 4
    held = memory(*first, options.width, options.sparsity)
    for name, row in held.items():
        print(f"{name}: extra bytes a weight: {', '.join(f'{key} {value:.2f}' for key, value in row.items())}")
    steps, times = {}, {}
    for which in [(model, optimizer) for model in options.models for optimizer in options.optimizers]:
        methods = METHODS if which == first else ()
        times[which] = measure(*which, options.width, options.sparsity, options.rounds, methods)
        steps[", ".join(which)] = masked_steps(times[which])
    show(steps_table(steps))

    rows = evolutions(times[first])
    composed = evolutions(measure(*first, narrow, options.sparsity, options.rounds, METHODS))
    real = real_overheads(*first, narrow, options.sparsity)
    for name, row in rows.items():
        row |= {"narrow_overhead": composed[name]["overhead"], "narrow_real": real[name]}
    show(evolutions_table(rows, narrow))
    configuration = {
        "rounds": options.rounds, "threads": options.threads, "sparsity": options.sparsity, "width": options.width,
        "batches": {model: BATCHES[model] for model in options.models}, "interval": INTERVAL, "precision": "float32",
        "evolutions": {"model": first[0], "optimizer": first[1], "narrow_width": narrow},
    }  # fmt: skip
    append(options.results, "training_step", configuration, steps=steps, evolutions=rows, bytes_per_weight=held)


if __name__ == "__main__":
    main()
