"""The command line: one parser for all commands, and what becomes of an error."""

import argparse
import difflib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from chtconv.comparison import command as compare
from chtconv.errors import ConfigurationError, telling
from chtconv.explain import command as explain
from chtconv.report import command as report
from chtconv.training import TrainingDiverged
from chtconv.training import command as train
from chtconv.training.environment import package_version


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    The exit code is 0, 2 for anything that was refused or failed, 130 after Ctrl-C, 141 where nobody reads on what is
    printed, as in ``| head``; ``compare`` and ``table1`` have more, see :mod:`chtconv.comparison.command`.
    """
    _make_printable()
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    options = parser.parse_args(words)
    try:
        # They look like our errors: where in the code they come from is nothing to the user of a command.
        with telling(lambda message: print(f"chtconv: warning: {message}", file=sys.stderr)):
            code = _run(options, words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python would complain once more at its end, when what is left cannot be printed either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ConfigurationError, TrainingDiverged) as error:
        return _fail(str(error))
    except OSError as error:
        # Those of this package have a text of their own, and no name beside it.
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("chtconv: interrupted", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        # torch raises a plain RuntimeError where the memory of the CPU does not suffice.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            return _fail("the memory does not suffice: a smaller network, batch or --shape needs less")
        raise


def _make_printable() -> None:
    """Printing may not fail: not for a name that the terminal cannot show, and not where a stream is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what this command does not know, with the nearest of its own options."""
        found, strange = super().parse_known_args(args, namespace)
        if strange:
            self.error(_unknown(strange[0], list(self._option_string_actions), self.prog))
        return found, strange

    def error(self, message: str) -> NoReturn:
        print(f"chtconv: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; a value that was not given is absent from what it returns."""
    parser = _Parser(prog="chtconv", description=sys.modules["chtconv"].__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"chtconv {package_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    train.add_command(commands)
    compare.add_commands(commands)
    report.add_command(commands)
    explain.add_command(commands)
    return parser


def _run(options: argparse.Namespace, words: list[str]) -> int:
    if options.command == "train":
        return train.train_command(options, words)
    if options.command == "explain":
        return explain.explain_command(options)
    if options.command == "report":
        return report.report_command(options)
    return compare.compare_command(options)


def _unknown(word: str, known: Sequence[str], command: str) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}: '{command} --help' says what is accepted."
    close = difflib.get_close_matches(word.partition("=")[0], known, n=1)
    guess = f"did you mean {close[0]!r}?" if close else f"'{command} --help' lists them."
    return f"unknown option {word!r}: {guess}"


def _fail(message: str) -> int:
    print(f"chtconv: error: {message}", file=sys.stderr)
    return 2
