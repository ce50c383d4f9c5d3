"""What users get to see when something they asked for cannot be done."""

import contextlib
import difflib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any


class ConfigurationError(ValueError):
    """A value that cannot be used: the message names it and says what would be accepted."""


class RuleError(ConfigurationError):
    """What a rule of removal or regrowth gave cannot be used: the message goes on after layer and rule."""


class ChtconvWarning(UserWarning):
    """Something works, but differently from what one may expect."""


@contextlib.contextmanager
def telling(tell: Callable[[str], object]) -> Iterator[None]:
    """Hands the text of our own warnings to ``tell``; all others are shown as always.

    >>> with telling(lambda message: print("warning:", message)), warnings.catch_warnings():
    ...     warnings.simplefilter("always")
    ...     warnings.warn("every score is 0", ChtconvWarning)
    warning: every score is 0
    """
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_ours(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, ChtconvWarning):
                tell(str(message))
            else:
                show(message, category, *place, **more)

        warnings.showwarning = show_ours
        yield


def unknown(kind: str, name: object, accepted: Iterable[str]) -> ConfigurationError:
    """The error for a name that is not in a table, with the nearest match.

    >>> print(unknown("method", "chtss", ["set", "cht", "chts"]))
    unknown method 'chtss': did you mean 'chts'? Accepted: 'set', 'cht', 'chts'.
    >>> print(unknown("variant", "set, erk", ["SET", "SET, ERK"]))
    unknown variant 'set, erk': did you mean 'SET, ERK'? Accepted: 'SET', 'SET, ERK'.
    """
    names, typed = list(accepted), str(name).lower()
    lowered = {each.lower(): each for each in reversed(names)}
    begun = [each.lower() for each in names if typed and each.lower().startswith(typed)]
    close = [typed] if typed in lowered else begun or difflib.get_close_matches(typed, lowered, n=1, cutoff=0.5)
    guess = f"did you mean {lowered[close[0]]!r}? " if close else ""
    return ConfigurationError(f"unknown {kind} {name!r}: {guess}Accepted: {', '.join(map(repr, names))}.")


def check_name(kind: str, name: object, accepted: Collection[str]) -> None:
    """Refuses what is no name in a table, of whatever type it is.

    Raises:
        ConfigurationError: with the nearest match.
    """
    if not isinstance(name, str) or name not in accepted:
        raise unknown(kind, name, accepted)
