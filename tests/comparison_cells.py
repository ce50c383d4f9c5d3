"""What tests of comparisons share: cells that train in a second, children that only pretend to, and patience."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chtconv.comparison.cell import Cell
from chtconv.comparison.process import _CHILD
from chtconv.training import Config

TINY = Config().replace(
    width=1 / 16, head=16, epochs=2, batch_size=256, evolutions_per_epoch=2.0, backend="dense", device="cpu"
)
# The half of a child's program that finds its modules; what it then does is up to the test.
CHILD = _CHILD.partition("; from")[0] + "; from chtconv_test_child import *; "


def cell(variant: str = "CHTs", **values: Any) -> Cell:
    return Cell(variant, TINY.replace(**values))


def until(happened: Callable[[], object], seconds: float = 60.0, every: float = 0.01) -> None:
    """Wait until something has happened, which must not take longer."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(every)


def epochs_kept(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and whose parent did not ask is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def trainers_of(run: Path) -> list[int]:
    """The processes that train in a run folder."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = each.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run).encode() in words and is_alive(int(each.parent.name)):
            found.append(int(each.parent.name))
    return found
