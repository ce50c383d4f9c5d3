"""The spatial size of the input of each sparse layer, on which its links are scored: seen, not asked for."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_TRAINED = "_chtconv_input_size"
# In evaluation, which may use other sizes.
_EVALUATED = "_chtconv_evaluated_size"


def observe(module: nn.Module) -> list[RemovableHandle]:
    """Registers the hook that notes the size of each input; none for a linear layer, which has no spatial axes."""
    if isinstance(module, nn.Linear):
        return []
    return [module.register_forward_pre_hook(_note, with_kwargs=True)]


def seen(module: nn.Module) -> tuple[int, ...] | None:
    """The size of the last input in training mode; where there was none, of the last input; None before any.

    >>> import torch
    >>> layer = nn.Conv2d(3, 8, 3)
    >>> handles, before = observe(layer), seen(layer)
    >>> _ = layer(torch.zeros(2, 3, 9, 7))
    >>> before, seen(layer), seen(nn.Linear(4, 4))
    (None, torch.Size([9, 7]), ())
    """
    if isinstance(module, nn.Linear):
        return ()
    noted = module.__dict__
    size: tuple[int, ...] | None = noted.get(_TRAINED, noted.get(_EVALUATED))
    return size


def of_call(module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[int, ...] | None:
    """The size of the input in a call of a layer; None where it is given no tensor.

    >>> import torch
    >>> of_call(nn.Conv2d(3, 8, 3), (), {"input": torch.zeros(2, 3, 9, 7)}), of_call(nn.Linear(4, 4), (), {})
    (torch.Size([9, 7]), None)
    """
    # A layer of another class may take its input under another name, or something else than a tensor.
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    if not tensors:
        return None
    axes = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)  # type: ignore[arg-type]
    return tensors[0].shape[tensors[0].dim() - axes :]


def put(module: nn.Module, size: tuple[int, ...]) -> None:
    """Notes a size that was seen elsewhere, on another rank."""
    setattr(module, _TRAINED, size)


def forget(module: nn.Module) -> None:
    """Removes what was noted."""
    for attribute in (_TRAINED, _EVALUATED):
        module.__dict__.pop(attribute, None)


def _note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
    size = of_call(module, args, kwargs)
    if size is None:
        return
    # Attributes of the module that are written and never read: anything else makes torch.compile compile once more.
    if module.training:
        module._chtconv_input_size = size  # type: ignore[assignment]
    else:
        module._chtconv_evaluated_size = size  # type: ignore[assignment]
