"""Compiled models on disk: one safetensors file with the tensors, and the steps as JSON in its metadata.

Nothing in a file is executed: steps are words of the vocabulary of :mod:`chtconv.sparse_compute.program`, and whatever
does not fit it is refused. docs/inference.md describes the format.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chtconv.errors import ConfigurationError, unknown
from chtconv.files import write_atomically
from chtconv.sparse_compute import positions
from chtconv.sparse_compute.program import INPUT, OPAQUE, TRANSPOSED, WEIGHTED, SparseTensor, Step, check, mapped

_FAMILY: Final = "chtconv-compiled-"
_FORMAT: Final = f"{_FAMILY}1"
_TYPES: Final = {
    str(each).removeprefix("torch."): each
    for each in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}
_HALVES: Final = (torch.float16, torch.bfloat16)
# Below this, index lists are not worth their names.
_LEAST_SIZE: Final = 256
# Numbers that a file may ask memory for, in all sparse tensors together.
_MOST: Final = 2**31


def write(path: Path, steps: list[Step], output: Any, values: torch.dtype | None) -> None:
    """Writes steps, inputs first, and the output in terms of them; see :meth:`SparseModel.save`."""
    if values not in (None, *_HALVES):
        raise ConfigurationError(f"values={values}: accepted are None, {', '.join(map(str, _HALVES))}.")
    writer = _Writer({step: number for number, step in enumerate(steps)}, values)
    program = {
        "inputs": [step.name for step in steps if step.op == INPUT],
        "steps": [writer.step(step) for step in steps if step.op != INPUT],
        "output": writer.json(output, "output"),
    }
    metadata = {"format": _FORMAT, "program": json.dumps(program, allow_nan=False)}
    metadata["hash"] = digest(writer.content, metadata)
    write_atomically(path, safetensors.torch.save(writer.content, metadata))


class _Writer:
    """Values as JSON, and the tensors in them by name."""

    def __init__(self, numbers: dict[Step, int], values: torch.dtype | None) -> None:
        self.numbers, self.values = numbers, values
        self.content: dict[str, Tensor] = {}
        self.left = _MOST

    def step(self, step: Step) -> dict[str, Any]:
        if step.op == OPAQUE:
            raise ConfigurationError(
                f"{step.name}: this operation cannot be saved, since a file holds no code. Accepted are usual layers, "
                "activations, poolings and arithmetic; docs/inference.md lists them."
            )
        weighted = step.op in (*WEIGHTED, *TRANSPOSED)
        try:
            args = {
                key: self.json(each, f"{self.numbers[step]}.{key}", weighted and key == "weight")
                for key, each in step.args.items()
            }
        except ConfigurationError as error:
            raise ConfigurationError(f"step {step}: {error}") from error
        return {"op": step.op, "name": step.name, "args": args}

    def json(self, value: Any, name: str, is_weight: bool = False) -> Any:
        """Numbers, words and lists are themselves; all else is an object with one key that says what it is."""
        if isinstance(value, Step):
            return {"step": self.numbers[value]}
        if isinstance(value, (Tensor, SparseTensor)):
            return self._tensor(value, name, is_weight)
        if isinstance(value, (list, tuple)):
            parts = [self.json(each, f"{name}.{place}") for place, each in enumerate(value)]
            return {"tuple": parts} if isinstance(value, tuple) else parts
        if isinstance(value, dict):
            return {"dict": [[key, self.json(each, f"{name}.{key}")] for key, each in value.items()]}
        if isinstance(value, slice):
            return {"slice": [value.start, value.stop, value.step]}
        if value is Ellipsis:
            return {"ellipsis": True}
        if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
            return value
        raise ConfigurationError(f"{value!r}, a {type(value).__name__}, cannot be saved.")

    def _tensor(self, value: Tensor | SparseTensor, name: str, is_weight: bool) -> dict[str, Any]:
        kind = value.dtype if isinstance(value, Tensor) else value.values.dtype
        if kind not in _TYPES.values():
            raise ConfigurationError(f"{kind}: accepted are {', '.join(_TYPES)}.")
        described: dict[str, Any] = {"type": str(kind).removeprefix("torch.")}
        stored = self.values if is_weight and self.values is not None and kind.is_floating_point else kind
        sparse = value if isinstance(value, SparseTensor) else SparseTensor.of(value)
        high, low, low_bits = positions.encode(sparse.positions)
        size = math.prod(sparse.shape)
        packed = len(sparse.values) * stored.itemsize + len(high) + len(low)
        if size < _LEAST_SIZE or packed >= size * stored.itemsize:
            dense = value if isinstance(value, Tensor) else value.dense()
            # A copy: safetensors refuses tensors that share memory.
            self.content[name] = _narrowed(dense, stored).contiguous().clone()
            return {"tensor": name} | described
        self.left -= size
        if self.left <= 0:
            raise ConfigurationError(
                f"{size} numbers: accepted are fewer than {_MOST} in all tensors together that are stored sparsely."
            )
        self.content |= {
            f"{name}.values": _narrowed(sparse.values, stored).contiguous(),
            f"{name}.high": high,
            f"{name}.low": low,
        }
        return {"sparse": name, "shape": list(sparse.shape), "low_bits": low_bits} | described


def _narrowed(tensor: Tensor, kind: torch.dtype) -> Tensor:
    narrow = tensor.to(kind)
    if tensor.is_floating_point() and not torch.equal(narrow.isfinite(), tensor.isfinite()):
        largest = float(tensor.abs().nan_to_num(0).max())
        raise ConfigurationError(
            f"a weight of {largest:.3g}: accepted in {kind} are up to {torch.finfo(kind).max:.3g}."
        )
    return narrow


def digest(content: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """What tells whether a file is as it was written; it is no proof of who wrote it."""
    result = hashlib.blake2b(repr((metadata.get("format"), metadata.get("program"))).encode(), digest_size=16)
    for name, tensor in sorted(content.items()):
        result.update(repr((name, str(tensor.dtype), list(tensor.shape))).encode())
        if tensor.numel():
            raw: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
            result.update(raw)
    return result.hexdigest()


# -------------------------------------------------------------------------------------------------------- reading


def read(path: Path) -> tuple[list[Step], Any]:
    """Steps and output of a file, checked.

    Raises:
        ConfigurationError: naming the file, and what is wrong with it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            # Copies, since what it gives is the file itself, which somebody may write to.
            content = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise ConfigurationError(f"{path} is no compiled model that can be read: {error}.") from error
    version = str(metadata.get("format"))
    if version != _FORMAT:
        kind = "of another version" if version.startswith(_FAMILY) else "no compiled model"
        raise ConfigurationError(f"{path} is {kind}: its format is {version[:80]!r}; accepted is {_FORMAT!r}.")
    if metadata.get("hash") != digest(content, metadata):
        raise ConfigurationError(f"{path} is damaged: its hash does not fit what it holds.")
    try:
        program = json.loads(metadata["program"])
        return _Reader(content).program(program)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ConfigurationError(f"{path}: its program cannot be read: {type(error).__name__}, {error}.") from error


