"""Counting the floating point operations of one forward pass, each for the parameter that it multiplies with."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import flop_registry, sdpa_flop

Formula: TypeAlias = Callable[..., int]

aten = torch.ops.aten

# Products that torch's own table leaves out, some of them only in older versions.
MORE_FORMULAS: dict[Any, Formula] = {
    aten.dot: lambda vector, *_, out_val: 2 * vector.numel(),
    aten.mv: lambda matrix, *_, out_val: 2 * matrix.numel(),
    aten.addmv: lambda _, matrix, *__, out_val, **___: 2 * matrix.numel(),
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
}


class Attribution:
    """Whose each counted operation is: the parameter's that it multiplies with, else the innermost module's.

    Parameters are recognised by their memory, so that transposed, sliced and, under autocast, converted ones are; also
    where several lie in one buffer.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.flops: dict[str, int] = {}
        self._modules = {module: name for name, module in model.named_modules()}
        self._running = [""]
        self._owners: dict[int, list[_Piece]] = {}
        for name, parameter in parameters.items():
            self._owners.setdefault(_address(parameter), []).append(_Piece.of(parameter, name, parameter.ndim))

    def owner(self, *tensors: Tensor) -> str:
        """The parameter with most axes among these, hence no bias; the innermost module that runs if there is none."""
        found = [piece for each in tensors if (piece := self._piece(each)) is not None]
        return max(found, key=lambda each: each.axes).name if found else self._running[-1]

    def formulas(self) -> dict[Any, Formula]:
        """Torch's formulas, each of which tells this object what it has counted."""
        counting = {op: _Raw(self._counting(formula)) for op, formula in (MORE_FORMULAS | flop_registry).items()}
        return {**counting, aten._to_copy: _Raw(self._copied), aten.clone: _Raw(self._copied)}

    @contextmanager
    def following(self) -> Iterator[None]:
        """Knows which module runs, within this context."""

        def enter(module: nn.Module, _: Any) -> None:
            self._running.append(self._modules.get(module, self._running[-1]))

        def leave(*_: Any) -> None:
            self._running.pop()

        handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _counting(self, formula: Formula) -> Formula:
        def counted(*args: Any, **kwargs: Any) -> int:
            flops = int(formula(*args, **kwargs))
            name = self.owner(*(each for each in args if isinstance(each, Tensor)))
            self.flops[name] = self.flops.get(name, 0) + flops
            return flops

        return counted

    def _copied(self, source: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
        if (piece := self._piece(source)) is not None:
            self._owners[_address(out_val)] = [_Piece.of(out_val, piece.name, piece.axes)]
        return 0

    def _piece(self, tensor: Tensor) -> "_Piece | None":
        """Of the parameters, or their copies, the first in whose memory a tensor begins."""
        place = _place(tensor)
        return next((each for each in self._owners.get(_address(tensor), ()) if place in each.places), None)


class _Piece(NamedTuple):
    """The bytes of a storage that belong to a parameter."""

    # Kept alive, lest another gets its address.
    storage: torch.UntypedStorage
    places: range
    name: str
    axes: int

    @classmethod
    def of(cls, tensor: Tensor, name: str, axes: int) -> "_Piece":
        start, last = _place(tensor), sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        # At least one byte, lest a parameter without entries has no owner.
        end = start + max(1, (last + 1) * tensor.element_size())
        return cls(tensor.untyped_storage(), range(start, end), name, axes)


def _place(tensor: Tensor) -> int:
    """The first byte within the storage."""
    return int(tensor.storage_offset()) * tensor.element_size()


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Raw:
    """A formula that FlopCounterMode hands tensors instead of their shapes."""

    _get_raw = True

    def __init__(self, formula: Formula) -> None:
        self._formula = formula

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        return self._formula(*args, **kwargs)


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, nothing compiled or fused beyond recognition; undone at the end."""
    before = [(module, module.training, _notes(module)) for module in model.modules()]
    gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}
    fast = torch.backends.mha.get_fastpath_enabled()
    # Autocast would hand this pass weights that it has converted before and, in older versions of torch, hand later
    # passes those that are converted here, without gradients.
    torch.clear_autocast_cache()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), torch.random.fork_rng(gpus), torch.compiler.set_stance("force_eager"):
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.clear_autocast_cache()
        for module, training, notes in before:
            module.training = training
            for key in _notes(module):
                del vars(module)[key]
            vars(module).update(notes)


def _notes(module: nn.Module) -> dict[str, Any]:
    """What chtconv noted at a module, such as the size of its last input."""
    return {key: value for key, value in vars(module).items() if key.startswith("_chtconv")}
