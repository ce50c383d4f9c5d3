"""What runs were made with: hardware, versions, commits of the source, and when."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from chtconv.report.run import Run, table


def environments(run: Run) -> Iterator[Mapping[str, Any]]:
    """What a run was computed with: that of its last process, then those of others that computed part of it."""
    yield run.summary
    earlier = run.summary.get("earlier")
    if isinstance(earlier, list):
        yield from (each for each in earlier if isinstance(each, dict))


def hardware(runs: Iterable[Run]) -> list[str]:
    """Processor with its instruction set, or GPU, threads and precision of each run, what is the same once."""
    return distinct(
        _machine(table(each, "hardware"), run.config.get("precision")) for run in runs for each in environments(run)
    )


def _machine(known: Mapping[str, Any], precision: Any) -> str:
    device, cpu, threads = (known.get(name) for name in ("device", "cpu", "threads"))
    # Processors of several generations go by one name on rented machines.
    cpu = f"{cpu} with {known['instructions']}" if "instructions" in known else cpu
    where = f"{cpu}, {threads} thread{'' if threads == 1 else 's'}" if device == "cpu" else f"{device} ({cpu})"
    return f"{where}, {precision}" if known else ""


def versions(runs: Iterable[Run]) -> list[str]:
    """Versions of what runs were made with."""
    tables = (table(each, "versions") for run in runs for each in environments(run))
    return distinct(", ".join(f"{name} {version}" for name, version in each.items()) for each in tables)


def commits(runs: Iterable[Run]) -> list[str]:
    """Commits of the source that runs were made from."""
    tables = (table(each, "commit") for run in runs for each in environments(run))
    return distinct(
        f"commit {str(each.get('revision'))[:10]}{' with changes' if each.get('dirty') else ''}"
        for each in tables
        if each
    )


def dates(runs: Sequence[Run]) -> str:
    """When the first run began and the last one ended."""
    started = sorted(str(run.summary["started"]) for run in runs if run.summary.get("started"))
    finished = sorted(str(run.summary["finished"]) for run in runs if run.summary.get("finished"))
    return f"{_moment(started[0])} to {_moment(finished[-1])} UTC" if started and finished else ""


def _moment(text: str) -> str:
    """A moment of ISO 8601 as people read it, in UTC; other text as it is.

    >>> _moment("2026-11-24T04:15:06+01:00"), _moment("yesterday")
    ('2026-11-24 03:15', 'yesterday')
    """
    try:
        return datetime.fromisoformat(text).astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError):
        return text


def distinct(texts: Iterable[str]) -> list[str]:
    """The texts in their order, each once, without empty ones.

    >>> distinct(["b", "a", "", "b"])
    ['b', 'a']
    """
    return [text for text in dict.fromkeys(texts) if text]
