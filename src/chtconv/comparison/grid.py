"""A grid of runs: what they share, what varies, and the cells that come of it, each run once.

What varies is the topology (method, predictor, graph, sparsity and every other option of the evolution) and the seed;
data, network and optimisation are the same for all, so that the runs of one grid can be compared.
"""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from chtconv.comparison.cell import Cell, one_line, variant_name, words
from chtconv.errors import ConfigurationError, unknown
from chtconv.methods import METHODS, method
from chtconv.methods.regrowth import usual_shares
from chtconv.methods.schedule import USUAL_DECAY
from chtconv.models import WITHOUT_PERCEPTRON
from chtconv.scores.controls import CONTROLS
from chtconv.training.config import DENSE, SECTIONS, SETTINGS, Config
from chtconv.training.recipes import recipe

AXES: Final = (*SECTIONS["topology"], "seed")
PLURALS: Final = {
    "methods": "method",
    "predictors": "predictor",
    "graphs": "graph",
    "sparsities": "sparsity",
    "seeds": "seed",
}
# Parts of a method: its own value is what it has without being named.
_PARTS: Final = (
    "removal", "regrowth", "density", "initial_sparsity", "temperature", "explore", "smoothing", "kernel_shares",
    "early_stop",
)  # fmt: skip
DEFAULT_AXES: Final[Mapping[str, tuple[Any, ...]]] = {
    "method": (DENSE, "set", "rigl", "cht", "chts"),
    "seed": (14, 15, 16),  # the paper's, appendix A
}


@dataclass(frozen=True)
class Grid:
    """Runs that differ in topology and seed only.

    Attributes:
        recipe: where all values come from that are not named here.
        shared: values of the configuration that are the same in every run.
        axes: for a value of the topology or the seed, all that it takes; every combination is a run.
        variants: further topologies by the name they go by: values beside the shared ones. Each is combined with the
            axes that it does not name itself. With variants and no axis of methods, they are all there is.
        chosen: names of the variants and methods that are run; empty for all, see :meth:`only`.

    Raises:
        ConfigurationError: for a value that cannot be used or an axis that is none, naming it.

    >>> grid = Grid("cifar-short", axes={"method": ("dense", "set"), "sparsity": (0.9, 0.95), "seed": (14,)})
    >>> [cell.name for cell in grid.cells()]
    ['dense-seed14', 'set-0.9-seed14', 'set-0.95-seed14']
    """

    recipe: str
    shared: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    chosen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.axes:
            if name not in AXES:
                raise ConfigurationError(
                    f"{name} takes one value for all runs: what varies is the topology ({', '.join(AXES[:-1])}) and "
                    "the seed, so that the runs can be compared. Another --out takes another value."
                )
        for name, values in self.axes.items():
            if not values:
                raise ConfigurationError(f"{name}: accepted is at least one value.")
        self._cells  # noqa: B018 - what cannot be put together is refused at once

    @property
    def base(self) -> Config:
        """What all runs share, with the recipe's values for what varies."""
        return recipe(self.recipe).replace(**self.shared)

    def only(self, names: Sequence[str]) -> "Grid":
        """The grid with some of its runs, under the names that they have in the whole of it.

        Args:
            names: of variants and methods, as tables show them; in what is no such name, ``*`` stands for any letters.

        Raises:
            ConfigurationError: for a name that no run has, with the nearest one.

        >>> grid = Grid("cifar-short", axes={"method": ("dense", "set", "cht", "chts"), "seed": (14,)})
        >>> [cell.name for cell in grid.only(["SET", "CHT*"]).cells()]
        ['set-0.95-seed14', 'cht-0.95-seed14', 'chts-0.95-seed14']
        """
        known = dict.fromkeys(cell.variant for cell in self._cells)
        called = {
            name: [name] if name in known else [each for each in known if fnmatchcase(each, name)] for name in names
        }
        for name, variants in called.items():
            if not variants:
                raise unknown("variant of the grid", name, known)
        return replace(self, chosen=tuple(itertools.chain.from_iterable(called.values())))

    def cells(self) -> list[Cell]:
        """The runs, seed by seed, so that each seed is a comparison of its own as soon as it is done.

        Combinations that only differ in what their method does not use are one run: ``dense`` has no sparsity, SET no
        predictor.

        Raises:
            ConfigurationError: if two different runs would go by one name, or one by two.
        """
        return list(self._cells)

    @cached_property
    def _cells(self) -> tuple[Cell, ...]:
        cells: dict[str, Cell] = {}
        names: dict[Config, str] = {}
        for cell in self._combinations():
            known = cells.setdefault(cell.name, cell)
            if known.config != cell.config:
                differences = ", ".join(known.config.differences(cell.config))
                both = " and ".join(map(repr, dict.fromkeys((known.variant, cell.variant))))
                raise ConfigurationError(
                    f"two runs are called {cell.name!r} ({both}) and differ in {differences}: accepted are names of "
                    "variants that differ in letters a to z, digits or points, after which folders are called."
                )
            name = names.setdefault(cell.config, cell.variant)
            if name != cell.variant:
                raise ConfigurationError(
                    f"{name!r} and {cell.variant!r} are one and the same run: leave one of them out."
                )
        chosen = [cell for cell in cells.values() if not self.chosen or cell.variant in self.chosen]
        seeds, sparsities = (list(self.axes.get(name, ())) for name in ("seed", "sparsity"))
        order = sorted(chosen, key=lambda cell: (_place(cell.seed, seeds), _place(cell.sparsity, sparsities)))
        return tuple(order)

    def _combinations(self) -> Iterator[Cell]:
        usual = recipe(self.recipe)
        for variant, changes in ((None, {}), *self.variants.items()):
            if variant is None and self.variants and "method" not in self.axes:
                continue
            # The seed varies slowest, the method fastest: at each sparsity, all methods side by side.
            free = [name for name in self.axes if name not in changes and not (variant and name == "method")]
            free.sort(key=lambda name: (name != "seed", name != "sparsity", name == "method"))
            for values in itertools.product(*(self.axes[name] for name in free)):
                chosen = dict(zip(free, values, strict=True))
                config = self.base.replace(**changes, **chosen)
                used = canonical(config, usual)
                yield Cell(variant_name(used, usual) if variant is None else self._name(variant, config, chosen), used)

    def _name(self, variant: str, config: Config, chosen: Mapping[str, Any]) -> str:
        """A variant's own name, and what else is varied and makes a difference to it."""
        plain = {"seed", "sparsity", *_unused(config)}
        varied = [name for name in chosen if len(self.axes[name]) > 1 and name not in plain]
        return ", ".join([variant, *(words(name, chosen[name]) for name in varied)])


