"""The result of a run in one line of JSON, what such files hold, and which lines are of the same run."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from chtconv.comparison.cell import METHOD_NAMES, one_line
from chtconv.comparison.grid import canonical
from chtconv.errors import ConfigurationError
from chtconv.training.config import Config, dataset_name

# Where a run is computed, and with which kernels: that changes how it is rounded, and not what is tried. So does
# precision, but enough to be something that one tries.
PLACEMENT: Final = ("device", "threads", "backend", "step", "optimizer_kernel")

_USUAL: Final = Config()
_IMAGES: Final = ("classes", "train", "validation", "test", "labels")


def result_line(
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    variant: str,
) -> dict[str, Any]:
    """The line of a complete run.

    Args:
        summary: the content of its summary.json.
        metrics: the rows of its metrics.jsonl, one an epoch.
        records: the rows of its evolution.jsonl; none for a dense or static run.
        variant: how people call it, such as ``"CHTs, layer graph"``.

    Returns:
        The summary without its table of layers and without the folder that the data set was in, and

        * ``variant``;
        * ``validation_accuracy``: of the last epoch, a fraction; None where no images were held out;
        * ``evolution``: ``rechosen``, the share of removed links that were chosen again at once, over the whole run;
          ``empty_slices`` and ``zero_scores``, means over layers at the last evolution; None where unknown;
        * ``curve``: ``test_accuracy`` and ``validation_accuracy``, a fraction an epoch; the second is empty where
          no images were held out.
    """
    dataset = dict(summary["dataset"])
    dataset["name"] = dataset_name(dataset["name"])
    kept = {key: value for key, value in summary.items() if key != "layers"}
    # Summaries of older runs do not say it.
    last = {"validation_accuracy": metrics[-1].get("validation_accuracy") if metrics else None}
    return (
        last
        | kept
        | {
            "variant": variant,
            "dataset": dataset,
            "config": dict(summary["config"]) | {"dataset": dataset["name"]},
            "evolution": _evolution(records),
            "curve": {key: _known(metrics, key) for key in ("test_accuracy", "validation_accuracy")},
        }
    )


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a results file, oldest first; none where there is no file.

    Raises:
        ConfigurationError: naming the file and the line that is no JSON object, or has a configuration that is none.
    """
    return [parsed(line, place) for place, line in placed_lines(Path(path))]


def placed_lines(path: Path) -> list[tuple[str, bytes]]:
    """The lines of a results file that are not empty, each with the words for its place; none where there is no file.

    They are bytes, so that one that is no text spoils no other.

    Raises:
        ConfigurationError: if it cannot be read.
    """
    if not path.exists():
        return []
    try:
        found = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    return [(f"{path}, line {number}", line) for number, line in enumerate(found, 1) if line.strip()]


def parsed(encoded: bytes, place: str) -> dict[str, Any]:
    """The result that a line of a results file holds.

    Args:
        encoded: the line.
        place: where it is, for the message.

    Raises:
        ConfigurationError: if it is no JSON object, or has a configuration that is none.
    """
    try:
        value = json.loads(encoded.decode(), parse_constant=_refused)
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"cannot read {place}: {error}") from error
    except ValueError as error:
        raise ConfigurationError(f"{place} is no JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        raise ConfigurationError(f"{place} is no result of a run: accepted is an object with its config.")
    try:
        identity(value["config"])
    except ConfigurationError as error:
        raise ConfigurationError(f"{place}, is no result of a run of this version: {error}") from error
    return value


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run the run that it is: its configuration without what cannot change what is tried.

    The data set goes by the last part of its name, what it was computed on and with is left out, and what the method
    takes no notice of has its usual value. Values that an older line lacks have their usual values too.

    Raises:
        ConfigurationError: for a name or value that no configuration has.

    >>> identity({"dataset": "uoft-cs/cifar10", "method": "set", "threads": 2})["dataset"]
    'cifar10'
    """
    return dict(_identity(json.dumps(dict(config), sort_keys=True)))


def same_run(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two configurations are of the same run, wherever its data set lay and it was computed.

    >>> same_run({"seed": 14, "device": "cuda"}, {"seed": 14, "device": "cpu"})
    True
    >>> same_run({"seed": 14, "precision": "bf16"}, {"seed": 14, "precision": "float32"})
    False
    """
    return run_key(a) == run_key(b)


def run_key(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """The :func:`identity` of a configuration as a key of dictionaries: finds a run among many at once."""
    return tuple(identity(config).values())


def distinct(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines without those of runs that a later line is of too."""
    latest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for line in lines:
        latest[run_key(line["config"])] = line
    return list(latest.values())


def images_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a line says of its images: how many there are, and the digest of their labels; older lines say less.

    >>> images_of({"dataset": {"name": "digits", "train": 1437, "test": 360}, "labels": "5a11"})
    {'train': 1437, 'test': 360, 'labels': '5a11'}
    """
    dataset = line.get("dataset")
    known = {**(dataset if isinstance(dataset, Mapping) else {}), "labels": line.get("labels")}
    return {name: known[name] for name in _IMAGES if known.get(name) is not None}


def other_images(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """In what two :func:`images_of` differ as far as both say it, in words; empty where they do not.

    >>> other_images({"train": 400, "labels": "5a11"}, {"train": 300, "test": 100})
    'train 400, not 300'
    """
    return ", ".join(
        f"{name} {mine[name]}, not {theirs[name]}"
        for name in _IMAGES
        if name in mine and name in theirs and mine[name] != theirs[name]
    )


def check_same_images(lines: Iterable[Mapping[str, Any]]) -> None:
    """Refuse lines of different images that go by one name, since a data set goes by the last part of its own.

    Raises:
        ConfigurationError: naming the data set, and in what its lines differ.
    """
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        run, mine = identity(line["config"]), images_of(line)
        theirs = known.setdefault((run["dataset"], run["validation"]), {})
        if words := other_images(mine, theirs):
            raise ConfigurationError(
                f"{variant_of(line)}, seed {run['seed']}, is of another data set {run['dataset']!r} than other results "
                f"({words}): accepted are results of one data set of a name."
            )
        theirs.update(mine)


def variant_of(line: Mapping[str, Any]) -> str:
    """How people call the variant of a line; older lines have no name but that of their method."""
    method = line["config"]["method"]
    return one_line(str(line.get("variant") or METHOD_NAMES.get(method, method)))


@lru_cache(maxsize=4096)
def _identity(config: str) -> dict[str, Any]:
    values = canonical(Config.from_dict(json.loads(config)), _USUAL).to_dict()
    values["dataset"] = dataset_name(values["dataset"])
    return {name: value for name, value in values.items() if name not in PLACEMENT}


def _evolution(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    removed, rechosen = (sum(record[key] for record in records) for key in ("removed", "rechosen"))
    last = [record for record in records if record["evolution"] == records[-1]["evolution"]]
    means = {key: _mean(_known(last, key)) for key in ("empty_slices", "zero_scores")}
    return {"rechosen": rechosen / removed if removed else None} | means


def _known(rows: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _refused(constant: str) -> None:
    raise ValueError(f"it has no {constant}")
