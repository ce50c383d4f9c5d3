"""The compiled kernels: found, loaded and called; where there are none, everything works without them.

Three environment variables are read when the kernels are first asked for: ``CHTCONV_KERNELS=off`` does without them,
``CHTCONV_ISA`` names an instruction set instead of the widest one, and ``CHTCONV_LIBRARY`` a file to load.
"""

import ctypes
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from chtconv.errors import ChtconvWarning, ConfigurationError, unknown
from chtconv.sparse_compute.sources import digest

ABI_VERSION = 3
"""Raised here and in ``csrc/common.h`` when a function that Python calls takes other arguments, or when what an older
library computes is wrong or unsafe."""

_BITS = {"avx512": 4, "avx2": 2, "neon": 8, "scalar": 1}  # of chtconv_supported, widest first
_TYPES = {torch.float32: "f32", torch.float64: "f64"}
_OUT_OF_MEMORY = 1
_FAILURES = {2: "an argument is not one that it takes", 3: "torch did not run it on its threads"}


class Library:
    """The kernels of one file, for the instruction sets that this processor runs.

    Attributes:
        isa: the instruction set that :meth:`call` uses.
        supported: those that it may be, widest first; ``"scalar"`` is always one of them.
        threaded: whether kernels run on the threads of torch (2.10 and later), or on the calling one alone.
    """

    def __init__(self, path: Path) -> None:
        """Loads a file.

        Args:
            path: of the shared library.

        Raises:
            OSError: where it is missing, cannot be loaded, or was built for another version of this module, or from
                other sources than those beside this module (of an editable install; a wheel has none).
            ConfigurationError: for a value of ``CHTCONV_ISA`` that :meth:`use` refuses.
        """
        if not path.exists():
            raise OSError(f"{path} does not exist (the package was built without a compiler?)")
        self._file = ctypes.CDLL(str(path))
        version = self._file.chtconv_abi_version() if hasattr(self._file, "chtconv_abi_version") else "none"
        if version != ABI_VERSION:
            raise OSError(f"{path} has interface version {version}, and {ABI_VERSION} is needed: build it again")
        sources = digest(Path(__file__).with_name("csrc"))
        if sources and sources != self._built_from():
            raise OSError(f"{path} was built from other sources than those in csrc: build it again")
        self._functions: dict[tuple[str, torch.dtype, str], Callable[..., int]] = {}
        bits = self._file.chtconv_supported()
        self.supported = tuple(isa for isa, bit in _BITS.items() if bits & bit)
        self.isa = self.supported[0]
        self.use(os.environ.get("CHTCONV_ISA") or self.isa)
        address = _torch_parallel_for()
        self.threaded = address is not None
        self._file.chtconv_use_threads(ctypes.c_void_p(address))

    def use(self, isa: str) -> None:
        """Changes the instruction set of all later calls; results of two differ by rounding.

        Raises:
            ConfigurationError: for a name that is none, or one that this processor does not run.
        """
        if isa in _BITS and isa not in self.supported:
            raise ConfigurationError(
                f"instruction set {isa!r}: this processor does not run it. "
                f"Accepted: {', '.join(map(repr, self.supported))}."
            )
        if isa not in _BITS:
            raise unknown("instruction set", isa, self.supported)
        self.isa = isa

    def call(self, name: str, dtype: torch.dtype, *args: object) -> None:
        """Calls the kernel ``{name}_{f32 or f64}_{isa}``, which may write to the tensors that it is given.

        Args:
            name: of the kernel, without its endings.
            dtype: ``torch.float32`` or ``torch.float64``.
            args: an int is passed as ``int64_t``, a tensor as the address of its first element, which the kernel takes
                to be in the memory of the processor, ``None`` as a null pointer, and objects of ctypes as they are.

        Raises:
            MemoryError: where it could not get its scratch memory.
            RuntimeError: where it refuses an argument, or torch does not run it on its threads.
            ConfigurationError: for another dtype.
        """
        function = self._functions.get((name, dtype, self.isa)) or self._function(name, dtype)
        code = function(*[_passed(value) for value in args])
        if code:
            raise _failure(name, code)

    def _built_from(self) -> str:
        if not hasattr(self._file, "chtconv_sources"):
            return ""
        self._file.chtconv_sources.restype = ctypes.c_char_p
        return bytes(self._file.chtconv_sources()).decode()

    def _function(self, name: str, dtype: torch.dtype) -> Callable[..., int]:
        if dtype not in _TYPES:
            raise ConfigurationError(f"kernel {name}: {dtype} numbers; accepted are {', '.join(map(str, _TYPES))}.")
        function: Callable[..., int] = getattr(self._file, f"{name}_{_TYPES[dtype]}_{self.isa}")
        self._functions[name, dtype, self.isa] = function
        return function


@cache
def library() -> Library | None:
    """The kernels, loaded once a process.

    Returns:
        ``None`` with ``CHTCONV_KERNELS=off``, and, with a ``ChtconvWarning`` that gives the reason, where they were not
        built or cannot be loaded.

    Raises:
        ConfigurationError: for values of ``CHTCONV_KERNELS`` and ``CHTCONV_ISA`` that cannot be used.

    >>> kernels = library()
    >>> kernels is None or kernels.isa in kernels.supported
    True
    """
    wanted = os.environ.get("CHTCONV_KERNELS") or "on"
    if wanted not in ("on", "off"):
        raise unknown("value of CHTCONV_KERNELS", wanted, ["on", "off"])
    if wanted == "off":
        return None
    path = os.environ.get("CHTCONV_LIBRARY") or Path(__file__).with_name("_native.so")
    try:
        # Of a name without a folder the system would look into its own.
        return Library(Path(path).resolve())
    except OSError as reason:
        warnings.warn(
            f"there are no compiled kernels, and sparse convolutions run as dense ones: {reason}. docs/building.md of "
            "the sources says how to build them; CHTCONV_KERNELS=off does without them silently.",
            ChtconvWarning,
            stacklevel=2,
        )
        return None


def _passed(value: object) -> object:
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, Tensor):
        if not value.is_cpu:
            raise RuntimeError(f"a {type(value).__name__} on {value.device}: kernels take tensors on the CPU.")
        address = value.data_ptr()
        if not address and value.numel():
            raise RuntimeError(f"a {type(value).__name__} of shape {tuple(value.shape)} has no memory of its own.")
        return ctypes.c_void_p(address)
    return value


def _failure(name: str, code: int) -> Exception:
    if code == _OUT_OF_MEMORY:
        return MemoryError(f"kernel {name}: not enough memory.")
    return RuntimeError(f"kernel {name}: {_FAILURES.get(code, f'error {code}')}.")


def _torch_parallel_for() -> int | None:
    """Address of the C function by which others run on torch's threads; ``None`` before torch 2.10."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            function = ctypes.CDLL(str(Path(torch.__path__[0]) / "lib" / name)).torch_parallel_for
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None
