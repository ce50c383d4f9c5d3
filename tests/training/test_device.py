"""Conditions of a run: memory that the C library keeps, and how float32 is multiplied; both put back afterwards."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chtconv.training import memory
from chtconv.training.config import Machine
from chtconv.training.device import is_fused, reproducible
from chtconv.training.memory import keeping_memory

ON_GLIBC = hasattr(ctypes.CDLL(None), "gnu_get_libc_version") if os.name == "posix" else False
PAGES = 2**26 // 4096
TUNING = (*memory._CHOICES, "GLIBC_TUNABLES")
PLAIN = {name: value for name, value in os.environ.items() if name not in TUNING} | {
    "PYTHONPATH": str(Path(__file__).parents[2] / "src")
}


@pytest.fixture(autouse=True)
def _untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TUNING:
        monkeypatch.delenv(name, raising=False)


# In a process of its own: what other tests left in the heap decides where a block goes.
MEMORY = """
import resource, torch
from chtconv.training.memory import keeping_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

first = resident()
print(page_faults())
with keeping_memory() as kept:
    print(int(kept))
    for _ in range(4):
        page_faults()
    print(page_faults())
    print(resident() - first)
print(resident() - first)
print(page_faults())
"""


@pytest.mark.skipif(not ON_GLIBC, reason="not glibc")
def test_large_blocks_cost_page_faults_only_once_and_are_given_back_in_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], env=PLAIN, capture_output=True, text=True, check=True)
    before, kept, again, held, left, after = map(int, done.stdout.split())
    assert kept
    assert min(before, after) > PAGES // 2
    assert again < PAGES // 100
    assert held > PAGES // 2 > left


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "1"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")]
)
def test_who_tunes_memory_already_is_left_alone(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(memory, "_glibc", lambda: pytest.fail("it was looked for"))
    with keeping_memory() as kept:
        assert not kept


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with keeping_memory() as kept:
        assert not kept


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch below 2.9 has older names")
@pytest.mark.parametrize(("precision", "expected"), [("tf32", "tf32"), ("float32", "ieee"), ("bf16", "ieee")])
def test_float32_is_what_it_says_unless_tf32_is_asked_for(precision: str, expected: str) -> None:
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [kind.fp32_precision for kind in kinds]
    with reproducible(torch.device("cpu"), 1, precision):
        assert [kind.fp32_precision for kind in kinds] == [expected] * 2
    assert [kind.fp32_precision for kind in kinds] == before


@pytest.mark.parametrize(("kernel", "cpu", "cuda"), [("auto", 0, 1), ("plain", 0, 0), ("fused", 1, 1)])
def test_the_optimizer_is_fused_where_asked_for_and_on_a_gpu(kernel: str, cpu: int, cuda: int) -> None:
    machine = Machine(optimizer_kernel=kernel)
    assert [is_fused(machine, torch.device(name)) for name in ("cpu", "cuda")] == [cpu, cuda]
