"""Sparse weights on disk: the active values and one bit a position, in a safetensors file.

A float32 layer of density d takes d + 1/32 of its dense size: 33 % at 70 % sparsity, 13 % at 90 %, 8 % at 95 %. Layers
that are dense stay as large as they are: the whole file of our VGG16, whose dense head has more weights than its
convolutions, takes 71, 62 and 60 % of what ``torch.save`` makes of it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from chtconv.enforcement.bits import bits_of, is_zero_off_mask
from chtconv.errors import ConfigurationError
from chtconv.files import write_atomically
from chtconv.randomness import canonical_names
from chtconv.topology import Topology

_FORMAT: Final = "chtconv-sparse-1"
# What a tensor in the file is: a whole tensor, the active values of one, or its mask as bits.
_DENSE, _VALUES, _BITS = "dense:", "values:", "bits:"


def save_sparse(
    weights: nn.Module | Mapping[str, Tensor], masks: Topology | Mapping[str, Tensor], path: str | Path
) -> None:
    """Writes the state of a model to a safetensors file, sparse weights without their zeros.

    Args:
        weights: a model, or its state dict.
        masks: its topology, or bool masks of the shapes of their weights by name. They are kept bit by bit: an active
            link may be exactly 0.
        path: the file, which is replaced at once or not at all.

    Raises:
        ConfigurationError: a mask without its weight, or of another shape; a weight that is not zero off its mask; a
            state that does not consist of tensors.
        StorageError: the file cannot be written.

    Example:
        >>> import os, tempfile
        >>> weights = {"weight": torch.tensor([[0.0, 1.5], [0.0, 0.0]]), "bias": torch.tensor([0.5, 0.25])}
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> save_sparse(weights, {"weight": weights["weight"] != 0}, path)
        >>> load_sparse(path)["weight"]
        tensor([[0.0000, 1.5000],
                [0.0000, 0.0000]])
        >>> load_masks(path)["weight"]
        tensor([[False,  True],
                [False, False]])
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    given = masks.masks if isinstance(masks, Topology) else masks
    # A model that is compiled or distributed has prefixes before its names, which masks need not have, or have alone.
    short, full = canonical_names(given), {short: name for name, short in canonical_names(state).items()}
    by_name = {name if name in state else full.get(short[name], name): mask for name, mask in given.items()}
    unknown = sorted(by_name.keys() - state.keys())
    if unknown:
        raise ConfigurationError(
            f"masks of {', '.join(unknown)}, and no such weights; those of the model are {', '.join(state)}."
        )
    content: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ConfigurationError(f"{name} is a {type(tensor).__name__}; accepted are tensors.")
        tensor = tensor.detach().cpu()
        if name in by_name:
            mask = by_name[name].cpu()
            _check(name, tensor, mask)
            content[_VALUES + name] = tensor[mask]
            content[_BITS + name] = torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))
            shapes[name] = list(tensor.shape)
        else:
            # A copy: safetensors refuses tensors that share memory, as tied weights do.
            content[_DENSE + name] = tensor.contiguous().clone()
    metadata = {"format": _FORMAT, "names": json.dumps(list(state)), "shapes": json.dumps(shapes)}
    metadata["hash"] = _hash(content, metadata)
    write_atomically(Path(path), safetensors.torch.save(content, metadata))


def load_sparse(path: str | Path) -> dict[str, Tensor]:
    """The state dict that :func:`save_sparse` wrote, bit for bit, on the CPU; a zero off the mask is +0.

    Raises:
        ConfigurationError: a file that is damaged or was not written by :func:`save_sparse`.
    """
    names, masks, content = _read(path)
    state = {}
    try:
        for name in names:
            if name in masks:
                values = content[_VALUES + name]
                if values.shape != (int(masks[name].sum()),):
                    raise ValueError(f"{name}: {list(values.shape)} values of {int(masks[name].sum())} links")
                state[name] = torch.zeros(masks[name].shape, dtype=values.dtype, device="cpu")
                state[name][masks[name]] = values
            else:
                state[name] = content[_DENSE + name]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{path} is damaged, though its hash fits: {error!r}.") from error
    return state


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """The masks that :func:`save_sparse` wrote: bool tensors of the shapes of their weights, on the CPU.

    Raises:
        ConfigurationError: a file that is damaged or was not written by :func:`save_sparse`.
    """
    return _read(path)[1]


def _check(name: str, tensor: Tensor, mask: Tensor) -> None:
    if mask.shape != tensor.shape or mask.dtype != torch.bool:
        raise ConfigurationError(
            f"{name}: its mask is {mask.dtype} of shape {list(mask.shape)}; accepted is torch.bool of shape "
            f"{list(tensor.shape)}."
        )
    if not is_zero_off_mask(tensor, bits_of(mask, torch.empty(mask.shape, device="cpu"))):
        raise ConfigurationError(
            f"{name}: there are weights off the mask that are not 0, and would be lost; accepted are weights and masks "
            "of one and the same step."
        )


def _hash(content: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(repr((metadata.get("names"), metadata.get("shapes"))).encode(), digest_size=16)
    for name, tensor in sorted(content.items()):
        digest.update(repr((name, str(tensor.dtype), list(tensor.shape))).encode())
        if tensor.numel():
            raw: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
            digest.update(raw)
    return digest.hexdigest()


def _read(path: str | Path) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """Names in order, masks, and the tensors of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"{path} is no sparse checkpoint that can be read: {error}.") from error
    if metadata.get("format") != _FORMAT:
        raise ConfigurationError(
            f"{path} is not a file of chtconv.checkpoint.save_sparse (format {metadata.get('format')!r} instead of "
            f"{_FORMAT!r}); a file of dense tensors is read by safetensors.torch.load_file."
        )
    if metadata.get("hash") != _hash(content, metadata):
        raise ConfigurationError(f"{path} is damaged: its hash does not fit what it holds.")
    try:
        names, shapes = json.loads(metadata["names"]), json.loads(metadata["shapes"])
        masks = {name: _unpacked(content[_BITS + name], shape) for name, shape in shapes.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"{path} is damaged, though its hash fits: {error!r}.") from error
    return names, masks, content


def _unpacked(bits: Tensor, shape: list[int]) -> Tensor:
    size = math.prod(shape)
    # Before memory is taken for what it claims to be.
    if min(shape, default=0) < 0 or bits.dtype != torch.uint8 or bits.numel() != -(-size // 8):
        raise ValueError(f"shape {shape} with {bits.numel()} bytes of {bits.dtype}")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=size)).bool().view(shape)
