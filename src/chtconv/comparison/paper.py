"""Table 1 of the paper as data, and which runs it can be compared with.

Source: Cannistraci-Hebb Training of Convolutional Neural Networks, preprint of 24 September 2025,
doi 10.20944/preprints202509.1904.v1, CC BY 4.0: Table 1, section 4 and appendix A.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from chtconv.comparison.result import identity
from chtconv.comparison.statistics import Estimate
from chtconv.training.config import DENSE
from chtconv.training.recipes import recipe

RUNS: Final = 3  # seeds 14, 15 and 16
TITLES: Final = MappingProxyType({"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"})


@dataclass(frozen=True)
class PaperCell:
    """A number of Table 1.

    Attributes:
        dataset: ``"cifar10"`` or ``"cifar100"``.
        sparsity: share of the links of the convolutions that is absent; 0 for the dense network.
        method: ``"dense"``, ``"set"`` or ``"cht"``.
        predictor: ``"ch2_l3n"`` or ``"ch3_l3n"`` for CHT, else None.
        accuracy: on the test images, %.
    """

    dataset: str
    sparsity: float
    method: str
    predictor: str | None
    accuracy: Estimate

    @property
    def name(self) -> str:
        """The method as the paper writes it.

        >>> TABLE_1[-1].name
        'CHT-CH3'
        """
        if self.predictor:
            return f"CHT-{self.predictor.partition('_')[0].upper()}"
        return "Dense" if self.method == DENSE else self.method.upper()


def _row(
    sparsity: float, method: str, predictor: str | None, cifar10: tuple[float, float], cifar100: tuple[float, float]
) -> Iterable[PaperCell]:
    for dataset, (mean, error) in {"cifar10": cifar10, "cifar100": cifar100}.items():
        yield PaperCell(dataset, sparsity, method, predictor, Estimate(mean, error, RUNS))


# Mean and standard error over three seeds, as printed.
TABLE_1: Final = (
    *_row(0.0, "dense", None, (92.28, 0.11), (72.19, 0.17)),
    *_row(0.5, "set", None, (91.64, 0.10), (71.76, 0.13)),
    *_row(0.5, "cht", "ch2_l3n", (91.99, 0.13), (71.72, 0.13)),
    *_row(0.5, "cht", "ch3_l3n", (91.99, 0.13), (71.72, 0.13)),
    *_row(0.7, "set", None, (91.40, 0.19), (70.56, 0.15)),
    *_row(0.7, "cht", "ch2_l3n", (91.88, 0.18), (70.48, 0.23)),
    *_row(0.7, "cht", "ch3_l3n", (91.61, 0.02), (70.51, 0.18)),
)

# What the paper says of all its runs, and what follows from it for their topology. The rest it leaves open.
_IMAGES: Final = MappingProxyType({"train": 50_000, "test": 10_000})
_FIXED: Final = (
    "image_size", "validation", "batch_size", "flip", "model", "width", "epochs", "optimizer", "lr", "schedule",
    "layers", "distribution", "allocation", "removal", "regrowth", "density", "initial_sparsity", "smoothing",
    "prune_dead",
)  # fmt: skip
_VARIED: Final = ("dataset", "method", "sparsity", "predictor", "seed")
# None in a configuration is the method's own; so it is when it is spelled out.
_OWN: Final = MappingProxyType({"allocation": "kernel", "removal": "magnitude", "density": "constant"})


def paper_cell(line: Mapping[str, Any]) -> PaperCell | None:
    """The number of Table 1 that the result line of a run can be compared with; None where there is none.

    That takes what the paper fixes: the data set with all of its images, VGG16 at full width, the optimizer, its rate
    and schedule, batch, epochs and the flip; one of its methods at one of its sparsities, all convolutions sparse
    alike, hard regrowth on the graph of each kernel. See :func:`readings` for the rest.
    """
    config = _values(line["config"])
    usual = _usual(config["dataset"])
    images = line.get("dataset", {})
    if not usual or any(config[name] != usual[name] for name in _FIXED):
        return None
    if any(images.get(name) != number for name, number in _IMAGES.items()):
        return None
    if config["method"] == "cht" and config["graph"] != "kernel":
        return None
    key = _key(config)
    return next((cell for cell in TABLE_1 if (cell.dataset, cell.sparsity, cell.method, cell.predictor) == key), None)


def readings(line: Mapping[str, Any]) -> dict[str, Any]:
    """Where a run reads what the paper leaves open differently from our recipe for the paper: name -> value.

    Such are the drop fraction and its course, warm-up and end of the learning rate, weight decay, head, dropout, the
    random crop and precision. Empty for a run that no cell of the paper belongs to.
    """
    if paper_cell(line) is None:
        return {}
    config = _values(line["config"])
    chosen = {name: config[name] for name in ("method", "sparsity", "predictor")}
    usual = identity(recipe(_recipe(config["dataset"])).replace(**chosen).to_dict())
    return {name: value for name, value in config.items() if name not in (*_FIXED, *_VARIED) and value != usual[name]}


def _key(config: Mapping[str, Any]) -> tuple[Any, ...]:
    predictor = config["predictor"] if config["method"] == "cht" else None
    return config["dataset"], config["sparsity"], config["method"], predictor


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if value == _OWN.get(name) else value for name, value in identity(config).items()}


def _usual(dataset: str) -> dict[str, Any]:
    return identity(recipe(_recipe(dataset)).to_dict()) if dataset in TITLES else {}


def _recipe(dataset: str) -> str:
    return f"paper-{dataset}"
