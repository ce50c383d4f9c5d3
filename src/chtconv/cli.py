"""The command line: ``chtconv train`` and ``chtconv explain``."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from chtconv.errors import ConfigurationError
from chtconv.explain import command as explain
from chtconv.training import RECIPES, Config, RunFolder, StorageError, TrainingDiverged, recipe, train
from chtconv.training.commands import next_command, resume_command
from chtconv.training.config import DENSE, SECTIONS, SETTINGS
from chtconv.training.environment import package_version
from chtconv.training.progress import Bar, Lines
from chtconv.training.report import report
from chtconv.training.run_folder import default_out
from chtconv.training.setting import Setting

_METAVARS = {"text": "NAME", "whole": "N", "real": "F"}
_DEFAULT_RECIPE = "quick"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 2 for anything that was refused or failed, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    options, unknown_words = parser.parse_known_args(words)
    if unknown_words:
        parser.error(_unknown_option(unknown_words[0], options.command))
    try:
        return explain.explain_command(options) if options.command == "explain" else _train(options, words)
    except (ConfigurationError, TrainingDiverged, StorageError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("chtconv: interrupted", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        # torch raises a plain RuntimeError where the memory of the CPU does not suffice.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            return _fail("the memory does not suffice: a smaller network, batch or --shape needs less")
        raise


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"chtconv: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; a value that was not given is absent from what it returns."""
    parser = _Parser(prog="chtconv", description=sys.modules["chtconv"].__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"chtconv {package_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = commands.add_parser(
        "train",
        help="train a sparse network and write the run to a folder",
        description="Train a sparse network and write the run to a folder. A recipe gives every value that no option "
        "sets; in brackets, those of the recipe 'quick'.",
        allow_abbrev=False,
    )
    command.add_argument(
        "--recipe", metavar="NAME", help=f"where values come from: {', '.join(RECIPES)} ({_DEFAULT_RECIPE})"
    )
    command.add_argument("--out", metavar="DIR", help="folder of the run (runs/DATASET-MODEL-METHOD-SPARSITY-seedN)")
    command.add_argument("--resume", action="store_true", help="go on with the run in the folder, after its last epoch")
    command.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    defaults = recipe(_DEFAULT_RECIPE).to_dict()
    for section, settings in SECTIONS.items():
        group = command.add_argument_group(section)
        for name, setting in settings.items():
            _add_option(group, name, setting, defaults[name])
    explain.add_command(commands)
    return parser


def _add_option(group: Any, name: str, setting: Setting, default: object) -> None:
    option = "--" + name.replace("_", "-")
    names = f": {', '.join(setting.choices())}" if setting.choices else ""
    if setting.kind == "switch":
        shown = "yes" if default else "no"
        group.add_argument(
            option,
            action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS,
            help=f"{setting.help} ({shown})",
        )
        return
    shown = "none" if default is None else str(default)
    text = f"{setting.help}{names} ({shown})".replace("%", "%%")
    group.add_argument(option, metavar=_METAVARS[setting.kind], default=argparse.SUPPRESS, help=text)


def _train(options: argparse.Namespace, words: list[str]) -> int:
    config, out = _resolve(options)
    folder = RunFolder(out)
    already = options.resume and folder.is_complete()
    sparsity = "" if config.topology.method == DENSE else f"sparsity {config.topology.sparsity:.1%}"
    print(
        f"{config.network.model} on {config.data.dataset}, {config.topology.method}{sparsity and ' at ' + sparsity}, "
        f"seed {config.machine.seed} -> {out}" + (" (complete already)" if already else ""),
        file=sys.stderr,
    )
    progress = Bar(sys.stderr, note=sparsity and f", {sparsity}") if sys.stderr.isatty() else Lines(sys.stderr)
    try:
        summary = train(config, out, resume=options.resume, overwrite=options.overwrite, progress=progress)
    except KeyboardInterrupt:
        if folder.has_checkpoint():
            message = f"the last whole epoch is kept. To go on:\n  {resume_command(words)}"
        else:
            message = "not one epoch was complete, so nothing was kept"
        print(f"chtconv: interrupted; {message}", file=sys.stderr)
        return 130
    print(report(summary, out, next_command(words, config)))
    return 0


def _resolve(options: argparse.Namespace) -> tuple[Config, Path]:
    """Configuration and folder: the recipe's values, those of the run to resume, and on top what was given."""
    given = {
        name: value if SETTINGS[name].kind == "switch" else SETTINGS[name].parse(name, value)
        for name, value in vars(options).items()
        if name in SETTINGS
    }
    config = recipe(options.recipe or _DEFAULT_RECIPE).replace(**given)
    if config.topology.method == DENSE:
        if given.get("method") == DENSE and given.get("sparsity"):
            print("chtconv: note: --method dense has no sparsity; --sparsity is ignored", file=sys.stderr)
        given["sparsity"] = 0.0
        config = config.replace(**given)
    out = Path(options.out) if options.out else default_out(config)
    if options.resume and not options.recipe and RunFolder(out).holds_run():
        config = RunFolder(out).stored_config().replace(**given)
    return config, out


def _unknown_option(word: str, command: str) -> str:
    names = explain.OPTIONS if command == "explain" else (*SETTINGS, "recipe", "out", "resume", "overwrite")
    known = ["--" + name.replace("_", "-") for name in names]
    close = difflib.get_close_matches(word.partition("=")[0], known, n=1)
    guess = f"did you mean {close[0]!r}?" if close else f"'chtconv {command} --help' lists them."
    return f"unknown option {word!r}: {guess}"


def _fail(message: str) -> int:
    print(f"chtconv: error: {message}", file=sys.stderr)
    return 2
