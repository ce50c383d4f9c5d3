"""Conditions of a run: memory that the C library keeps, and how float32 is multiplied; both put back afterwards."""

import ctypes
import os
import resource
from collections.abc import Callable

import pytest
import torch

from chtconv.training import memory
from chtconv.training.config import Machine
from chtconv.training.device import is_fused, reproducible
from chtconv.training.memory import keeping_memory

ON_GLIBC = hasattr(ctypes.CDLL(None), "gnu_get_libc_version") if os.name == "posix" else False
PAGES = 2**26 // 4096


@pytest.fixture(autouse=True)
def _untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*memory._CHOICES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


def page_faults(action: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    action()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def use_64_mib() -> None:
    torch.ones(2**24)


@pytest.mark.skipif(not ON_GLIBC, reason="not glibc")
def test_large_blocks_cost_page_faults_only_once() -> None:
    assert page_faults(use_64_mib) > PAGES // 2
    with keeping_memory() as kept:
        assert kept
        use_64_mib()
        assert page_faults(use_64_mib) < PAGES // 100
    assert page_faults(use_64_mib) > PAGES // 2


@pytest.mark.skipif(not ON_GLIBC, reason="not glibc")
def test_memory_is_given_back_in_the_end() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    before = resident()
    with keeping_memory():
        use_64_mib()
        assert resident() > before + PAGES // 2
    assert resident() < before + PAGES // 2


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