def _place(value: Any, values: list[Any]) -> int:
    return values.index(value) if value in values else -1


def canonical(config: Config, usual: Config) -> Config:
    """The configuration with the ``usual`` value wherever its method takes no notice of one.

    >>> usual = recipe("cifar-short")
    >>> canonical(usual.replace(method="set", graph="layer", temperature=4.0), usual) == usual.replace(method="set")
    True
    """
    unused = set(_unused(config))
    values = {name: value for name, value in usual.to_dict().items() if name in unused}
    if config.topology.method == DENSE:
        values |= {"sparsity": 0.0, "backend": "auto"}
    elif "zeta_schedule" not in unused:
        # What it is without being named goes by no name, unless the usual one is that.
        own = METHODS[config.topology.method].zeta_schedule or USUAL_DECAY
        mine, theirs = (each.topology.zeta_schedule or own for each in (config, usual))
        if mine in (own, theirs):
            values["zeta_schedule"] = usual.topology.zeta_schedule if mine == theirs else None
    return config.replace(**values)


def allocation_of(config: Mapping[str, Any]) -> str:
    """Where links move in a run of this configuration, whether it is named or that of the method.

    >>> allocation_of({"method": "cht"}), allocation_of({"method": "cht", "prune_dead": True})
    ('kernel', 'layer')
    """
    topology = Config.from_dict(config).topology
    return topology.allocation or method(topology.method, **topology.changes()).allocation