class _Reader:
    """Values of JSON, and the steps so far."""

    def __init__(self, content: Mapping[str, Tensor]) -> None:
        self.content = content
        self.steps: list[Step] = []
        self.left = _MOST

    def program(self, program: Any) -> tuple[list[Step], Any]:
        _object(program, "program", "inputs", "steps", "output")
        inputs, steps, output = program["inputs"], program["steps"], program["output"]
        if not isinstance(inputs, list) or not all(isinstance(each, str) for each in inputs):
            raise ConfigurationError("inputs: accepted is a list of names.")
        self.steps = [Step(INPUT, {}, name) for name in inputs]
        if not isinstance(steps, list):
            raise ConfigurationError("steps: accepted is a list.")
        for each in steps:
            self.steps.append(self._step(each))
        result = mapped(self.value(output), lambda each: each.dense() if isinstance(each, SparseTensor) else each)
        return self.steps, result

    def _step(self, found: Any) -> Step:
        number = len(self.steps)
        _object(found, f"step {number}", "op", "name", "args")
        op, name, args = found["op"], found["name"], found["args"]
        if not isinstance(op, str) or not isinstance(name, str) or not isinstance(args, dict):
            raise ConfigurationError(f"step {number}: accepted are a word, a name and arguments.")
        try:
            step = Step(op, {key: self.value(each) for key, each in args.items()}, name)
            check(step)
        except ConfigurationError as error:
            raise ConfigurationError(f"step {number}, {name} ({op[:40]}): {error}") from error
        return step

    def value(self, found: Any) -> Any:
        """The inverse of what the writer does."""
        if isinstance(found, list):
            return [self.value(each) for each in found]
        if not isinstance(found, dict):
            return found
        kind, part = next(iter(found.items()), ("", None))
        if kind == "step" and len(found) == 1:
            if not isinstance(part, int) or isinstance(part, bool) or not 0 <= part < len(self.steps):
                raise ConfigurationError(f"takes the result of step {part!r:.40}; accepted are earlier steps, from 0.")
            return self.steps[part]
        if kind == "tensor":
            return self._dense(_object(found, "tensor", "tensor", "type"))
        if kind == "sparse":
            return self._sparse(_object(found, "sparse tensor", "sparse", "shape", "low_bits", "type"))
        if kind == "tuple" and isinstance(part, list) and len(found) == 1:
            return tuple(self.value(each) for each in part)
        if kind == "dict" and isinstance(part, list) and len(found) == 1:
            return {_key(key): self.value(each) for key, each in part}
        if kind == "slice" and isinstance(part, list) and len(part) == 3 and len(found) == 1:
            return slice(*part)
        if found == {"ellipsis": True}:
            return Ellipsis
        raise ConfigurationError(f"{str(found)[:80]}: accepted are steps, tensors, tuples, dicts and slices.")

    def _content(self, name: Any, *kinds: torch.dtype) -> Tensor:
        tensor = self.content.get(name) if isinstance(name, str) else None
        if tensor is None:
            raise ConfigurationError(f"tensor {name!r:.80} is missing.")
        if tensor.dtype not in kinds:
            raise ConfigurationError(f"tensor {name}: {tensor.dtype}; accepted are {', '.join(map(str, kinds))}.")
        return tensor

    def _dense(self, found: dict[str, Any]) -> Tensor:
        return self._content(found["tensor"], *_TYPES.values()).to(_type(found["type"]))

    def _sparse(self, found: dict[str, Any]) -> SparseTensor:
        name, shape, low_bits = str(found["sparse"]), found["shape"], found["low_bits"]
        sizes = (
            isinstance(shape, list) and 0 < len(shape) <= 8 and all(type(each) is int and each > 0 for each in shape)
        )
        if not sizes or math.prod(shape) >= self.left or type(low_bits) is not int:
            raise ConfigurationError(
                f"tensor {name}: shape {shape!r:.80} with low_bits={low_bits!r:.40}; accepted are sizes above 0 with a "
                f"product below {_MOST}, those of all sparse tensors together."
            )
        self.left -= math.prod(shape)
        values = self._content(f"{name}.values", *_TYPES.values())
        high, low = (self._content(f"{name}.{part}", torch.uint8) for part in ("high", "low"))
        if any(each.dim() != 1 for each in (values, high, low)):
            raise ConfigurationError(f"tensor {name}: accepted are values, high and low with one axis.")
        try:
            where = positions.decode(high, low, low_bits, len(values), math.prod(shape))
        except ConfigurationError as error:
            raise ConfigurationError(f"tensor {name}: {error}") from error
        return SparseTensor(values.to(_type(found["type"])), where, tuple(shape))


def _object(found: Any, what: str, *keys: str) -> dict[str, Any]:
    if not isinstance(found, dict) or found.keys() != set(keys):
        raise ConfigurationError(f"{what}: {str(found)[:80]}; accepted is an object of {', '.join(keys)}.")
    return found


def _key(key: Any) -> Any:
    if not isinstance(key, (str, int)):
        raise ConfigurationError(f"key {key!r:.40}: accepted are words and whole numbers.")
    return key


def _type(name: Any) -> torch.dtype:
    if not isinstance(name, str) or name not in _TYPES:
        raise unknown("type", name, _TYPES)
    return _TYPES[name]
