"""The grids of the paper's Table 1: VGG16 on CIFAR-10 and CIFAR-100, dense, SET and CHT with two predictors.

Defaults are the paper's 42 runs (section 4 and appendix A): sparsity 50 and 70 %, seeds 14, 15 and 16, the recipes
``paper-cifar10`` and ``paper-cifar100``. What the paper leaves open is read as :mod:`chtconv.training.recipes` says.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from chtconv.comparison.cell import METHOD_NAMES
from chtconv.comparison.grid import Grid
from chtconv.errors import ConfigurationError, check_name
from chtconv.methods import METHODS, method
from chtconv.training.config import DENSE

DATASETS: Final = MappingProxyType({"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"})
AXES: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType({
    "method": (DENSE, "set", "cht"),
    "predictor": ("ch2_l3n", "ch3_l3n"),
    "graph": ("kernel",),
    "sparsity": (0.5, 0.7),
    "seed": (14, 15, 16),
})  # fmt: skip

_TITLES: Final = MappingProxyType({"ch2_l3n": "CH2", "ch3_l3n": "CH3"})  # as the paper has them


def table1(
    datasets: Sequence[str] = tuple(DATASETS), *, data: Path | str | None = None, **values: Any
) -> dict[str, Grid]:
    """The grid of each data set, the first one first.

    Args:
        datasets: of "cifar10" and "cifar100".
        data: a folder that holds folders of these names with their parquet files; by default they come from the
            Hugging Face Hub.
        values: values of the configuration beside those of the recipe; ``method``, ``predictor``, ``graph``,
            ``sparsity``, ``seed`` and other options of the evolution take several in a sequence.

    Raises:
        ConfigurationError: for an unknown data set, a value that cannot be used, or one that is there twice.

    >>> grids = table1()
    >>> {name: len(grid.cells()) for name, grid in grids.items()}
    {'cifar10': 21, 'cifar100': 21}
    >>> [cell.name for cell in grids["cifar10"].cells()][:4]
    ['dense-seed14', 'set-0.5-seed14', 'cht-ch2-0.5-seed14', 'cht-ch3-0.5-seed14']
    """
    for name in datasets:
        check_name("data set of Table 1", name, DATASETS)
    axes = dict(AXES)
    for name, value in values.items():
        if isinstance(value, list | tuple):
            axes[name] = tuple(value)
        elif name in AXES:
            axes[name] = (value,)
    shared = {name: value for name, value in values.items() if name not in axes}
    methods, predictors, graphs = (axes.pop(name) for name in ("method", "predictor", "graph"))
    variants = _variants([name for name in methods if name != DENSE], predictors, graphs)
    if DENSE in methods:
        axes["method"] = (DENSE,)
    return {
        name: Grid(
            f"paper-{name}", shared | {"dataset": DATASETS[name] if data is None else str(Path(data) / name)}, axes,
            variants,
        )
        for name in datasets
    }  # fmt: skip


def _variants(methods: Sequence[str], predictors: Sequence[str], graphs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows of the table by the names that the paper gives them: SET, CHT-CH2, CHT-CH3."""
    found: dict[str, dict[str, Any]] = {}
    for name, predictor, graph in itertools.product(methods, predictors, graphs):
        title = METHOD_NAMES.get(name, name)
        changes: dict[str, Any] = {"method": name}
        if name in METHODS and method(name).uses_scores and method(name).predictor is None:
            title += f"-{_TITLES.get(predictor, predictor)}" + (", layer graph" if graph == "layer" else "")
            changes |= {"predictor": predictor, "graph": graph}
        if found.setdefault(title, changes) != changes:
            raise ConfigurationError(f"two rows of Table 1 are called {title!r}: accepted is one of a name.")
    return found
