"""Commands to type next, made from the one that was typed."""

import shlex
from collections.abc import Sequence

from chtconv.training.config import Config


def resume_command(words: Sequence[str]) -> str:
    """The command that goes on with an interrupted run.

    >>> resume_command(["train", "--out", "my run", "--overwrite"])
    "chtconv train --out 'my run' --resume"
    """
    return shlex.join(["chtconv", *_without(words), "--resume"])


def next_command(words: Sequence[str], config: Config) -> str:
    """The command that gives the run to compare with: SET, or CHTs where SET was trained.

    >>> next_command(["train", "--out", "run", "--seed", "3"], Config())
    'chtconv train --seed 3 --method set --out run-set'
    """
    other = "chts" if config.topology.method == "set" else "set"
    out = _value(words, "--out")
    folder = ["--out", f"{out.rstrip('/')}-{other}"] if out else []
    kept = _without(words, "--out", "--method", "--initial-sparsity")
    return shlex.join(["chtconv", *kept, "--method", other, *folder])


def _without(words: Sequence[str], *options: str) -> list[str]:
    """The words but --resume, --overwrite and these options with their values."""
    kept, skip = [], False
    for word in words:
        if skip or word in ("--resume", "--overwrite"):
            skip = False
        elif word in options:
            skip = True
        elif word.partition("=")[0] not in options:
            kept.append(word)
    return kept


def _value(words: Sequence[str], option: str) -> str | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == option:
            return following
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None
