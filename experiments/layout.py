"""What experiments and tables share: the lines of results/, rows in Markdown, and numbers as text."""

import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from chtconv.training import environment

ROOT = Path(__file__).resolve().parent.parent


def read(name: str) -> list[dict[str, Any]]:
    """The lines of a file in results/; none where there is no file."""
    path = ROOT / "results" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, experiment: str, device: torch.device, parts: dict[str, Any]) -> None:
    """Adds a line to a file of results: what was measured, and where, when and with what."""
    line = {
        "experiment": experiment,
        **parts,
        **environment.describe(device),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def markdown(header: list[str], rows: Iterable[list[str]], labels: int = 1) -> str:
    """A table with its first columns, of words, to the left and numbers to the right."""
    lines = [header, ["---"] * labels + ["---:"] * (len(header) - labels), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quartiles(values: dict[str, float], form: str = ".3f", unit: float = 1) -> str:
    """The median of a measured value, and its quartiles."""
    low, median, high = (f"{unit * values[key]:{form}}" for key in ("low", "median", "high"))
    return f"{median} ({low} to {high})"


def cell(value: Any) -> str:
    """A value as it stands in a table; nothing where there is none."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, dict):
        return quartiles(value)
    return f"{value:.0f}" if value >= 10 else f"{value:.3g}"
