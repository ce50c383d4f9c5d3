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

    def __init__(self, method: Callable[..., None] | None = None) -> None:
        self._method = weakref.WeakMethod(method) if method is not None else None

    @property
    def alive(self) -> bool:
        """Whether there is still something to call."""
        return self._method is not None and self._method() is not None

    def __call__(self, *arguments: Any) -> None:
        """Calls the method with these arguments, where there is still something to call."""
        method = self._method() if self._method is not None else None
        if method is not None:
            method(*arguments)

    def __reduce__(self) -> tuple[type["WeakHook"], tuple[()]]:
        return WeakHook, ()
