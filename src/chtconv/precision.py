"""How matrix products of float32 are rounded, where somebody has asked for less than float32."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

# Since torch 2.9 each kind of product has a setting of its own, and its older name beside it is an error.
_CONVOLUTION: Any = getattr(torch.backends.cudnn, "conv", None)
_NEW = _CONVOLUTION is not None
_MATRIX_PRODUCTS: dict[str, Any] = (
    {"cuda": torch.backends.cuda.matmul, "cpu": getattr(torch.backends.mkldnn, "matmul", None)} if _NEW else {}
)


@contextlib.contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Matrix products and convolutions of float32 on a GPU: rounded to TF32 or not; torch rounds those of cuDNN."""
    kinds = torch.backends.cuda.matmul, _CONVOLUTION if _NEW else torch.backends.cudnn
    value = ("tf32" if tf32 else "ieee") if _NEW else tf32
    with _changed(kinds, "fp32_precision" if _NEW else "allow_tf32", value):
        yield


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products on a device as precise as their operands, whatever autocast and precision of float32 say.

    >>> with torch.autocast("cpu"), full_precision(torch.device("cpu")):
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.float32
    """
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type in _MATRIX_PRODUCTS:
            stack.enter_context(_changed((_MATRIX_PRODUCTS[device.type],), "fp32_precision", "ieee"))
        elif not _NEW:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


@contextlib.contextmanager
def _changed(kinds: Sequence[Any], name: str, value: object) -> Iterator[None]:
    before = [getattr(kind, name) for kind in kinds]
    for kind in kinds:
        setattr(kind, name, value)
    try:
        yield
    finally:
        for kind, old in zip(kinds, before, strict=True):
            if _NEW:
                setattr(kind, name, "none")  # as wherever it follows a more general setting, and did so before
            if getattr(kind, name) != old:
                setattr(kind, name, old)
