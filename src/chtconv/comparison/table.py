"""From result lines to tables: what can be compared stands in one, with the differences that matter."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from chtconv.comparison.grid import allocation_of
from chtconv.comparison.paper import TITLES
from chtconv.comparison.result import check_same_images, same_run
from chtconv.comparison.rows import SHARED, Metric, Row, natural, rows, words
from chtconv.comparison.statistics import Paired, holm, paired
from chtconv.methods import METHODS

# What variants are compared with. GraNet changes its density: it is a baseline of those that do so alike.
BASELINES: Final = ("set", "rigl", "granet")
# What link prediction has to beat, beside what it predicts with.
CONTROL_METHODS: Final = ("random_turnover", "shuffled", "occupancy", "input_degree", "in_bounds")
_IN_TITLE: Final = ("dataset", "model", "width", "epochs", "validation")


@dataclass(frozen=True)
class Comparison:
    """A variant beside a baseline, paired by seed.

    Attributes:
        variant: how people call it.
        baseline: what its accuracy is compared with.
        sparsity: of both.
        paired: variant minus baseline, in points of accuracy.
        holm: p adjusted for all comparisons of the same metric in the same call; None where there is no p.
    """

    variant: str
    baseline: str
    sparsity: float
    paired: Paired
    holm: float | None = None


@dataclass(frozen=True)
class Table:
    """Runs that differ in topology and seed only.

    Attributes:
        dataset: the last part of its name.
        metric: ``"test"``, or ``"validation"`` where images were held out.
        title: data set, network and epochs, and what else tells it from other tables.
        rows: the variants, dense first, then by sparsity.
        comparisons: every variant with the baselines of its sparsity, and link prediction with its controls.
    """

    dataset: str
    metric: Metric
    title: str
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]


def tables(lines: Iterable[Mapping[str, Any]]) -> list[Table]:
    """The tables of these result lines; test and validation accuracies, data sets and recipes never mix.

    Every p value is adjusted (Holm) for all comparisons of its metric in ``lines``: those of all data sets, recipes
    and sparsities are one family. Baselines are SET and RigL of the same sparsity and allocation, or the plain ones
    where there are none of that. A variant whose links are distributed over the layers otherwise, or whose density
    changes during training, is compared only with SET, RigL or GraNet of the same distribution and schedule, since the
    others have other FLOPs. Link prediction is compared with those controls, too, that have the same allocation and
    windows.

    Raises:
        ConfigurationError: for a line with images held out that lacks its accuracy on them, or lines of different data
            sets of one name.
    """
    found = list(lines)
    check_same_images(found)
    blocks: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows(found):
        blocks.setdefault(tuple(row.config[name] for name in SHARED), []).append(row)
    made = [_table(block, list(blocks.values())) for block in blocks.values()]
    made.sort(key=lambda table: (natural(table.dataset), table.metric, natural(table.title)))
    return _adjusted(made)


def comparisons(block: Sequence[Row]) -> Iterator[Comparison]:
    """Every row beside the baselines of its sparsity, p values not yet adjusted; baselines beside earlier ones only.

    Args:
        block: the rows of one table in the order of :func:`chtconv.comparison.rows.rows`.
    """
    for row in block:
        for other in (*_baselines(row, block), *_controls(row, block)):
            yield Comparison(row.variant, other.variant, row.sparsity, paired(row.accuracies, other.accuracies))


def _baselines(row: Row, block: Sequence[Row]) -> Iterator[Row]:
    for method in BASELINES:
        baseline = _baseline(row, method, block)
        if baseline is None or baseline is row:
            continue
        # Each pair of baselines once: SET beside RigL is RigL beside SET.
        if row is _baseline(baseline, row.method, block) and _rank(row) <= _rank(baseline):
            continue
        yield baseline


def _baseline(row: Row, method: str, block: Sequence[Row]) -> Row | None:
    """The variant of a method that a row is compared with: of its sparsity, number of links and allocation.

    Without one of that allocation, and beside its own method, it is the first one: the plain one, where there is that.
    """
    near = [each for each in _near(row, block) if each.method == method]
    alike = [each for each in near if method != row.method and _allocation(each) == _allocation(row)]
    return next(iter([*alike, *near]), None)


def _allocation(row: Row) -> str | None:
    return allocation_of(row.config) if row.method in METHODS else None


def _controls(row: Row, block: Sequence[Row]) -> Iterator[Row]:
    """The controls of a row that predicts links; none for others."""
    known = METHODS.get(row.method)
    if known is None or not known.uses_scores or {row.method, row.config["predictor"]} & set(CONTROL_METHODS):
        return
    alike = {"allocation": allocation_of(row.config), "windows": row.config["windows"]}
    for each in _near(row, block):
        # With the row's values it is the same: it has them, or takes no notice of them.
        if each.method in CONTROL_METHODS and same_run(each.config, {**each.config, **alike}):
            yield each


def _near(row: Row, block: Sequence[Row]) -> Iterator[Row]:
    """The rows of the same sparsity and number of links."""
    return (each for each in block if each.sparsity == row.sparsity and _links(each) == _links(row))


def _rank(row: Row) -> int:
    return BASELINES.index(row.method) if row.method in BASELINES else len(BASELINES)


def _links(row: Row) -> tuple[Any, ...]:
    """How many links there are: in which layers, how their number changes, and the sparsity that it starts from.

    Where layers are pruned together, each has another number than by its distribution.
    """
    known = METHODS.get(row.method)
    density = row.config["density"] or (known.density if known else "constant")
    layers = row.config["layers"], row.config["distribution"], row.config["allocation"] == "model"
    if density == "constant":
        return *layers, density, None
    initial = row.config["initial_sparsity"]
    return *layers, density, known.initial_sparsity if initial is None and known else initial


def _table(block: Sequence[Row], blocks: Sequence[Sequence[Row]]) -> Table:
    config, metric = block[0].config, block[0].metric
    dataset = config["dataset"]
    others = [each[0].config for each in blocks if (each[0].config["dataset"], each[0].metric) == (dataset, metric)]
    names = [name for name in SHARED if name not in _IN_TITLE and any(one[name] != config[name] for one in others)]
    epochs = f"{config['epochs']} epoch{'s' * (config['epochs'] != 1)}"
    title = f"{TITLES.get(dataset, dataset)}, {config['model']} at width {config['width']:g}, {epochs}"
    if config["validation"]:
        title += f", {config['validation']:,} images held out"
    apart = words({name: config[name] for name in names})
    return Table(dataset, metric, f"{title}, {apart}" if apart else title, tuple(block), tuple(comparisons(block)))


def _adjusted(found: Sequence[Table]) -> list[Table]:
    adjusted = {
        metric: iter(holm([each.paired.p for table in found if table.metric == metric for each in table.comparisons]))
        for metric in ("test", "validation")
    }
    return [
        replace(
            table,
            comparisons=tuple(replace(each, holm=next(adjusted[table.metric])) for each in table.comparisons),
        )
        for table in found
    ]
