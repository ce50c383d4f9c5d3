"""What a run is computed on, and under which conditions it gives the same bits again."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.utils.deterministic

from chtconv.errors import ConfigurationError
from chtconv.precision import float32_products
from chtconv.randomness import derived_seed
from chtconv.sparse_compute.library import library
from chtconv.training.config import DENSE, Machine
from chtconv.training.memory import keeping_memory


def resolve(device: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda".

    Raises:
        ConfigurationError: for "cuda" where there is no GPU.

    >>> resolve("cpu")
    device(type='cpu')
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device='cuda': torch finds no GPU here; accepted are 'cpu' and 'auto'.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def check_backend(backend: str, device: torch.device, method: str) -> str:
    """The backend for "auto", "sparse" or "dense" on a device: "dense" where there is nothing to choose.

    Raises:
        ConfigurationError: for "sparse" on a GPU, without compiled kernels, or in a run without sparse layers.

    >>> check_backend("auto", torch.device("cuda"), "chts")
    'dense'
    """
    if backend != "sparse":
        return backend if device.type == "cpu" and method != DENSE else "dense"
    if device.type != "cpu":
        reason = f"device {device.type!r} has no sparse kernels; accepted is the CPU, or 'auto' and 'dense'"
    elif method == DENSE:
        reason = "method='dense' has no sparse layers; accepted are 'auto' and 'dense'"
    elif library() is None:
        reason = "there are no compiled kernels here; accepted are 'auto' and 'dense'"
    else:
        return backend
    raise ConfigurationError(f"backend='sparse': {reason}.")


def check_machine(machine: Machine, device: torch.device) -> None:
    """Refuse what a device cannot do.

    Raises:
        ConfigurationError: "tf32" or "captured" on a CPU, or "captured" without the fused optimizer.

    >>> check_machine(Machine(step="captured"), torch.device("cuda"))
    """
    if device.type == "cpu" and machine.precision == "tf32":
        raise ConfigurationError("precision='tf32': only a GPU has it; accepted on a CPU are 'float32' and 'bf16'.")
    if device.type == "cpu" and machine.step == "captured":
        raise ConfigurationError("step='captured': only a GPU has CUDA graphs; accepted on a CPU is 'eager'.")
    if machine.step == "captured" and machine.optimizer_kernel == "plain":
        raise ConfigurationError(
            "optimizer_kernel='plain': a captured step would repeat its first learning rate; accepted are 'auto' and "
            "'fused', or step='eager'."
        )


def is_fused(machine: Machine, device: torch.device) -> bool:
    """Whether the optimizer is fused: where it was asked for, and by itself on a GPU.

    >>> is_fused(Machine(), torch.device("cpu")), is_fused(Machine(), torch.device("cuda"))
    (False, True)
    """
    return machine.optimizer_kernel == "fused" or (machine.optimizer_kernel == "auto" and device.type == "cuda")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass: bfloat16 for "bf16", nothing for others."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def reproducible(device: torch.device, threads: int | None, precision: str = "float32") -> Iterator[None]:
    """Deterministic algorithms, a number of CPU threads and a global generator to spare; all restored afterwards.

    The same seed gives the same bits on the same machine with the same number of threads: torch's own sums
    depend on that number. Memory is kept as :func:`chtconv.training.memory.keeping_memory` does it, float32 on a
    GPU is what it says unless ``precision`` is "tf32", and what a GPU does is done in a stream of its own.
    """
    if device.type == "cuda":
        # cuBLAS is deterministic only with a workspace of fixed size, read when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, threads_before = torch.backends.cudnn.benchmark, torch.get_num_threads()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Filling every new tensor guards against reading what was never written; nothing here does.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(threads or threads_before)
    try:
        with (
            keeping_memory(),
            float32_products(tf32=precision == "tf32"),
            torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []),
            _own_stream(device),
        ):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.set_num_threads(threads_before)


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Not the default stream of a GPU, in which nothing can be captured, nor anything that was begun there."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seed_dropout(seed: int, epoch: int, device: torch.device) -> None:
    """Seed the global generators, which dropout draws from, for one epoch: a resumed run draws the same."""
    derived = derived_seed(seed, "dropout", epoch)
    torch.default_generator.manual_seed(derived)
    if device.type == "cuda":
        torch.cuda.manual_seed(derived)
