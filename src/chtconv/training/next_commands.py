"""Commands to type next, made from the one that was typed."""

import shlex
from collections.abc import Sequence

from chtconv.methods import METHODS
from chtconv.training.config import DENSE, Config
from chtconv.training.options import typed
from chtconv.training.recipes import DEFAULT_RECIPE, recipe


def resume_command(words: Sequence[str]) -> str:
    """The command that goes on with an interrupted run.

    >>> resume_command(["train", "--out", "my run", "--overwrite"])
    "chtconv train --out 'my run' --resume"
    """
    kept = [word for word in words if word not in ("--resume", "--overwrite")]
    return shlex.join(["chtconv", *kept, "--resume"])


def next_command(words: Sequence[str], config: Config) -> str:
    """The command that gives the run to compare with: SET, or CHTs where SET was trained.

    Args:
        words: that were typed; of a run that was resumed, they need not say more than its folder.
        config: of the run.

    >>> next_command(["train", "--out", "run", "--resume"], Config().replace(seed=3))
    'chtconv train --seed 3 --method set --out run-set'
    >>> next_command(["train"], Config().replace(method="granet", allocation="model"))
    'chtconv train --method set'
    >>> next_command(["train"], Config().replace(method="granet", allocation="model", density="sigmoid"))
    'chtconv train --allocation model --density sigmoid --method set --initial-sparsity 0.5'
    >>> next_command(["train"], Config().replace(method="dense", density="cubic", lr=0.2))
    'chtconv train --lr 0.2 --method set'
    """
    topology = config.topology
    method = topology.method
    other = "chts" if method == "set" else "set"
    name, out = _value(words, "--recipe"), _value(words, "--out")
    start = ["--recipe", name] if name else []
    folder = ["--out", f"{out.rstrip('/')}-{other}"] if out else []
    # A dense run has no sparsity that the other one could share.
    own = {"method"} | ({"sparsity"} if method == DENSE else set())
    begin: list[str] = []
    if method == DENSE or topology.density in (None, "constant"):
        # A course that the method brings along stays with it, and what is possible only with one.
        own |= {"density", "initial_sparsity"} | ({"allocation"} if topology.allocation == "model" else set())
    elif topology.initial_sparsity is None:
        begin = typed("initial_sparsity", METHODS[method].initial_sparsity)
    changed = config.differences(recipe(name or DEFAULT_RECIPE))
    settings = [word for name, (value, _) in changed.items() if name not in own for word in typed(name, value)]
    return shlex.join(["chtconv", "train", *start, *settings, "--method", other, *begin, *folder])


def _value(words: Sequence[str], option: str) -> str | None:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == option:
            return following
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None
