"""What was run, in words: configuration, hardware, versions, commits and dates of the runs of a comparison."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final

from chtconv.comparison.paper import TITLES
from chtconv.report.naming import dataset_name
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
        ("network", "; ".join(_distinct(_network(config) for config in configs))),
        ("training", "; ".join(_distinct(_training(config) for config in configs))),
        (
            "varied",
            "; ".join(f"{name.replace('_', ' ')} {', '.join(found)}" for name, found in _varying(configs).items()),
        ),
        ("hardware", "; ".join(_hardware(comparison.done))),
        ("versions", "; ".join(_versions(comparison.done))),
        ("source", "; ".join(_commits(comparison.done))),
        ("dates", _dates(comparison.done)),
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
    return _distinct(found)


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
    found = {name: _sorted(config.get(name) for config in configs) for name in names}
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
        values = [(name, _distinct(shown(config.get(name)) for config in configs)) for name in settings]
        alike = [(name.replace("_", " "), texts[0]) for name, texts in values if len(texts) == 1]
        if alike:
            found.append((section, alike))
    return found


def _hardware(runs: Iterable[Run]) -> list[str]:
    found = []
    for run in runs:
        hardware, precision = table(run.summary, "hardware"), run.config.get("precision")
        device, cpu, threads = (hardware.get(name) for name in ("device", "cpu", "threads"))
        where = f"{cpu}, {threads} thread{'' if threads == 1 else 's'}" if device == "cpu" else f"{device} ({cpu})"
        found.append(f"{where}, {precision}" if hardware else "")
    return _distinct(found)


def _versions(runs: Iterable[Run]) -> list[str]:
    tables = (table(run.summary, "versions") for run in runs)
    return _distinct(", ".join(f"{name} {version}" for name, version in each.items()) for each in tables)


def _commits(runs: Iterable[Run]) -> list[str]:
    tables = (table(run.summary, "commit") for run in runs)
    return _distinct(
        f"commit {str(each.get('revision'))[:10]}{' with changes' if each.get('dirty') else ''}"
        for each in tables
        if each
    )


def _dates(runs: Sequence[Run]) -> str:
    started = sorted(str(run.summary["started"]) for run in runs if run.summary.get("started"))
    finished = sorted(str(run.summary["finished"]) for run in runs if run.summary.get("finished"))
    return f"{_moment(started[0])} to {_moment(finished[-1])} UTC" if started and finished else ""


def _moment(text: str) -> str:
    """A moment of ISO 8601 as people read it, in UTC; other text as it is.

    >>> _moment("2026-11-24T04:15:06+01:00"), _moment("yesterday")
    ('2026-11-24 03:15', 'yesterday')
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M")


def _warnings(comparison: Comparison) -> list[str]:
    runs, found = comparison.done, list(comparison.notes)
    if any(run.state != "done" for run in comparison.runs):
        found.append("Not all runs are complete: means may change.")
    seeds = {tuple(sorted({run.seed or 0 for run in group.done})) for group in comparison.groups if group.done}
    if len(seeds) > 1:
        found.append("Variants have different seeds so far; differences are paired by the seeds that both have.")
    if len(_versions(runs)) > 1:
        found.append("Runs were made with different versions.")
    if len(_commits(runs)) > 1:
        found.append("Runs were made from different commits of the source.")
    if any(table(run.summary, "commit").get("dirty") for run in runs):
        found.append("Some runs were made from source with uncommitted changes.")
    if len(_hardware(runs)) > 1:
        found.append("Runs were made on different hardware, threads or precision: do not compare their times.")
    return found


def _distinct(texts: Iterable[str]) -> list[str]:
    return [text for text in dict.fromkeys(texts) if text]
