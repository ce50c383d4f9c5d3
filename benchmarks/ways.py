"""A process in which one way of computing is timed; see processes.py, which starts it and asks.

Its argument is a JSON object: "kind" (a name in KINDS), "threads", and what the class of that kind takes.
It answers in JSON lines: first which actions there are, then the seconds of each action that it is asked for.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import seconds
from layer_passes import Layers
from sparse_ways import Inference, Training
from training_loops import Chtconv, Plain, Product, Updates

# Actions that take less are repeated, and the mean is taken.
LEAST = 0.05


class Memory:
    """What this process needs above what it had when this was made, at most; Linux only."""

    def __init__(self) -> None:
        # Its peak so far is forgotten: imports have one.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = self._status("VmRSS")

    def peak(self) -> int:
        return self._status("VmHWM") - self._before

    @staticmethod
    def _status(field: str) -> int:
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(f"{field}:"):
                    return 1024 * int(line.split()[1])
        return 0


KINDS: dict[str, Callable[..., Any]] = {
    "training": Training,
    "inference": Inference,
    "layers": Layers,
    "chtconv": Chtconv,
    "plain": Plain,
    "product": Product,
    "updates": Updates,
}


def mean_seconds(action: Callable[[], object], expected: float | None) -> float:
    """Of as many repetitions as fill LEAST, if one takes as long as expected."""
    repetitions = 1 if expected is None else max(1, math.ceil(LEAST / expected))

    def repeated() -> None:
        # No result outlives its repetition: the next one gets its memory.
        for _ in range(repetitions):
            action()

    return seconds(repeated) / repetitions


def main() -> None:
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    # What others print is no answer.
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    torch.set_num_threads(spec.pop("threads"))
    torch.manual_seed(0)
    memory = Memory()
    subject = KINDS[spec.pop("kind")](**spec)
    answer(actions=list(subject.actions), **subject.about)
    expected: dict[str, float] = {}
    for line in sys.stdin:
        question = line.strip()
        if question == "peak":
            answer(peak=memory.peak())
        else:
            expected[question] = mean_seconds(subject.actions[question], expected.get(question))
            answer(seconds=expected[question])


if __name__ == "__main__":
    main()
