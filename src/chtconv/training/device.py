"""What a run is computed on, and under which conditions it gives the same bits again."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.utils.deterministic

from chtconv.errors import ConfigurationError
from chtconv.randomness import derived_seed
from chtconv.sparse_compute.library import library
from chtconv.training.config import DENSE


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


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass: bfloat16 for "bf16", nothing for "float32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def reproducible(device: torch.device, threads: int | None) -> Iterator[None]:
    """Deterministic algorithms, a number of CPU threads and a global generator to spare; all restored afterwards.

    The same seed gives the same bits on the same machine with the same number of threads: torch's own sums
    depend on that number.
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
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.set_num_threads(threads_before)


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
