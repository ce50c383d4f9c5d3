"""What users get to see when something they asked for cannot be done."""

import difflib
from collections.abc import Iterable


class ConfigurationError(ValueError):
    """A value that cannot be used: the message names it and says what would be accepted."""


class ChtconvWarning(UserWarning):
    """Something works, but differently from what one may expect."""


def unknown(kind: str, name: object, accepted: Iterable[str]) -> ConfigurationError:
    """The error for a name that is not in a table, with the nearest match.

    >>> print(unknown("method", "chtss", ["set", "cht", "chts"]))
    unknown method 'chtss': did you mean 'chts'? Accepted: 'set', 'cht', 'chts'.
    """
    names, typed = list(accepted), str(name).lower()
    begun = [each for each in names if typed and each.startswith(typed)]
    close = begun or difflib.get_close_matches(typed, names, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return ConfigurationError(f"unknown {kind} {name!r}: {guess}Accepted: {', '.join(map(repr, names))}.")
