"""``chtconv explain``: the link scores of a run or of a random mask."""

import argparse
from pathlib import Path
from typing import Any, Final

from chtconv.errors import ConfigurationError
from chtconv.explain.figure import check_drawable, save
from chtconv.explain.layers import MaskedLayer, statistics
from chtconv.explain.report import report
from chtconv.explain.sources import layers_of_run, random_layer
from chtconv.methods import method
from chtconv.scores.api import GRAPHS, SCORES
from chtconv.training.config import DENSE, Config
from chtconv.training.setting import Setting, choice, positive, share, whole

_OPTIONS: Final[dict[str, Setting]] = {
    "predictor": choice("link predictor", lambda: SCORES),
    "graph": choice("graph that links are predicted on", lambda: GRAPHS),
    "zeta": share("share of a kernel's links that would regrow", whole_too=True),
    "tau": positive("exponent of the scores in the soft rule"),
}
_RANDOM: Final[dict[str, Setting]] = {
    "stride": whole("stride of the layer", 1),
    "padding": whole("padding of the layer in pixels", 0),
    "dilation": whole("dilation of the layer", 1),
    "groups": whole("groups of the layer", 1),
    "sparsity": share("share of the links that is absent", least=0),
    "seed": whole("seed of the mask", 0),
}
_DEFAULTS: Final[dict[str, Any]] = {
    "predictor": "ch3_l3n",
    "graph": "kernel",
    "zeta": 0.3,
    "tau": 1.0,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "sparsity": 0.9,
    "seed": 0,
}


def add_command(commands: Any) -> None:
    """Adds ``explain`` to the commands of the command line; a value that was not given is absent."""
    command = commands.add_parser(
        "explain",
        help="show what the link scores of a run, or of a random mask, reward",
        description="Show what the link scores of a complete run's masks, or of a random mask (--shape), reward: how "
        "many are 0, how often they tie, how far from random the soft rule samples, and how much two cheap rules "
        "explain. The mask is scored as it is, before any removal.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    command.add_argument("run", nargs="?", metavar="RUN", help="folder that chtconv train wrote a complete run to")
    command.add_argument("--layer", nargs="+", action="extend", metavar="NAME", help="names or wildcards (all layers)")
    for name, setting in _OPTIONS.items():
        _add(command, name, setting, note="" if name == "tau" else " or the run's own")
    command.add_argument("--out", metavar="FILE", help="draw to this .png, .pdf or .svg (needs chtconv[plot])")
    group = command.add_argument_group("random mask", "One layer without a run.")
    group.add_argument("--shape", metavar="N,...", help="of the weight: output, input channels / groups, kernel")
    group.add_argument("--input-size", metavar="N[,N...]", help="spatial size of the layer's input in pixels")
    for name, setting in _RANDOM.items():
        _add(group, name, setting)


def explain_command(options: argparse.Namespace) -> int:
    """Runs ``chtconv explain``: prints the report and draws the picture.

    Raises:
        ConfigurationError: options that do not go together, or a value that cannot be used.
        StorageError: the picture cannot be written.
    """
    given = vars(options)
    rule, random = (
        {name: _parsed(setting, name, given[name]) for name, setting in settings.items() if name in given}
        for settings in (_OPTIONS, _RANDOM)
    )
    _check_source(given)
    out = Path(given["out"]) if "out" in given else None
    if out is not None:
        check_drawable(out)
    smoothing = None
    if "run" in given:
        config, layers = layers_of_run(Path(given["run"]), given.get("layer", []))
        rule, smoothing = _of_run(config) | rule, config.topology.smoothing
    else:
        layers = {"the mask": _random(given["shape"], given.get("input_size"), _defaults(_RANDOM) | random)}
    found = statistics(layers, **_defaults(_OPTIONS) | rule)
    if not found:
        raise ConfigurationError("no layer has a disabled position, so there is nothing to score.")
    print(report(found))
    for name in [each for each in layers if each not in found]:
        print(f"{name.removesuffix('.weight')} has no disabled position, so there is nothing to score.")
    if smoothing:
        print(
            f"The run dealt {smoothing:.0%} of each kernel's scores out by the links of slices; that is not shown here."
        )
    if out is not None:
        save(found, out)
        print(f"picture: {out}")
    return 0


def _add(group: Any, name: str, setting: Setting, note: str = "") -> None:
    names = f": {', '.join(setting.choices())}" if setting.choices else ""
    metavar = {"text": "NAME", "whole": "N", "real": "F"}[setting.kind]
    group.add_argument(f"--{name}", metavar=metavar, help=f"{setting.help}{names} ({_DEFAULTS[name]}{note})")


def _parsed(setting: Setting, name: str, text: str) -> Any:
    value = setting.parse(name, text)
    setting.check(name, value)
    return value


def _defaults(settings: dict[str, Setting]) -> dict[str, Any]:
    return {name: _DEFAULTS[name] for name in settings}


def _check_source(given: dict[str, Any]) -> None:
    """A run or a random mask, and no option of the other."""
    if ("run" in given) == ("shape" in given):
        both = "both a run and --shape were given" if "run" in given else "neither a run nor --shape was given"
        raise ConfigurationError(f"{both}: accepted are the folder of a run (before any --layer) or --shape.")
    other = ["input_size", *_RANDOM] if "run" in given else ["layer"]
    for name in other:
        if name in given:
            source = "--shape" if "run" in given else "the folder of a run"
            raise ConfigurationError(f"--{name.replace('_', '-')} goes with {source} only; leave it out.")


def _of_run(config: Config) -> dict[str, Any]:
    """What the run itself went by."""
    topology = config.topology
    assert topology.method != DENSE
    own = method(topology.method, **topology.changes()).predictor
    values = {name: getattr(topology, name) for name in ("predictor", "graph", "windows", "zeta")}
    return values | ({"predictor": own} if own is not None else {})


def _random(shape_text: str, size_text: str | None, values: dict[str, Any]) -> MaskedLayer:
    shape = _whole_numbers("shape", shape_text)
    if not 2 <= len(shape) <= 5:
        raise ConfigurationError(
            f"--shape {shape_text}: accepted are output channels, input channels and up to 3 kernel axes, "
            "such as 64,64,3,3."
        )
    axes = len(shape) - 2
    if size_text is None and axes:
        raise ConfigurationError("--shape with kernel axes needs --input-size, such as --input-size 32.")
    sizes = _whole_numbers("input-size", size_text) if size_text else ()
    if len(sizes) == 1:
        sizes *= axes
    if len(sizes) != axes:
        raise ConfigurationError(f"--input-size {size_text}: accepted are one number, or one for each of {axes} axes.")
    sparsity, seed = values.pop("sparsity"), values.pop("seed")
    return random_layer(shape, sizes, sparsity, seed, values)


def _whole_numbers(name: str, text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise ConfigurationError(f"--{name} {text}: accepted are whole numbers, at least 1, with commas between.")
    return tuple(map(int, words))
