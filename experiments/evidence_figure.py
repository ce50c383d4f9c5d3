"""The figure of the evidence: every difference of a preregistered test with its 95 % interval.

It carries a digest of what it shows, so that one can tell whether it is of the results that are there, whatever
version of matplotlib drew it.
"""

import hashlib
import json
from typing import Any, Final

from layout import ROOT
from matplotlib.figure import Figure
from PIL import Image
from preregistered import PREREGISTERED_TESTS

FIGURE: Final = ROOT / "results" / "evidence.png"
_COLORS: Final = {"SET": "#1a1b1c", "RigL": "#d55e00", "GraNet": "#0072b2", "slice occupancy": "#009e73"}
_KEY: Final = "Description"  # of the digest in the file


def shown() -> list[dict[str, Any]]:
    """What the figure shows, from top to bottom: a heading or a difference each."""
    found: list[dict[str, Any]] = []
    for test in PREREGISTERED_TESTS.values():
        if test.missing:
            continue
        for sparsity in test.sparsities:
            here = [each for each in test.differences if each.sparsity == sparsity and each.paired.interval is not None]
            if not here:
                continue
            found.append({"heading": f"{test.called(test.variant)} at {sparsity:.0%}: {test.about}"})
            for each in here:
                interval = each.paired.interval
                found.append({
                    "other": each.other, "pairs": each.paired.n, "mean": each.paired.difference,
                    "low": interval.low, "high": interval.high,
                })  # fmt: skip
    return found


def digest() -> str:
    """Of what is shown, to three digits."""
    rounded = [{name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()} for row in shown()]
    return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()


def is_current() -> bool:
    """Whether the figure is of the results that are there."""
    if not FIGURE.exists():
        return False
    with Image.open(FIGURE) as image:
        return image.info.get(_KEY) == digest()


def draw() -> None:
    """Writes the figure."""
    rows = shown()
    figure = Figure(figsize=(7.5, 0.9 + 0.24 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="#76777a", linewidth=3, alpha=0.45, zorder=1)
    labels = []
    for index, row in enumerate(rows):
        if "heading" in row:
            labels.append("")
            axes.annotate(
                row["heading"], (0, index), xycoords=("axes fraction", "data"), xytext=(4, 0), weight="bold",
                textcoords="offset points", va="center", fontsize=8.5, backgroundcolor="white",
            )  # fmt: skip
            continue
        control = ", the control" if row["other"] == "slice occupancy" else ""
        labels.append(f"\N{MINUS SIGN} {row['other']}{control} ({row['pairs']} pairs)")
        color = _COLORS.get(row["other"].split(", ")[0], "#cc79a7")
        axes.plot([row["low"], row["high"]], [index, index], color=color, linewidth=2)
        axes.plot([row["mean"]], [index], "o", color=color, markersize=5)
    axes.set_yticks(range(len(rows)), labels, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xlabel(
        "difference of test accuracy in points, 95 % interval: right of the line CHT is better", fontsize=8.5
    )
    axes.grid(axis="x", color="#d8d9da", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(FIGURE, dpi=150, metadata={_KEY: digest()}, facecolor="white")
