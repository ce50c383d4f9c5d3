"""Images a second of whole training steps, data included, beside a plain PyTorch loop with a DataLoader.

VGG16 on 32x32, batch 128. The steps are those of ``chtconv train``, without evolution (benchmarks/evolution.py has
that): draw, gather, mirror and normalise the batch, forward, loss, backward, optimizer, sums of loss and accuracy. The
plain loop is what one would write: images in memory, mirrored and normalised by the workers of a DataLoader, torch's
defaults for everything, `item()` in every step. "That keeps memory" is the same with glibc told to keep memory, which
`chtconv train` does by itself. Every way runs in a process of its own; they are timed in turns (A B C ... C B A) and
reported as the ratio of a round, median and quartiles. "Of the matrix rate" is the rate of those FLOPs that the kernels
in use compute (chtconv.flops.counting), as a part of that of one large matrix product, measured in the same rounds.

Then, on a CPU, the optimizer's step alone: weight by weight (torch's own choice there), `foreach` and fused, with and
without glibc keeping memory. Then so many runs at once: as processes that share the cores (as `chtconv compare --jobs`
has it) or the GPU, and, on a GPU, as streams of one process.

Prints tables and adds a JSON line a width and precision to results/benchmarks.jsonl.

    python benchmarks/training.py [--device cpu] [--widths 1 0.25] [--precisions float32 bf16] [--rounds 5]
    python benchmarks/training.py --quick       # seconds, to see that it works
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import ROOT, append
from processes import in_turns, over, running

Row = dict[str, Any]
Options = argparse.Namespace
SPARSITIES = (0.7, 0.9, 0.95)
PLAIN, KEEPING, PRODUCT = "plain PyTorch loop", "plain PyTorch loop that keeps memory", "product"
# What is different on a device: precisions, runs at once, rows of a matrix, steps of an action at width 1, and the
# other way to compute a step, with what stands before its name.
PRECISIONS = {"cpu": ["float32", "bf16"], "cuda": ["float32", "tf32", "bf16"]}
AT_ONCE = {"cpu": [1, 2], "cuda": [1, 2, 4, 8]}
PRODUCTS = {"cpu": 2048, "cuda": 8192}
STEPS = {"cpu": 4, "cuda": 200}
OTHER: dict[str, tuple[str, Row]] = {
    "cpu": ("fused, ", {"optimizer_kernel": "fused"}),
    "cuda": ("captured, ", {"step": "captured"}),
}
QUICK = {"widths": [1 / 16], "precisions": ["float32"], "sparsities": [0.9], "at_once": [1, 2], "rounds": 1, "steps": 2,
         "images": 1000, "product": 256, "head": 64, "workers": 0}  # fmt: skip


def ways(options: Options, width: float, precision: str) -> dict[str, Row]:
    """The processes of a table, by name."""
    shared = trained(options, width, precision)
    plain = shared | {"kind": "plain", "workers": options.workers}
    if precision == "tf32":
        plain["precision"] = "float32"
    found: dict[str, Row] = {PLAIN: plain}
    if options.device == "cpu":
        found[KEEPING] = plain | {"keeping": True}
    own, prefix, other = shared | {"kind": "chtconv"}, *OTHER[options.device]
    found |= {"dense": own | {"method": "dense"}, f"{prefix}dense": own | {"method": "dense"} | other}
    for sparsity in options.sparsities:
        found[f"{sparsity:.0%}"] = own | {"method": "static", "sparsity": sparsity}
        if options.device == "cuda" or sparsity == 0.9:
            found[f"{prefix}{sparsity:.0%}"] = found[f"{sparsity:.0%}"] | other
    product = {"kind": PRODUCT, "size": options.product, "threads": options.threads}
    return found | {PRODUCT: product | {"device": options.device, "precision": precision}}


def trained(options: Options, width: float, precision: str) -> Row:
    """What all ways of training share."""
    return {
        "device": options.device,
        "precision": precision,
        "threads": options.threads,
        "steps": options.steps or round(STEPS[options.device] * max(1.0, 1 / width)),
        "count": options.images,
        "width": width,
        "head": options.head,
        "batch_size": options.batch,
        "optimizer": options.optimizer,
    }


def compared(options: Options, width: float, precision: str) -> Iterator[Row]:
    """The rows of a table."""
    with running(ways(options, width, precision)) as processes:
        times = in_turns(processes, options.rounds)
        peak = processes[PRODUCT].about["flops"] / statistics.median(times[PRODUCT]["product"])
        spent = {name: each["steps"] for name, each in times.items() if "steps" in each}
        yield from rows(spent, {name: each.about for name, each in processes.items()}, peak)
        yield {"name": "one matrix product", "flops_a_second": peak}


def rows(times: Mapping[str, list[float]], about: Mapping[str, Row], peak: float) -> Iterator[Row]:
    """A row a way of training.

    Args:
        times: seconds of an action, by way and round.
        about: how many images an action has, FLOPs an image, and more; by way.
        peak: FLOPs a second of the device.
    """
    for name, values in times.items():
        images = about[name]["images"]
        rate = images / statistics.median(values)
        row: Row = {"name": name, "images_per_second": rate, "of_matrix_rate": rate * about[name]["flops"] / peak}
        row |= {key: about[name][key] for key in ("sparse_layers",) if key in about[name]}
        for key, base in (("of_plain", PLAIN), ("of_keeping", KEEPING)):
            if base in times and name != base:
                # Of the rates: so many times as fast.
                row[key] = over([images / each for each in values], [about[base]["images"] / b for b in times[base]])
        yield row


def at_once(options: Options, width: float, precision: str) -> Iterator[Row]:
    """Images a second of several runs together, and as a multiple of those of one; dense runs and sparse ones."""
    own = trained(options, width, precision) | {"kind": "chtconv"}
    if options.device == "cuda":
        own["step"] = "captured"
    for name, more in (("dense", {"method": "dense"}), ("90%", {"method": "static", "sparsity": 0.9})):
        if not options.at_once:
            continue
        rates: dict[str, list[float]] = {}
        for count in options.at_once:
            threads = max(1, options.threads // count) if options.device == "cpu" else options.threads
            each = own | more | {"threads": threads}
            rates[f"{name}, {count} at once"] = list(rates_of([each] * count, options.rounds))
            if options.device == "cuda" and count > 1:
                streams = each | {"at_once": count}
                rates[f"{name}, {count} at once, in streams"] = list(rates_of([streams], options.rounds))
        first = next(iter(rates.values()))
        for way, values in rates.items():
            row: Row = {"name": way, "images_per_second": statistics.median(values)}
            yield row | ({"of_one": over(values, first)} if values is not first else {})


def updates(options: Options, width: float, precision: str) -> Iterator[Row]:
    """The optimizer's step alone; it does not depend on the precision, so that the first one has it."""
    if options.device != "cpu" or precision != options.precisions[0]:
        return
    shared = {"kind": "updates", "width": width, "head": options.head, "threads": options.threads}
    for optimizer in ("sgd", "adam"):
        spec = shared | {"optimizer": optimizer}
        with running({"": spec, ", keeping memory": spec | {"keeping": True}}) as processes:
            times = in_turns(processes, options.rounds)
        base = times[""]["plain"]
        for way, spent in times.items():
            for kernel, values in spent.items():
                row: Row = {"name": f"{optimizer}, {kernel}{way}", "seconds": statistics.median(values)}
                yield row | ({"of_plain": over(values, base)} if values is not base else {})


