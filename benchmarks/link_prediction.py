"""Link prediction against what a user would do instead, and against the limit of the machine, side by side in one run.

Every pair is timed in turns (A B A B ...) and reported as the ratio of a turn. Prints a table, draws a plot where
matplotlib is installed, and adds a JSON line to results/benchmarks.jsonl.

    python benchmarks/link_prediction.py [--rounds 5] [--threads 2] [--only NAME ...]
"""

import argparse
import os
import statistics
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from common import ROOT, append, seconds
from shapes import Layers, convnext_tiny, resnet50
from stages import seconds_by_stage
from torch import Tensor, nn

import chtconv
from chtconv.layers.geometry import Geometry
from chtconv.models import build_model
from chtconv.scores.cases import constants
from chtconv.scores.explicit import receptive_fields
from chtconv.scores.patterns import pattern_table
from chtconv.scores.predictors import PREDICTORS
from chtconv.scores.rule import Rule

NEVER = 10**9


def in_turns(rounds: int, **actions: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each action, called one after the other in every round; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            spent = seconds(action)
            if turn:
                times[name].append(spent)
    return times


def ratio(
    name: str, goal: float, times: dict[str, list[float]], measured: str, base: str, note: str = ""
) -> dict[str, Any]:
    """A row: the median over the rounds of one time over another."""
    ratios = [a / b for a, b in zip(times[measured], times[base], strict=True)]
    row = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "goal": goal}
    spent = {key: statistics.median(times[key]) for key in (measured, base)}
    return {"name": name, **row, "seconds": spent[measured], "base_seconds": spent[base], "note": note}


