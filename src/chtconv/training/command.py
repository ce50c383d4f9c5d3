"""``chtconv train``: one run into one folder."""

import argparse
import sys
from pathlib import Path
from typing import Any

from chtconv.training.config import DENSE, Config
from chtconv.training.loop import train
from chtconv.training.next_commands import next_command, resume_command
from chtconv.training.options import add_settings, given
from chtconv.training.progress import Bar, Lines
from chtconv.training.recipes import DEFAULT_RECIPE, RECIPES, recipe
from chtconv.training.report import report
from chtconv.training.run_folder import RunFolder, default_out


def add_command(commands: Any) -> None:
    """Adds ``train`` to the commands of the command line; a value that was not given is absent."""
    command = commands.add_parser(
        "train",
        help="train a sparse network and write the run to a folder",
        description="Train a sparse network and write the run to a folder. A recipe gives every value that no option "
        "sets; in brackets, those of the recipe 'quick'.",
        allow_abbrev=False,
    )
    command.add_argument(
        "--recipe", metavar="NAME", help=f"where values come from: {', '.join(RECIPES)} ({DEFAULT_RECIPE})"
    )
    command.add_argument("--out", metavar="DIR", help="folder of the run (runs/DATASET-MODEL-METHOD-SPARSITY-seedN)")
    command.add_argument("--resume", action="store_true", help="go on with the run in the folder, after its last epoch")
    command.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    add_settings(command, recipe(DEFAULT_RECIPE).to_dict())


def train_command(options: argparse.Namespace, words: list[str]) -> int:
    """Runs ``chtconv train``: trains, prints the report, and after Ctrl-C the command that goes on.

    Raises:
        ConfigurationError: naming what cannot be used.
        TrainingDiverged: the loss is no finite number.
        StorageError: a file cannot be written.
    """
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
        if folder.has_checkpoint() and folder.is_of(config):
            message = f"the last whole epoch is kept. To go on:\n  {resume_command(words)}"
        else:
            message = "not one epoch was complete, so nothing was kept"
        print(f"chtconv: interrupted; {message}", file=sys.stderr)
        return 130
    print(report(summary, out, next_command(words, config)))
    return 0


def _resolve(options: argparse.Namespace) -> tuple[Config, Path]:
    """Configuration and folder: the recipe's values, those of the run to resume, and on top what was given."""
    values = given(options)
    config = recipe(options.recipe or DEFAULT_RECIPE).replace(**values)
    if config.topology.method == DENSE:
        if values.get("method") == DENSE and values.get("sparsity"):
            print("chtconv: note: --method dense has no sparsity; --sparsity is ignored", file=sys.stderr)
        values["sparsity"] = 0.0
        config = config.replace(**values)
    out = Path(options.out) if options.out else default_out(config)
    if options.resume and not options.recipe and RunFolder(out).holds_run():
        config = RunFolder(out).stored_config().replace(**values)
    return config, out
