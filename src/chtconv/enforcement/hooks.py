"""Hooks that do not own what they call: a model with them can be copied and pickled like any other."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

from torch import nn
from torch.utils.hooks import RemovableHandle

# Of a module: what the names of our attributes begin with, and those of its dictionaries of hooks end with.
_OURS: Final = "_chtconv"
_HOOKS: Final = ("_hooks", "_hooks_with_kwargs")


class WeakHook:
    """Calls a method as long as its object lives; its copies, by ``deepcopy`` or pickle, do nothing.

    A model that held its topology would carry it, and with it the optimizer's state, into every copy.

    >>> import copy
    >>> calls = []
    >>> class Counter:
    ...     def count(self, *_): calls.append(1)
    >>> counter = Counter()
    >>> hook = WeakHook(counter.count)
    >>> hook("anything"), copy.deepcopy(hook)("anything"), len(calls)
    (None, None, 1)
    """

    def __init__(self, method: Any = None) -> None:
        # In two parts, because a WeakMethod makes the method anew at each call.
        self._owner: weakref.ref[Any] | None = None if method is None else weakref.ref(method.__self__)
        self._function: Callable[..., None] | None = None if method is None else method.__func__

    @property
    def alive(self) -> bool:
        """Whether there is still something to call."""
        return self._owner is not None and self._owner() is not None

    def __call__(self, *arguments: Any) -> None:
        """Calls the method with these arguments, where there is still something to call."""
        owner = self._owner() if self._owner is not None else None
        if owner is not None and self._function is not None:
            self._function(owner, *arguments)

    def __reduce__(self) -> tuple[type["WeakHook"], tuple[()]]:
        return WeakHook, ()


class PlainState:
    """What copies of a module are made of: its state without the hooks and attributes of this package.

    So copies, by ``copy``, ``deepcopy`` or pickle, are what they would be without it: tools that take modules apart
    (quantization, TorchScript) find nothing of it, and a copy can be loaded where it is not installed.

    Args:
        module: held weakly.
        hooks: the numbers of the hooks that were registered with it.

    >>> import copy
    >>> layer = nn.Linear(2, 2)
    >>> PlainState.put(layer, [layer.register_forward_pre_hook(print)])
    >>> len(layer._forward_pre_hooks), len(copy.deepcopy(layer)._forward_pre_hooks)
    (1, 0)
    """

    # Python asks the module itself for it, before its class.
    _NAME: Final = "__getstate__"

    def __init__(self, module: nn.Module, hooks: Collection[int]) -> None:
        self._module = weakref.ref(module)
        self._hooks = hooks

    @classmethod
    def put(cls, module: nn.Module, handles: Sequence[RemovableHandle]) -> None:
        """Makes copies of a module plain from now on, but for what others have registered with it."""
        vars(module)[cls._NAME] = cls(module, {handle.id for handle in handles})

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        """Undoes :meth:`put`."""
        vars(module).pop(cls._NAME, None)

    def __call__(self) -> Any:
        """The state of the module, as its class makes it."""
        module = self._module()
        # Before Python 3.11 most classes have none.
        state = getattr(type(module), self._NAME, vars)(module)
        if not isinstance(state, dict):
            return state
        return {
            key: self._without_ours(value) if key.endswith(_HOOKS) else value
            for key, value in state.items()
            if key != self._NAME and not key.startswith(_OURS)
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> "PlainState":
        # Where the class copies attributes by itself, as under parametrisations.
        return PlainState(memo[id(self._module())], self._hooks)

    def _without_ours(self, hooks: dict[int, Any]) -> dict[int, Any]:
        return OrderedDict((number, hook) for number, hook in hooks.items() if number not in self._hooks)
