"""The plot of benchmarks/sparse_compute.py: times against sparsity with their goals, and the roofline."""

import json
from pathlib import Path
from typing import Any

MARKS = {"forward": "o", "input gradient": "s", "weight gradient": "^"}
COLOURS = {0.0: "#999999", 0.7: "#0072b2", 0.9: "#d55e00", 0.95: "#009e73"}


def latest(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of the latest line of each part."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = [line for line in lines if line["benchmark"] == "sparse_compute"]
    return {line["configuration"]["part"]: line["rows"] for line in found}


def draw(results: Path, path: Path) -> None:
    """Draws what there is; nothing where matplotlib is missing."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    parts = latest(results)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    _ratios(left, [row for part in ("training", "resnet", "inference") for row in parts.get(part, [])])
    if "layers" in parts:
        _roofline(right, parts["layers"])
    figure.savefig(path, dpi=120)


def _ratios(axes: Any, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row.get("sparsity")]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        x, values = [100 * row["sparsity"] for row in own], [row["of_dense"] for row in own]
        y = [value["median"] for value in values]
        spread = [[v["median"] - v["low"] for v in values], [v["high"] - v["median"] for v in values]]
        inside = "inference" in model
        lines = axes.errorbar(x, y, spread, marker="o", linestyle="--" if inside else "-", capsize=3, label=model)
        for sparsity, row in zip(x, own, strict=True):
            if "goal" in row:
                axes.plot(sparsity, row["goal"], "_", markersize=18, color=lines[0].get_color())
    axes.axhline(1, color="#999999", linewidth=1)
    axes.set_xlabel("sparsity, %")
    axes.set_ylabel("time / that of the dense model in channels_last")
    axes.set_title("training steps and inference (bars: goals)")
    if rows:
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)


def _roofline(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Multiply-adds a second of each pass of each layer, over those that it makes with a byte it must read or write."""
    most = next(row["limits"] for row in rows if "limits" in row)
    points = [row for row in rows if "intensity" in row]
    for row in points:
        axes.plot(
            row["intensity"],
            row["of_peak"] * most["peak"] / 1e9,
            MARKS[row["pass"]],
            color=COLOURS[row["sparsity"]],
            markersize=5,
        )
    left, right = 0.5 * min(row["intensity"] for row in points), 2 * max(row["intensity"] for row in points)
    levels = {"peak": "numbers in registers", "from second-level cache": "one number from the second-level cache"}
    for key, label in levels.items():
        axes.plot([most[key] / most["bytes of memory"], right], [most[key] / 1e9] * 2, color="black", linewidth=1)
        axes.text(right, most[key] / 1e9, label, ha="right", va="bottom", fontsize=8)
    edge = most["peak"] / most["bytes of memory"]
    axes.plot([left, edge], [left * most["bytes of memory"] / 1e9, most["peak"] / 1e9], color="black", linewidth=1)
    axes.text(left, left * most["bytes of memory"] / 1e9, " memory", va="bottom", rotation=35, fontsize=8)
    for name, mark in MARKS.items():
        axes.plot([], [], mark, color="black", label=name)
    for sparsity, colour in COLOURS.items():
        axes.plot([], [], "o", color=colour, label=f"{sparsity:.0%} sparse" if sparsity else "dense")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("multiply-adds a byte of input, output and links")
    axes.set_ylabel("10⁹ multiply-adds a second")
    axes.set_title("convolutions of VGG16 and the limits of the processor")
    axes.legend(fontsize=8, loc="lower right")
