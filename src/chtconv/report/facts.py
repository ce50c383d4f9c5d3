"""What was run, in words: configuration, hardware, versions, commits and dates of the runs of a comparison."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from chtconv.comparison.paper import TITLES
from chtconv.report.naming import dataset_name
from chtconv.report.provenance import commits, dates, distinct, environments, hardware, versions
from chtconv.report.run import Comparison, Row, Run, State, number, table
from chtconv.training.config import SECTIONS

STATES: Final[dict[State, str]] = {
    "done": "done", "running": "running", "stopped": "stopped", "failed": "failed", "waiting": "not begun",
    "unreadable": "unreadable",
}  # fmt: skip
_MOST_VALUES: Final = 12


@dataclass(frozen=True)
class Facts:
    """What stands at the head of a comparison.

    Attributes:
        title: data set, network and epochs.
        lines: pairs of a name and what there is to say.
        shared: values of the configuration that are the same for all runs, by section.
        warnings: what makes the comparison less than clean.
    """

    title: str
    lines: Sequence[tuple[str, str]]
    shared: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    warnings: Sequence[str]


def facts(comparison: Comparison) -> Facts:
    """The facts of a comparison, from whatever its runs wrote down."""
    configs = [{**run.config, "dataset": dataset_name(run)} for run in comparison.runs if run.config]
    lines = [
        ("runs", counted(comparison.runs)),
        ("data", "; ".join(_data(comparison.done))),
        ("network", "; ".join(distinct(_network(config) for config in configs if "model" in config))),
        ("training", "; ".join(distinct(_training(config) for config in configs if "optimizer" in config))),
        (
            "varied",
            "; ".join(f"{name.replace('_', ' ')} {', '.join(found)}" for name, found in _varying(configs).items()),
        ),
        ("hardware", "; ".join(hardware(comparison.done))),
        ("versions", "; ".join(versions(comparison.done))),
        ("source", "; ".join(commits(comparison.done))),
        ("dates", dates(comparison.done)),
    ]
    return Facts(_title(comparison), [line for line in lines if line[1]], _shared(configs), _warnings(comparison))


def counted(runs: Iterable[Run]) -> str:
    """How many runs are in which state.

    >>> from pathlib import Path
    >>> counted([Run("a", Path("a"), "done"), Run("b", Path("b"), "failed"), Run("c", Path("c"), "done")])
    '2 done, 1 failed'
    """
    found = Counter(run.state for run in runs)
    return ", ".join(f"{found[state]} {words}" for state, words in STATES.items() if found[state])


def shown(value: Any) -> str:
    """A value of the configuration as people read it.

    >>> shown(0.0005), shown(None), shown(True)
    ('0.0005', 'none', 'yes')
    """
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _title(comparison: Comparison) -> str:
    known = next((run for run in comparison.runs if run.config), None)
    if known is None:
        return comparison.title or "runs"
    data = dataset_name(known)
    model, width, epochs = (known.config.get(name) for name in ("model", "width", "epochs"))
    return f"{TITLES.get(data, data)}, {model} at width {shown(width)}, {shown(epochs)} epochs"


def _data(runs: Iterable[Run]) -> list[str]:
    found = []
    for run in runs:
        sizes = table(run.summary, "dataset")
        numbers = {name: number(sizes, name) for name in ("train", "validation", "test", "classes")}
        words = ", ".join(f"{value:,.0f} {_IMAGES[name]}" for name, value in numbers.items() if value)
        found.append(f"{dataset_name(run)}: {words}" if words else dataset_name(run))
    return distinct(found)


_IMAGES: Final = {
    "train": "training images", "validation": "held out", "test": "test images", "classes": "classes"
}  # fmt: skip


def _network(config: Row) -> str:
    head = f", head {shown(config['head'])}" if config.get("head") is not None else ""
    return f"{shown(config.get('model'))} at width {shown(config.get('width'))}{head}"


def _training(config: Row) -> str:
    value = {name: shown(config.get(name)) for name in ("epochs", "optimizer", "lr", "batch_size", "schedule")}
    return (
        f"{value['epochs']} epochs, {value['optimizer']}, learning rate {value['lr']} ({value['schedule']}), "
        f"batches of {value['batch_size']}"
    )


def _varying(configs: Sequence[Row]) -> dict[str, list[str]]:
    """Values of topology and seed that differ between runs."""
    names = [*SECTIONS["topology"], "seed"]
    found = {name: _sorted(config[name] for config in configs if name in config) for name in names}
    return {
        name: [*values[:_MOST_VALUES], *(["..."] if len(values) > _MOST_VALUES else [])]
        for name, values in found.items()
        if len(values) > 1
    }


def _sorted(values: Iterable[Any]) -> list[str]:
    found = {shown(value): value for value in values}
    return sorted(found, key=lambda text: (isinstance(found[text], str), _size(found[text]), text))


def _size(value: Any) -> float:
    return value if isinstance(value, int | float) else 0.0


def _shared(configs: Sequence[Row]) -> list[tuple[str, list[tuple[str, str]]]]:
    found = []
    for section, settings in SECTIONS.items():
        values = [(name, distinct(shown(each[name]) for each in configs if name in each)) for name in settings]
        alike = [(name.replace("_", " "), texts[0]) for name, texts in values if len(texts) == 1]
        if alike:
            found.append((section, alike))
    return found


def _warnings(comparison: Comparison) -> list[str]:
    runs, found = comparison.done, list(comparison.notes)
    if any(run.state != "done" for run in comparison.runs):
        found.append("Not all runs are complete: means may change.")
    seeds = {tuple(sorted({run.seed or 0 for run in group.done})) for group in comparison.groups if group.done}
    if len(seeds) > 1:
        found.append("Variants have different seeds so far; differences are paired by the seeds that both have.")
    if len(versions(runs)) > 1:
        found.append("Runs were made with different versions.")
    made_from = [table(each, "commit") for run in runs for each in environments(run)]
    revisions = [each.get("revision") for each in made_from]
    if len(set(map(str, filter(None, revisions)))) > 1:
        found.append("Runs were made from different commits of the source.")
    if any(each.get("dirty") for each in made_from):
        found.append("Some runs were made from source with uncommitted changes.")
    if len(hardware(runs)) > 1:
        found.append("Runs were made on different hardware, threads or precision: do not compare their times.")
    return found
