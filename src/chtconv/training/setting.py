"""One value of a run's configuration: its type, what is accepted, how it reads on the command line."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal

from chtconv.errors import ConfigurationError, unknown

Kind = Literal["text", "whole", "real", "switch"]
_KINDS: Final[dict[Kind, tuple[type, ...]]] = {"text": (str,), "whole": (int,), "real": (int, float), "switch": (bool,)}
_PARSERS: Final[dict[Kind, Callable[[str], object]]] = {
    "text": str, "whole": int, "real": float, "switch": {"yes": True, "no": False}.__getitem__,
}  # fmt: skip
_WORDS: Final[dict[Kind, str]] = {"text": "text", "whole": "a whole number", "real": "a number", "switch": "yes or no"}

_FINITE: Final = 3e38  # what float32 holds


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a field of the configuration accepts.

    Attributes:
        help: one line for ``--help``.
        kind: "text", "whole" (int), "real" (float) or "switch" (bool).
        accepted: the range in words, as an error says it.
        fits: whether a value of the right type lies in the range.
        choices: the accepted names, where only names of a table are; looked up when needed.
        optional: whether None is accepted too ("none" on the command line).
    """

    help: str
    kind: Kind
    accepted: str = ""
    fits: Callable[[Any], bool] = lambda _: True
    choices: Callable[[], Iterable[str]] | None = None
    optional: bool = False

    def field(self, default: Any) -> Any:
        """A dataclass field with this setting and a default value."""
        return dataclasses.field(default=default, metadata={"setting": self})

    def check(self, name: str, value: object) -> None:
        """Refuse a value.

        Raises:
            ConfigurationError: naming the field ``name``, the value and what is accepted.
        """
        if value is None and self.optional:
            return
        right_type = isinstance(value, _KINDS[self.kind]) and (self.kind == "switch" or not isinstance(value, bool))
        if right_type and self.choices is not None and value not in list(self.choices()):
            raise unknown(name, value, self.choices())
        if not right_type or not self.fits(value):
            raise ConfigurationError(f"{name}={value!r}: accepted is {self.words}.")

    def parse(self, name: str, text: str) -> object:
        """The value that ``text`` stands for on the command line.

        Raises:
            ConfigurationError: naming the field ``name``, the text and what is accepted.
        """
        if self.optional and text.lower() == "none":
            return None
        try:
            return _PARSERS[self.kind](text)
        except (ValueError, KeyError):
            raise ConfigurationError(f"{name}={text!r}: accepted is {self.words}.") from None

    def read(self, name: str, value: object) -> object:
        """A value as a file gives it: text stands for what it stands for on the command line.

        Raises:
            ConfigurationError: naming the field ``name``, the value and what is accepted.

        >>> switch("mirror images").read("flip", "yes"), switch("mirror images").read("flip", True)
        (True, True)
        """
        found = self.parse(name, value) if isinstance(value, str) else value
        self.check(name, found)
        return found

    @property
    def words(self) -> str:
        """What is accepted, in words.

        >>> share("of all links", least=0).words
        'a number, at least 0 and below 1'
        """
        parts = [_WORDS[self.kind], *([self.accepted] if self.accepted else [])]
        return ", ".join(parts) + (", or none" if self.optional else "")


def text(help: str) -> Setting:
    """Any text but the empty one."""
    return Setting(help, "text", "not empty", bool)


def choice(help: str, names: Callable[[], Iterable[str]], *, optional: bool = False) -> Setting:
    """One of the names of a table."""
    return Setting(help, "text", choices=names, optional=optional)


def switch(help: str) -> Setting:
    """Yes or no: ``--name`` and ``--no-name``."""
    return Setting(help, "switch")


def whole(help: str, least: int, most: float = math.inf, *, optional: bool = False) -> Setting:
    """A whole number from ``least`` on, up to ``most``."""
    words = f"at least {least}" if most == math.inf else f"at least {least} and at most {most}"
    return Setting(help, "whole", words, lambda value: least <= value <= most, optional=optional)


def positive(help: str, most: float = _FINITE) -> Setting:
    """A finite number above zero."""
    words = "above 0" if most == _FINITE else f"above 0 and at most {most:g}"
    return Setting(help, "real", words, lambda value: 1 / _FINITE <= value <= most)


def nonnegative(help: str, *, optional: bool = False) -> Setting:
    """A finite number, zero or above."""
    # Not math.isfinite, which an integer of TOML may be too long for.
    return Setting(help, "real", "at least 0", lambda value: 0 <= value <= _FINITE, optional=optional)


def share(help: str, *, least: float | None = None, whole_too: bool = False, optional: bool = False) -> Setting:
    """A share between 0 and 1: with 0 only if ``least`` is 0, with 1 only if ``whole_too``."""
    low, high = ("above 0" if least is None else f"at least {least:g}"), ("at most 1" if whole_too else "below 1")

    def fits(value: float) -> bool:
        above = value > 0 if least is None else value >= least
        return above and (value <= 1 if whole_too else value < 1)

    return Setting(help, "real", f"{low} and {high}", fits, optional=optional)