def vgg16_step() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """A full VGG16 with its optimizer and a dense training step of it at batch 128."""
    model = build_model("vgg16", 10, seed=0).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (128,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return model, optimizer, step


def against_a_training_step(rounds: int) -> Iterator[dict[str, Any]]:
    """One evolution of VGG16 on both graphs, and the constants of a geometry, beside a dense step."""
    step = vgg16_step()[2]
    actions: dict[str, Callable[[], object]] = {"step": step}
    for graph in ("kernel", "layer"):
        model, optimizer, _ = vgg16_step()
        topology = chtconv.sparsify(model, optimizer, sparsity=0.7, method="chts", graph=graph, interval=NEVER)
        model(torch.zeros(2, 3, 32, 32))
        actions[graph] = topology.evolve
    times = in_turns(rounds, **actions)
    yield ratio("evolution of VGG16, kernel graph / dense step", 0.25, times, "kernel", "step")
    yield ratio("evolution of VGG16, layer graph / dense step", 4, times, "layer", "step")
    yield from constants_of_a_geometry(rounds, step)


def constants_of_a_geometry(rounds: int, step: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """Building the constants of a 3x3 geometry, and loading them from the disk cache, beside a dense step."""
    rule = Rule(Geometry.of((3, 3), 32, padding=1), "ch3_l3n")

    def load() -> None:
        pattern_table.cache_clear()
        pattern_table(rule, PREDICTORS[rule.predictor], torch.device("cpu"))

    def build() -> None:
        constants.cache_clear()
        os.environ["CHTCONV_CACHE"] = ""
        load()
        os.environ["CHTCONV_CACHE"] = folder

    with tempfile.TemporaryDirectory() as folder:
        os.environ["CHTCONV_CACHE"] = folder
        load()
        times = in_turns(rounds, step=step, build=build, load=load)
        del os.environ["CHTCONV_CACHE"]
    yield ratio("building the constants of a 3x3 geometry / dense step", 1, times, "build", "step")
    yield ratio("loading them from the disk cache / dense step", 0.02, times, "load", "step")


def sparse_l3n(linked: "scipy.sparse.csr_array") -> Any:
    """CH3-L3n on an explicit sparse graph with SciPy: what a user would write from the definition."""

    def weights(x: "scipy.sparse.csr_array") -> Any:
        common = (x @ x.T).tocoo()
        degree = x.sum(axis=1)
        external = degree[common.col] - common.data - 1
        data = 1 / (1 + external.clip(0))
        return scipy.sparse.csr_array((data, (common.row, common.col)), shape=common.shape)

    return weights(linked) @ linked + linked @ weights(linked.T.tocsr()).T


def explicit_kernel(mask_CK: Tensor, geometry: Geometry, fields: Tensor) -> None:
    """Expand, predict and average one kernel on the explicit sparse graph."""
    window, position, activation = fields.T.numpy()
    inputs = int(activation.max()) + 1
    rows, columns = [], []
    for c, mask_K in enumerate(mask_CK.numpy()):
        on = mask_K[position]
        rows.append(window[on])
        columns.append(activation[on] + c * inputs)
    rows_all, columns_all = np.concatenate(rows), np.concatenate(columns)
    shape = (int(window.max()) + 1, len(mask_CK) * inputs)
    linked = scipy.sparse.csr_array((np.ones(len(rows_all)), (rows_all, columns_all)), shape=shape)
    scores = sparse_l3n(linked)
    for c in range(len(mask_CK)):
        values = np.asarray(scores[window, activation + c * inputs]).ravel()
        np.bincount(position, values, geometry.positions)


def against_the_explicit_graph(kernels: int = 2) -> Iterator[dict[str, Any]]:
    """A 64-to-64 3x3 layer at 32x32: some kernels on the explicit graph, scaled to all 64, beside the closed form."""
    geometry = Geometry.of((3, 3), 32, padding=1)
    mask = torch.rand(64, 64, 3, 3) < 0.3
    fields = torch.tensor(receptive_fields(geometry))
    sampled = [mask[o].flatten(1) for o in range(kernels)]
    explicit = [seconds(lambda m=m: explicit_kernel(m, geometry, fields)) * 64 for m in sampled]
    tracemalloc.start()
    explicit_kernel(sampled[0], geometry, fields)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    ours = in_turns(kernels + 5, ours=lambda: chtconv.link_scores(mask, 32, padding=1))["ours"][:kernels]
    times = {"explicit": explicit, "ours": ours}
    row = ratio("explicit sparse graph (SciPy) / closed form, 64-64 3x3 at 32x32", 1e4, times, "explicit", "ours")
    table = pattern_table(Rule(geometry, "ch3_l3n"), PREDICTORS["ch3_l3n"], torch.device("cpu")).values_XJ.nbytes
    row["note"] = (
        f"{kernels} kernels of 64 timed and scaled; peak memory {memory / 1e6:.0f} MB for one kernel, "
        f"{(table + 2 * 4 * 64 * 512 * 9) / 1e6:.0f} MB for the layer in closed form"
    )
    yield row


def against_resolution(rounds: int) -> Iterator[dict[str, Any]]:
    """The same layer at 224 and at 1024 beside 32."""
    mask = torch.rand(256, 256, 3, 3) < 0.3
    actions = {f"at{n}": (lambda n=n: chtconv.link_scores(mask, n, padding=1)) for n in (32, 224, 1024)}
    times = in_turns(4 * rounds, **actions)
    for n in (224, 1024):
        yield ratio(f"256-256 3x3 at {n} / at 32", 1.1, times, f"at{n}", "at32")


def against_the_matrix_form(rounds: int, size: int = 4096) -> Iterator[dict[str, Any]]:
    """Linear 4096 to 4096 on the layer graph beside the published matrix form, written as plainly as it is."""
    mask = torch.rand(size, size) < 0.1

    def matrix_form() -> Tensor:
        m = mask.float()
        common_out, common_in = m @ m.T, m.T @ m
        phi_out = (common_out > 0) / (m.sum(1) - common_out).clamp_min(1)
        phi_in = (common_in > 0) / (m.sum(0) - common_in).clamp_min(1)
        return phi_out @ m + m @ phi_in.T

    times = in_turns(rounds, ours=lambda: chtconv.link_scores(mask, (), graph="layer"), matrix=matrix_form)
    yield ratio(f"Linear {size}x{size}, layer graph / matrix form", 1.05, times, "ours", "matrix")


def of_the_gemm_rate(rounds: int) -> Iterator[dict[str, Any]]:
    """Floating point operations of the products of an evolution over its time, as a share of the machine's rate.

    And where the rest of its time goes: seconds of each stage, each time after a training step as in training.
    """
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    step = vgg16_step()[2]
    for graph in ("kernel", "layer"):
        model, optimizer, _ = vgg16_step()
        topology = chtconv.sparsify(model, optimizer, sparsity=0.7, method="chts", graph=graph, interval=NEVER)
        model(torch.zeros(2, 3, 32, 32))
        flops = sum(product_flops(mask, graph) for mask in topology.masks.values())
        times = in_turns(rounds, step=step, evolution=topology.evolve, gemm=lambda: a @ b)
        times["ideal"] = [flops * spent / (2 * 2048**3) for spent in times["gemm"]]
        stages = seconds_by_stage(lambda topology=topology: topology.evolve(), step, rounds)
        title = f"time of the products at GEMM rate / evolution, {graph} graph"
        yield ratio(title, 0, times, "ideal", "evolution") | {"graph": graph, "stages": stages}


def product_flops(mask: Tensor, graph: str) -> float:
    """Operations of the dense products that score a 3x3 layer."""
    kernels, channels, positions = mask.flatten(2).shape
    if graph == "kernel":
        return 2.0 * kernels * (512 + positions**2) * 256 * positions
    half = positions * (positions + 1) / 2 + positions**2
    return 2.0 * half * (kernels**2 * channels + channels**2 * kernels)


def convolutions(layers: Layers, batch: int) -> list[tuple[nn.Conv2d, Tensor, Tensor]]:
    """Each convolution with an input and a gradient of its output, all in channels_last; images need no gradient."""
    made = []
    for (out, width, *kernel), size, options in layers:
        channels = width * options.get("groups", 1)
        layer = nn.Conv2d(channels, out, tuple(kernel), bias=False, **options).to(memory_format=torch.channels_last)
        x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
        made.append((layer, x.requires_grad_(channels != 3), torch.randn_like(layer(x).detach())))
    return made


def of_large_networks(rounds: int, batch: int = 4) -> Iterator[dict[str, Any]]:
    """Scores of all layers of ResNet-50 and ConvNeXt-T beside forward and backward of the same convolutions.

    Each convolution by itself: nothing between them, no optimizer, and their tensors are made before.
    """
    for name, layers in (("ResNet-50", resnet50()), ("ConvNeXt-T", convnext_tiny())):
        masks = [torch.rand(shape) < 0.1 for shape, _, _ in layers]

        def score(graph: str, masks: list[Tensor] = masks, layers: Any = layers) -> None:
            for mask, (_, size, options) in zip(masks, layers, strict=True):
                chtconv.link_scores(mask, size, graph=graph, **options)

        made = convolutions(layers, batch)

        def train(made: list[tuple[nn.Conv2d, Tensor, Tensor]] = made) -> None:
            for layer, x, gradient in made:
                layer.weight.grad = x.grad = None
                layer(x).backward(gradient)

        times = in_turns(rounds, kernel=lambda: score("kernel"), layer=lambda: score("layer"), step=train)
        for graph in ("kernel", "layer"):
            title = f"{name} at 224, {graph} graph / its convolutions alone, forward and backward, batch {batch}"
            yield ratio(title, 0, times, graph, "step")


SECTIONS: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
    "step": against_a_training_step,
    "explicit": lambda rounds: against_the_explicit_graph(),
    "resolution": against_resolution,
    "matrix": against_the_matrix_form,
    "rate": of_the_gemm_rate,
    "large": of_large_networks,
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Each ratio beside its goal, on a logarithmic axis."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(figsize=(10, 0.45 * len(rows) + 1), layout="constrained")
    places = range(len(rows))
    axes.barh(places, [row["ratio"] for row in rows], color="#0072b2", label="measured")
    goals = [(place, row["goal"]) for place, row in zip(places, rows, strict=True) if row["goal"]]
    axes.plot([goal for _, goal in goals], [place for place, _ in goals], "D", color="#d55e00", label="goal")
    axes.set_yticks(list(places), [row["name"] for row in rows], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("ratio of times\n(goals are maxima, but a minimum for the explicit graph)")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "benchmarks.jsonl")
    parser.add_argument("--plot", type=Path, default=ROOT / "results" / "link_prediction.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for name in options.only:
        for row in SECTIONS[name](options.rounds):
            rows.append(row)
            goal = f"goal {row['goal']:g}" if row["goal"] else ""
            spread = f"{row['low']:.3g} to {row['high']:.3g}"
            print(f"{row['name']:95}{row['ratio']:10.4g}  {spread:22}{goal:12}{row['note']}", flush=True)
    draw(rows, options.plot)
    configuration = {"rounds": options.rounds, "threads": options.threads, "sections": options.only}
    append(options.results, "link_prediction", configuration, rows=rows)


if __name__ == "__main__":
    main()