def _unused(config: Config) -> Iterator[str]:
    """The names of values of network, topology and optimisation that make no difference to a run."""
    if config.network.model in WITHOUT_PERCEPTRON:
        yield "dropout"
    if config.optimisation.optimizer != "sgd":
        yield "momentum"
    if config.optimisation.schedule == "constant":
        yield from ("final_lr", "decay_end")
    name = config.topology.method
    if name == DENSE:
        yield from (each for each in SECTIONS["topology"] if each != "method")
        return
    changed, plain = method(name, **config.topology.changes()), METHODS[name]
    predictor = changed.predictor or config.topology.predictor
    yield from (each for each in _PARTS if getattr(config.topology, each) == getattr(plain, each))
    yield from replace(changed, predictor=predictor).unnoticed
    if not changed.uses_scores or changed.predictor is not None:
        yield "predictor"
    if not changed.uses_scores or predictor in CONTROLS:
        yield "graph"  # controls count, and look at no graph
    if not changed.uses_scores or (predictor == "in_bounds" and not changed.smoothing):
        yield "windows"
    own = changed.allocation
    kernels = (config.topology.allocation or own) == "kernel"
    if kernels or config.topology.kernel_shares == usual_shares(predictor, config.topology.graph):
        yield "kernel_shares"
    if changed.regrowth is None:
        yield from ("zeta", "zeta_schedule")  # nothing is exchanged
    if not changed.evolves:
        yield from ("evolutions_per_epoch", "stop_fraction", "prune_dead")
    if config.topology.allocation == own:
        yield "allocation"  # what it is without being named
    if changed.density == "constant":
        yield "initial_sparsity"


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a TOML file.

    Raises:
        ConfigurationError: if it cannot be read, naming the place.
    """
    # Here, because before Python 3.11 it takes a package of the extra "compare".
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # pragma: no cover
        import tomli as tomllib

    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # editors may put a mark before the text
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"cannot read the grid {path}: {error}") from error


def grid_from(table: Mapping[str, Any], **values: Any) -> Grid:
    """The grid that a table of names and values describes, as a TOML file or the command line gives it.

    Names are those of the configuration, with hyphens or underscores; ``methods``, ``predictors``, ``graphs``,
    ``sparsities`` and ``seeds`` are accepted too. A list is an axis. ``recipe`` names a recipe ("quick" by default),
    and ``variants`` is a list of tables, each with a ``name``. Text such as "none" and "yes" means what it means on the
    command line.

    Args:
        table: names and values.
        values: further values by the names of the configuration, which go before those of the table.

    Raises:
        ConfigurationError: for an unknown name, with the nearest match, or a value that cannot be used.

    >>> grid_from({"methods": ["set", "chts"], "sparsity": 0.9, "seeds": [14], "epochs": 2}).shared
    {'sparsity': 0.9, 'epochs': 2}
    """
    named = _by_own_names(table) | values
    chosen, variants = named.pop("recipe", "quick"), named.pop("variants", [])
    for name in named:
        _check_name(name)
    tables = _variants(variants)
    usual = {name: values for name, values in DEFAULT_AXES.items() if name == "seed" or not tables}
    if not isinstance(chosen, str):
        raise ConfigurationError(f"recipe={chosen!r}: accepted is a name.")
    several = {name: _choices(name, value) for name, value in named.items()}
    axes = usual | {
        name: tuple(dict.fromkeys(choices))
        for name, choices in several.items()
        if name in DEFAULT_AXES or isinstance(named[name], list | tuple)
    }
    return Grid(chosen, {name: choices[0] for name, choices in several.items() if name not in axes}, axes, tables)


def _by_own_names(table: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a table by their names in the configuration."""
    keys: dict[str, str] = {}
    for key in table:
        name = key.replace("-", "_")
        other = keys.setdefault(PLURALS.get(name, name), key)
        if other != key:
            raise ConfigurationError(f"{other}, {key}: the same value is named twice.")
    return {name: table[key] for name, key in keys.items()}


def _choices(name: str, value: Any) -> list[Any]:
    """The values that a name of a table stands for, checked one by one: those that are equal may be of other types."""
    choices = list(value) if isinstance(value, list | tuple) else [value]
    if any(isinstance(each, list | tuple | dict) for each in choices):
        raise ConfigurationError(f"{name}={value!r}: accepted are single values.")
    return [SETTINGS[name].read(name, each) for each in choices]


def _check_name(name: str) -> None:
    if name not in SETTINGS:
        raise unknown("value of a grid", name, (*SETTINGS, *PLURALS, "recipe", "variants"))


def _check_variant_name(variant: str, name: str) -> None:
    if name in SECTIONS["topology"]:
        return
    if name in AXES or PLURALS.get(name) in AXES:
        one = PLURALS.get(name, name)
        reason = "varies for all variants alike" if one == "seed" else f"takes several values; {one} takes one"
    elif name in SETTINGS or name == "recipe":
        reason = "is the same for all runs of a grid"
    else:
        raise ConfigurationError(f"variant {variant!r}: {unknown('value', name, SECTIONS['topology'])}")
    raise ConfigurationError(f"variant {variant!r}: {name} {reason}; accepted are {', '.join(SECTIONS['topology'])}.")


def _is_name(table: dict[str, Any]) -> bool:
    return isinstance(table.get("name"), str) and bool(table["name"].strip())


def _variants(tables: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) and _is_name(table) for table in tables):
        raise ConfigurationError("variants: accepted is a list of tables, each with a name and values of the topology.")
    found: dict[str, dict[str, Any]] = {}
    for table in tables:
        called = one_line(table["name"])
        changes = {key.replace("-", "_"): value for key, value in table.items() if key != "name"}
        for name in changes:
            _check_variant_name(called, name)
        changes = {name: SETTINGS[name].read(name, value) for name, value in changes.items()}
        if called in found:
            raise ConfigurationError(f"two variants are called {called!r}.")
        found[called] = changes
    return found