def rates_of(specs: list[Row], rounds: int) -> Iterator[float]:
    """Images a second of these processes together, a number a round; a round to warm up is left out."""
    with running({str(number): spec for number, spec in enumerate(specs)}) as found, ThreadPoolExecutor() as pool:
        processes = list(found.values())
        for turn in range(rounds + 1):
            spent = pool.map(lambda each: each.seconds("steps"), processes)
            rate = sum(each.about["images"] / one for each, one in zip(processes, spent, strict=True))
            if turn:
                yield rate


def shown(row: Row) -> str:
    """A line of a table."""
    cells = [f"{row['name']:42}"]
    for key, value in row.items():
        if isinstance(value, dict):
            cells.append(f"{key} {value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})")
        elif key != "name":
            cells.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "  ".join(cells)


PARTS: dict[str, Callable[[Options, float, str], Iterator[Row]]] = {
    "rows": compared,
    "updates": updates,
    "at_once": at_once,
}


def parsed() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(STEPS), default="cpu")
    parser.add_argument("--widths", type=float, nargs="+", default=[1.0, 0.25])
    parser.add_argument("--head", type=int, default=None, help="neurons of the hidden layers; 4096 times the width")
    parser.add_argument("--precisions", nargs="+", help="those of the device")
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--optimizer", choices=["sgd", "adam"], default="sgd")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--at-once", type=int, nargs="*", help="how many runs side by side; none for no such table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="in one turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader")
    parser.add_argument("--product", type=int, help="rows of the matrices of the product")
    parser.add_argument("--images", type=int, default=50_000, help="of the data set")
    parser.add_argument("--quick", action="store_true", help="a small network, for trying it out")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "benchmarks.jsonl")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    options.precisions = options.precisions or PRECISIONS[options.device]
    options.product = options.product or PRODUCTS[options.device]
    options.at_once = AT_ONCE[options.device] if options.at_once is None else options.at_once
    return options


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    shared = {
        name: getattr(options, name)
        for name in ("rounds", "threads", "workers", "batch", "optimizer", "head", "device")
    }
    for width in options.widths:
        for precision in options.precisions:
            print(f"== width {width:g}, {precision} ==", flush=True)
            found: dict[str, list[Row]] = {}
            for part, made in PARTS.items():
                found[part] = []
                for row in made(options, width, precision):
                    found[part].append(row)
                    print(shown(row), flush=True)
            configuration = shared | {"width": width, "precision": precision}
            append(options.results, "training", configuration, device=options.device, **found)


if __name__ == "__main__":
    main()
