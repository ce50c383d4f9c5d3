"""A trained sparse model, compiled for inference: batch norm folded, ReLU in the convolutions, no dense weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from chtconv.enforcement.bits import bits_of, is_zero_off_mask
from chtconv.errors import ConfigurationError, unknown
from chtconv.layers.tracing import unwrapped_model
from chtconv.randomness import canonical_names
from chtconv.sparse_compute import compiled_file
from chtconv.sparse_compute.blocked import Blocked, to_blocked, to_dense
from chtconv.sparse_compute.execution import Operation, Result, SparseConvolution, SparseLinear, operation
from chtconv.sparse_compute.folding import folded
from chtconv.sparse_compute.layout import BLOCKED_FROM
from chtconv.sparse_compute.library import library
from chtconv.sparse_compute.lowering import lowered
from chtconv.sparse_compute.program import INPUT, WEIGHTED, Step, mapped
from chtconv.sparse_compute.tuning import fastest
from chtconv.topology import Topology

_BACKENDS: Final = ("auto", "sparse", "dense")
# Least shares of zeros: where sparse is taken without measuring, and where it is considered at all.
_TAKEN: Final = {"conv2d": 0.6, "linear": 0.94}
_CONSIDERED: Final = {"conv2d": 0.3, "linear": 0.8}


class SparseModel(nn.Module):
    """A compiled model; made by :func:`compile_sparse` and :func:`load_compiled`.

    It takes the inputs of the model that it was made of, by position, and returns the same, up to rounding, on the CPU
    and outside of autograd. It has no parameters and no training mode: ``train()`` leaves it as it is. Where
    convolutions are sparse, ``torch.jit.trace``, ``torch.export``, ``torch.func`` and modes that observe operations are
    refused. They compute in their own type, also under autocast.

    Attributes:
        operations: what is computed, in order.
    """

    def __init__(self, steps: Sequence[Step], output: Any) -> None:
        super().__init__()
        numbers = {step: number for number, step in enumerate(steps)}

        def numbered(value: Any) -> Any:
            return mapped(value, lambda each: Result(numbers[each]) if isinstance(each, Step) else each)

        self._inputs = [step.name for step in steps if step.op == INPUT]
        self._output = numbered(output)
        args = [numbered(step.args) for step in steps[len(self._inputs) :]]
        self.operations = nn.ModuleList(
            operation(step, each) for step, each in zip(steps[len(self._inputs) :], args, strict=True)
        )
        # After which operation a result is used no more.
        last = {number: place for place, value in enumerate([*args, self._output]) for number in _numbers(value)}
        self._dying = [[number for number, end in last.items() if end == place] for place in range(len(args))]
        self.eval()

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """What the model returns in eval mode."""
        if len(inputs) != len(self._inputs):
            raise ConfigurationError(f"{len(inputs)} inputs; accepted are {len(self._inputs)}: {self._inputs}.")
        if torch.is_autocast_enabled("cpu") and self._is_sparse:
            # The kernels have no half precision, and what stands between them was measured without.
            with torch.autocast("cpu", enabled=False):
                return self._run([_single(each) for each in inputs])
        return self._run(list(inputs))

    def _run(self, values: list[Any]) -> Any:
        for each, dying in zip(self.operations, self._dying, strict=True):
            values.append(each(values))
            for number in dying:
                values[number] = None
        return mapped(self._output, lambda each: _dense(values[each.number]) if isinstance(each, Result) else each)

    @property
    def _is_sparse(self) -> bool:
        return any(isinstance(each, (SparseConvolution, SparseLinear)) for each in self.operations)

    def train(self, mode: bool = True) -> "SparseModel":
        """Nothing: there is no training mode."""
        return super().train(False)

    @property
    def backends(self) -> dict[str, str]:
        """How each convolution and linear layer is computed: "sparse" or "dense"."""
        return {
            each.name or str(place): "sparse" if isinstance(each, (SparseConvolution, SparseLinear)) else "dense"
            for place, each in enumerate(self.operations)
            if isinstance(each, Operation) and each.op in WEIGHTED
        }

    def save(self, path: str | Path, *, values: torch.dtype | None = None) -> None:
        """Writes the model to a safetensors file; see docs/inference.md.

        Args:
            path: the file, which is replaced at once or not at all.
            values: ``torch.float16`` or ``torch.bfloat16`` to write weights in half the bytes, each rounded by up to
                1/2048 or 1/256 of itself; the model computes in the type that it has all the same. None to write
                them as they are.

        Raises:
            ConfigurationError: an operation that a file cannot hold, or weights that the type cannot.
            StorageError: the file cannot be written.
        """
        names: list[Any] = [Step(INPUT, {}, name) for name in self._inputs]
        for each in self.operations:
            assert isinstance(each, Operation)
            names.append(Step(each.op, {}, each.name))
            names[-1].args = mapped(each.args, lambda leaf: names[leaf.number] if isinstance(leaf, Result) else leaf)
        output = mapped(self._output, lambda leaf: names[leaf.number] if isinstance(leaf, Result) else leaf)
        compiled_file.write(Path(path), names, output, values)


def _numbers(value: Any) -> list[int]:
    """Of the results in a value."""
    found: list[int] = []
    mapped(value, lambda each: found.append(each.number) if isinstance(each, Result) else None)
    return found


def _single(value: Any) -> Any:
    """An input in half precision, as autocast leaves it behind, in single precision."""
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def _dense(value: Any) -> Any:
    return to_dense(value) if isinstance(value, Blocked) else value


def compile_sparse(
    model: nn.Module,
    topology: Topology | None = None,
    *,
    backend: str = "auto",
    example: Tensor | tuple[Any, ...] | None = None,
) -> SparseModel:
    """A model for inference on CPUs that does not compute with zeros.

    Batch norm is folded into the convolution before it, ReLU is applied in the same pass, dropout is dropped, and
    convolutions that are sparse hold their nonzero weights only. All is as in eval mode; the model itself stays as it
    is, and shares nothing with the compiled one. Hooks are not called, optional arguments of ``forward`` are at their
    defaults, and functions whose result is not used, such as checks of sizes, are left out. Wrappers for compilation
    and data parallelism are looked through.

    Args:
        model: in float32 or float64; ``torch.fx`` must be able to trace it.
        topology: of the model: its layers are those that may be computed sparsely. Without one, these are all that
            have zeros enough.
        backend: "sparse" for all layers with at least 30 % zeros (linear ones: 80 %), "dense" for none, "auto" for
            those where it pays.
        example: inputs to measure with, for "auto". What is fastest depends on the batch size and the image size, so
            take those that matter. Without an example, "auto" takes convolutions from 60 % zeros, linear layers from
            94 %.

    Raises:
        ConfigurationError: a model that cannot be traced, with the reason; a weight that a hook computes; a backend
            of another name; a topology of another model.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> model[0].weight.data *= torch.rand(8, 3, 3, 3) < 0.1
        >>> compiled = compile_sparse(model)
        >>> images = torch.randn(2, 3, 8, 8)
        >>> torch.allclose(compiled(images), model(images), atol=1e-5)
        True
    """
    if backend not in _BACKENDS:
        raise unknown("backend", backend, _BACKENDS)
    layers = None if topology is None else _layers(model, topology)
    steps, output = folded(*lowered(model))
    considered = []
    for step in steps:
        zeros = _zeros(step)
        named = layers is None or step.name in layers
        if backend != "dense" and named and zeros >= _CONSIDERED.get(step.op, 2):
            considered.append((step, zeros))
    if backend == "auto" and example is not None:
        return _measured(steps, output, [step for step, _ in considered], example)
    for step, zeros in considered:
        if backend == "sparse" or zeros >= _TAKEN[step.op]:
            step.args["backend"] = "sparse"
    return SparseModel(steps, output)


def load_compiled(path: str | Path) -> SparseModel:
    """The model that :meth:`SparseModel.save` wrote; its class is not needed, and nothing in the file is executed.

    Without the compiled kernels, dense weights are made of the sparse ones in memory.

    Raises:
        ConfigurationError: a file that is damaged, was not written by it, or is of another version, with what is wrong.
    """
    try:
        return SparseModel(*compiled_file.read(Path(path)))
    except (RuntimeError, MemoryError) as error:
        # Of sizes that there is no memory for.
        raise ConfigurationError(f"{path}: the model cannot be made: {error}.") from error


def _layers(model: nn.Module, topology: Topology) -> set[str]:
    """Names of the modules with a mask, as :func:`.lowering.lowered` calls them."""
    short = canonical_names(dict(model.named_parameters()))
    parameters = {short[name]: each for name, each in model.named_parameters()}
    masks = topology.masks
    sparse = set()
    for full, alone in canonical_names(masks).items():
        name, mask = short.get(full, alone), masks[full]
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != mask.shape:
            raise ConfigurationError(f"{full}: a mask of the topology, and no such weight; accepted is its own model.")
        if not is_zero_off_mask(parameter.detach(), bits_of(mask, parameter.detach())):
            raise ConfigurationError(f"{full}: there are weights off the mask that are not 0.")
        sparse.add(id(parameter))
    modules = unwrapped_model(model)[0].named_modules()
    return {name for name, module in modules if id(module._parameters.get("weight")) in sparse}


def _zeros(step: Step) -> float:
    """Share of zeros in the weight of a step that could be sparse, since it and the bias are constant; -1 of others."""
    weight, bias = step.args.get("weight"), step.args.get("bias")
    if isinstance(bias, Step) or step.op not in _CONSIDERED or not isinstance(weight, Tensor) or not weight.numel():
        return -1.0
    if weight.dtype not in (torch.float32, torch.float64):
        return -1.0
    return 1 - int(weight.count_nonzero()) / weight.numel()


# ---------------------------------------------------------------------------------------------------- measurement


def _measured(steps: list[Step], output: Any, considered: list[Step], example: Any) -> SparseModel:
    """The fastest of three models: each layer as it is faster by itself, all sparse, or all dense.

    Layers by themselves are measured without conversions between layouts, which only whole models show.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    dense = SparseModel(steps, output)
    numbers = {step: number for number, step in enumerate(step for step in steps if step.op != INPUT)}
    if library() is None:
        considered = [step for step in considered if step.op != "conv2d"]
    faster: list[Step] = []
    handles = []
    for step in considered:

        def measure(module: nn.Module, args: tuple[list[Any]], step: Step = step) -> None:
            assert isinstance(module, Operation)
            if _is_faster_sparse(step, module.first(*args)):
                faster.append(step)

        handles.append(dense.operations[numbers[step]].register_forward_pre_hook(measure))
    dense(*inputs)
    for handle in handles:
        handle.remove()
    models = [dense]
    for chosen in (faster, considered):
        for step in steps:
            step.args.pop("backend", None)
        for step in chosen:
            step.args["backend"] = "sparse"
        models.append(SparseModel(steps, output))
    seconds = fastest(*(lambda each=each: each(*inputs) for each in models))
    return models[seconds.index(min(seconds))]


@torch.no_grad()
def _is_faster_sparse(step: Step, x: Any) -> bool:
    if not isinstance(x, Tensor) or (step.op == "conv2d" and x.dim() != 4):
        return False
    ways = []
    for backend in ("dense", "sparse"):
        run = operation(step, step.args | {"backend": backend, "input": Result(0)})
        given = _dense(x)
        if step.op == "conv2d":
            blocked = backend == "sparse" and len(x) >= BLOCKED_FROM
            given = to_blocked(given) if blocked else given.contiguous(memory_format=torch.channels_last)
        ways.append(lambda run=run, given=given: run([given]))
    dense, sparse = fastest(*ways)
    return sparse < dense
