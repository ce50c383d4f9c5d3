"""What the processor can do at most, measured: cycles, multiply-adds, and bytes from each level of memory.

A few loops in C (peak.c) are compiled by the C compiler at hand ($CC, else cc) and run on all threads at once.
"""

import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import seconds

CHAINS = 12
# Bytes that a thread reads again and again. A third-level cache is shared with others.
SIZES = {"first-level cache": 16 << 10, "second-level cache": 256 << 10, "memory": 256 << 20}
_LONG = 0.1
_TRIALS = 5


def limits(threads: int) -> dict[str, float]:
    """Measured rates of so many threads together.

    Returns:
        ``hertz``: cycles a second of one core. ``peak``: multiply-adds a second of float32 numbers in registers.
        ``from LEVEL``: those where one factor of each comes from there. ``bytes of memory``: read in a second.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        library = _compiled(Path(folder))

        def rate(call: Callable[[int, int], object], count: int) -> float:
            """Of what ``call(thread, count)`` does, per second and thread; counts grow until they take _LONG."""

            def together(count: int) -> float:
                return seconds(lambda: list(pool.map(lambda thread: call(thread, count), range(threads))))

            while (spent := together(count)) < _LONG:
                count *= 2
            return count / min(spent, *(together(count) for _ in range(_TRIALS)))

        lanes, out = library.width(), (ctypes.c_float * (64 * threads))()

        def at(thread: int) -> ctypes.c_void_p:
            return ctypes.c_void_p(ctypes.addressof(out) + 256 * thread)

        found = {"hertz": rate(lambda _, n: library.additions(ctypes.c_int64(n)), 1 << 24)}
        calls = rate(lambda thread, n: library.multiply_adds(ctypes.c_int64(n), at(thread)), 1 << 20)
        found["peak"] = calls * CHAINS * lanes * threads
        for level, size in SIZES.items():
            vectors = size // (4 * lanes) // CHAINS * CHAINS
            arrays = [_aligned(size) for _ in range(threads)]

            def read(thread: int, passes: int, arrays: list[np.ndarray] = arrays, vectors: int = vectors) -> None:
                address = ctypes.c_void_p(arrays[thread].ctypes.data)
                library.from_memory(ctypes.c_int64(passes), address, ctypes.c_int64(vectors), at(thread))

            found[f"from {level}"] = rate(read, 1) * vectors * lanes * threads
    return found | {"bytes of memory": 4 * found["from memory"]}


def _compiled(folder: Path) -> ctypes.CDLL:
    source, library = Path(__file__).with_name("peak.c"), folder / "peak.so"
    options = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
    try:
        compiler = shlex.split(os.environ.get("CC", "cc"))
        subprocess.run([*compiler, *options, "-o", str(library), str(source)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"the limits of the processor are measured in C, and there is no compiler: {error}") from error
    loaded = ctypes.CDLL(str(library))
    loaded.width.restype = loaded.additions.restype = ctypes.c_int64
    return loaded


def _aligned(size: int) -> np.ndarray:
    """Ones that begin where a cache line does."""
    array = np.ones(size // 4 + 16, dtype=np.float32)
    first = -array.ctypes.data % 64 // 4
    return array[first : first + size // 4]


if __name__ == "__main__":
    for name, value in limits(2).items():
        print(f"{name:30}{value / 1e9:10.2f} G/s")
