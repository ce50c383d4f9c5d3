"""What all benchmarks do: time a call, and add a line to the results."""

import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from chtconv.sparse_compute.library import library
from chtconv.training import environment

ROOT = Path(__file__).resolve().parent.parent


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def append(path: Path, benchmark: str, configuration: dict[str, Any], *, device: str = "cpu", **content: Any) -> None:
    """Adds a line: the benchmark, how it was configured, what it measured, and on what."""
    kernels = library()
    line = {
        "benchmark": benchmark,
        "configuration": configuration,
        **content,
        **environment.describe(torch.device(device)),
        "kernels": kernels and {"isa": kernels.isa, "threaded": kernels.threaded},
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
