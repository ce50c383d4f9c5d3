"""Hooks that do not own what they call: a model with them can be copied and pickled like any other."""

import weakref
from collections.abc import Callable
from typing import Any


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
