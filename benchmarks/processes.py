"""Ways of computing that are compared, each in a process of its own, timed in turns.

What one way does to the memory of its process, to compiled graphs or to threads, another one does not feel. All of
them wait but the one that is timed.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

# glibc gives large tensors back to the system, and a page fault for every 4 KiB when they are asked for again; these
# make it keep them, as the memory of the sparse kernels does.
KEEPING = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


class Process:
    """A process that has made and warmed up what ``ways.py`` describes."""

    def __init__(self, *, keeping: bool = False, **spec: Any) -> None:
        environment = os.environ | (KEEPING if keeping else {})
        command = [sys.executable, str(Path(__file__).with_name("ways.py")), json.dumps(spec)]
        self._process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            self.about: dict[str, Any] = self._answer()
        except BaseException:
            self.stop()
            raise

    def seconds(self, action: str) -> float:
        """Of one of its actions."""
        return float(self._asked(action)["seconds"])

    def peak(self) -> int:
        """Bytes of memory at most, above those before it made anything; 0 where the system does not tell."""
        return int(self._asked("peak")["peak"])

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _asked(self, question: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a process that was to be timed has ended; its error is above.")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def running(specs: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Process]]:
    """Processes by name, started one after the other, because warming up measures too."""
    with ExitStack() as stack:
        made = {}
        for name, spec in specs.items():
            made[name] = Process(**spec)
            stack.callback(made[name].stop)
        yield made


def in_turns(processes: Mapping[str, Process], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by process and action, one entry a round: all processes forth and back, and the mean of both.

    Actions of one process have the same names as those of the others. A round to warm up is left out.
    """
    actions = [action for each in processes.values() for action in each.about["actions"]]
    times: dict[str, dict[str, list[float]]] = {name: {} for name in processes}
    for turn in range(rounds + 1):
        for action in dict.fromkeys(actions):
            having = [name for name, each in processes.items() if action in each.about["actions"]]
            spent = dict.fromkeys(having, 0.0)
            for name in [*having, *reversed(having)]:
                spent[name] += processes[name].seconds(action) / 2
            if turn:
                for name, value in spent.items():
                    times[name].setdefault(action, []).append(value)
    return times


def over(times: list[float], base: list[float]) -> dict[str, float]:
    """The ratio of a round: its median, and the quarter of the rounds on each side."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": median, "low": low, "high": high}


def summed(times: Mapping[str, list[float]], weights: Mapping[str, int]) -> list[float]:
    """Seconds of several actions together, by round."""
    return [sum(values) for values in zip(*([w * t for t in times[name]] for name, w in weights.items()), strict=True)]
