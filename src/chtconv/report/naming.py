"""Which runs of a folder are compared with which, and how they are called, where nobody wrote it down."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from chtconv.comparison.cell import METHOD_NAMES
from chtconv.comparison.result import identity
from chtconv.comparison.rows import SHARED, told_apart
from chtconv.errors import ConfigurationError
from chtconv.report.run import Comparison, Run
from chtconv.training.config import DENSE, SECTIONS, Config

_USUAL = Config().to_dict()
_VARYING = [name for name in SECTIONS["topology"] if name not in ("method", "sparsity")]


def comparisons_of(runs: Sequence[Run], *, together: bool = False) -> list[Comparison]:
    """Runs by what they share: data, network and optimisation; each named after the values in which it differs.

    Args:
        runs: those without a variant get a name. What was run twice counts once: the later one, as in the tables.
        together: they are one comparison, whatever they share.
    """
    named = _with_variants(runs)
    if together:
        return [_compared("", named)] if named else []
    groups: dict[Hashable, list[Run]] = {}
    for run in named:
        groups.setdefault(tuple(_value(run, name) for name in SHARED), []).append(run)
    known = [key for key, members in groups.items() if members[0].config]
    differing = [name for index, name in enumerate(SHARED) if len({key[index] for key in known}) > 1]  # type: ignore[index]
    return [_compared(_title(members[0], differing), members) for members in groups.values()]


def brief(comparison: Comparison) -> tuple[Comparison, str]:
    """The comparison with names of variants without what those of all sparse runs have in common, and what that is.

    >>> names = ("CHTs, allocation layer", "CHTs, allocation layer, all windows")
    >>> runs = [Run("", PurePath(), "done", variant=name, config={"method": "chts"}) for name in names]
    >>> found, common = brief(Comparison("", runs))
    >>> [run.variant for run in found.runs], common
    (['CHTs', 'CHTs, all windows'], 'allocation layer')
    """
    parts = {run.variant: run.variant.split(", ") for run in comparison.runs if run.method not in ("", DENSE)}
    first = next(iter(parts.values()), [])
    common = [part for part in first[1:] if all(part in others[1:] for others in parts.values())]
    names = {name: ", ".join(part for part in known if part not in common) for name, known in parts.items()}
    if len(names) < 2 or len(set(names.values())) < len(names):
        return comparison, ""
    runs = [replace(run, variant=names.get(run.variant, run.variant)) for run in comparison.runs]
    return replace(comparison, runs=runs), ", ".join(common)


def dataset_name(run: Run) -> str:
    """The last component of the data set's name: a path says where it lay, which is nobody's business."""
    return PurePath(str(run.config.get("dataset", ""))).name


def _compared(title: str, runs: Sequence[Run]) -> Comparison:
    """A comparison of runs, of which those that are of one run count once, and no two look the same and are not."""
    known = [(run, _identity(run)) for run in runs]
    latest = {tuple(values.values()): run for run, values in known if values}
    settings: dict[Hashable, list[dict[str, Any]]] = {}
    for run, values in known:
        if values:
            settings.setdefault((run.variant, run.sparsity), []).append(_but_seed(values))
    kept, notes = [], []
    for run, values in known:
        last = latest.get(tuple(values.values()), run)
        if last is run:
            others = settings.get((run.variant, run.sparsity), [])
            kept.append(replace(run, variant=told_apart(run.variant, _but_seed(values), others)))
        else:
            notes.append(f"{run.name} is left out: {last.name} is the same run.")
    return Comparison(title, kept, notes)


def _but_seed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "seed"}


def _identity(run: Run) -> dict[str, Any]:
    """What makes a complete run the run that it is; empty for others, which are in no table."""
    try:
        return identity(run.config) if run.state == "done" else {}
    except (ConfigurationError, TypeError, ValueError):
        return {}


def _title(run: Run, differing: Sequence[str]) -> str:
    if not run.config:
        return "runs of unknown configuration"
    parts = [dataset_name(run), str(run.config.get("model", ""))]
    parts += [
        f"{name.replace('_', ' ')} {run.config.get(name)}" for name in differing if name not in ("dataset", "model")
    ]
    return ", ".join(part for part in parts if part)


def _with_variants(runs: Sequence[Run]) -> list[Run]:
    return [run if run.variant else replace(run, variant=_variant(run, runs)) for run in runs]


def _variant(run: Run, runs: Iterable[Run]) -> str:
    """The method, and those values of the topology in which runs of that method differ."""
    if not run.method:
        return ""
    name = METHOD_NAMES.get(run.method, run.method)
    if run.method == DENSE:
        return name
    same = [other for other in runs if other.method == run.method]
    differing = [each for each in _VARYING if len({_value(other, each) for other in same}) > 1]
    return ", ".join([name, *(_words(each, run.config.get(each)) for each in differing)])


def _words(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name.replace("_", " ") if value else f"no {name.replace('_', ' ')}"
    return f"{value} graph" if name == "graph" else f"{name.replace('_', ' ')} {value}"


def _value(run: Run, name: str) -> Hashable:
    """A value of the configuration that can be compared, whatever somebody put there."""
    if name == "dataset":
        return dataset_name(run)
    # What an older run lacks has its usual value.
    return repr(run.config.get(name, _USUAL[name] if run.config else None))
