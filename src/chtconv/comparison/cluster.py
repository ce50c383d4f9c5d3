"""Cells on the workers of a Dask cluster: Slurm, PBS, LSF, SGE and HTCondor by dask-jobqueue, or any other machines.

Every worker must see the folder of the comparison under the same path and have this package installed. A worker trains
one cell a thread, each in a process of its own, so ``dask worker --nthreads 1`` is one cell at a time. The number of
CPU threads of a cell is what its worker's environment says unless the comparison sets it: a worker with a nanny has
``OMP_NUM_THREADS=1``, one core a cell. A cell whose worker dies is taken up by another and goes on from its last whole
epoch.

Reference: https://distributed.dask.org, https://jobqueue.dask.org
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, Final, ParamSpec, TypeVar

from chtconv.comparison.process import TERMINATED
from chtconv.errors import ConfigurationError

_TIMEOUT: Final = 10.0  # seconds
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@contextlib.contextmanager
def cluster_executor(address: str) -> Iterator[Executor]:
    """The workers of the scheduler at ``address``, for example ``"tcp://10.0.0.1:8786"``, as an executor.

    Raises:
        ConfigurationError: if distributed is not installed, or no scheduler answers there within ten seconds.
    """
    with _connected(address) as client:
        if not client.scheduler_info()["workers"]:
            print(f"chtconv: note: the scheduler at {address} has no workers yet", file=sys.stderr)
        engine = client.get_executor(pure=False)
        try:
            yield _Workers(engine)
        finally:
            engine.shutdown(wait=False)


def _connected(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise ConfigurationError("a cluster needs distributed: pip install 'chtconv[cluster]'") from None
    connect: Any = Client
    try:
        return connect(address, timeout=_TIMEOUT)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(f"no Dask scheduler answers at {address!r}: {reason}") from error


class _Workers(Executor):
    """Dask's own executor, and cells that were asked to end with their worker go on elsewhere."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def submit(
        self, fn: Callable[_Arguments, _Result], /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> "Future[_Result]":
        future: Future[_Result] = self._engine.submit(_on_worker, fn, *args, **kwargs)
        return future


def _on_worker(fn: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
    from distributed import Reschedule

    _leave_memory_to_training()
    result = fn(*args, **kwargs)
    if result == TERMINATED:
        # A batch system that ends a job signals all of its processes, the cells before or after the worker.
        raise Reschedule
    return result


def _leave_memory_to_training() -> None:
    """Take a nanny's tuning of malloc, which is for data frames, out of the environment that a cell inherits.

    It has every large tensor mapped anew: a third more CPU time of an epoch of VGG16 at width 0.25, all of it in the
    system. See :mod:`chtconv.training.memory` for what is better.
    """
    import dask

    for name, value in dask.config.get("distributed.nanny.pre-spawn-environ", {}).items():
        if name.startswith("MALLOC_") and os.environ.get(name) == str(value):
            del os.environ[name]
