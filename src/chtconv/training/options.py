"""The configuration as options of the command line."""

import argparse
from collections.abc import Collection, Mapping
from typing import Any, Final

from chtconv.training.config import SECTIONS, SETTINGS
from chtconv.training.setting import Setting

_METAVARS: Final = {"text": "NAME", "whole": "N", "real": "F"}


def add_settings(
    command: Any,
    defaults: Mapping[str, Any],
    *,
    several: Mapping[str, str] | None = None,
    without: Collection[str] = (),
) -> None:
    """Adds an option for each value of the configuration, in groups; one that is not given is absent.

    Args:
        command: the parser.
        defaults: what the help says is taken where an option is not given.
        several: values of which any number is accepted, with the name of their option.
        without: values that get no option.
    """
    several = several or {}
    for section, settings in SECTIONS.items():
        group = command.add_argument_group(section)
        for name, setting in settings.items():
            if name in without:
                continue
            _add(group, name, setting, defaults[name], several.get(name))


def option(name: str) -> str:
    """The option for a name.

    >>> option("evolutions_per_epoch")
    '--evolutions-per-epoch'
    """
    return "--" + name.replace("_", "-")


def typed(name: str, value: object) -> list[str]:
    """The words of a command line that give a setting its value.

    >>> typed("flip", False), typed("lr", 0.1)
    (['--no-flip'], ['--lr', '0.1'])
    """
    if isinstance(value, bool):
        return [option(name if value else f"no_{name}")]
    return [option(name), _shown(value)]


def given(options: argparse.Namespace, names: Collection[str] = tuple(SETTINGS)) -> dict[str, Any]:
    """The values that were given, by name; of those that accept several, lists.

    Raises:
        ConfigurationError: for text that is no value of its kind.
    """
    return {name: _parsed(name, value) for name, value in vars(options).items() if name in names}


def _parsed(name: str, value: Any) -> Any:
    setting = SETTINGS[name]
    if isinstance(value, list):
        return [_parsed(name, each) for each in value]
    return value if setting.kind == "switch" and isinstance(value, bool) else setting.parse(name, value)


def _add(group: Any, name: str, setting: Setting, default: object, plural: str | None) -> None:
    names = f": {', '.join(setting.choices())}" if setting.choices else ""
    if setting.kind == "switch" and plural is None:
        group.add_argument(
            option(name),
            action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS,
            help=f"{setting.help} ({'yes' if default else 'no'})",
        )
        return
    shown = " ".join(map(_shown, default)) if isinstance(default, list | tuple) else _shown(default)
    text = f"{setting.help}{names} ({shown})".replace("%", "%%")
    metavar = _METAVARS.get(setting.kind, "yes|no")
    options: dict[str, Any] = {"metavar": metavar, "default": argparse.SUPPRESS, "help": text}
    if plural is not None:
        options |= {"nargs": "+", "action": "extend", "dest": name}
    group.add_argument(option(plural or name), **options)


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return "none" if default is None else str(default)
