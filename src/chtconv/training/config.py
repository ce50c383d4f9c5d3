"""Everything that decides a run: five sections whose fields are the options of the command line."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, Final

from chtconv.errors import ConfigurationError, unknown
from chtconv.initial import ALLOCATIONS
from chtconv.initial.distribution import DISTRIBUTIONS
from chtconv.methods import METHODS
from chtconv.methods.regrowth import REGROWTHS, SHARES
from chtconv.methods.removal import REMOVALS
from chtconv.methods.schedule import DECAYS, DENSITIES
from chtconv.models import MODELS
from chtconv.scores.api import GRAPHS, SCORES, WINDOWS
from chtconv.sparse_compute.acceleration import BACKENDS
from chtconv.training.setting import Setting, choice, nonnegative, positive, share, switch, text, whole

DENSE: Final = "dense"
OPTIMIZERS: Final = ("sgd", "adam")
SCHEDULES: Final = ("linear", "cosine", "constant")
PRECISIONS: Final = ("float32", "bf16", "tf32")
STEPS: Final = ("eager", "captured")
OPTIMIZER_KERNELS: Final = ("auto", "plain", "fused")
DEVICES: Final = ("auto", "cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Data:
    """Which images, how many at a time, and what is done to them."""

    dataset: str = text("digits (embedded), a data set of the Hugging Face hub, or a folder").field("digits")
    image_size: int = whole("height and width of the images in pixels", 32, 2**14).field(32)
    validation: int = whole(
        "training images held out, drawn by the seed: to choose an epoch by, in a comparison to screen on", 0
    ).field(0)
    batch_size: int = whole("images a step", 1, 2**24).field(64)
    flip: bool = switch("mirror half of the training images").field(False)
    crop: int = whole("shift training images by up to so many pixels", 0).field(2)


@dataclasses.dataclass(frozen=True)
class Network:
    """Which network, and how large."""

    model: str = choice("which network", lambda: MODELS).field("vgg16")
    width: float = positive("multiplies the channels of every convolution", most=1000).field(0.25)
    head: int | None = whole(
        "neurons of each hidden layer of the perceptron of a VGG; none is 4096 x width", 1, 2**24, optional=True
    ).field(None)
    dropout: float = share("share of the perceptron's neurons dropped in training", least=0).field(0.5)


@dataclasses.dataclass(frozen=True)
class Topology:
    """How sparse the convolutions are, and how their links change."""

    method: str = choice("how links come and go", lambda: (DENSE, *METHODS)).field("chts")
    predictor: str = choice("link predictor", lambda: SCORES).field("ch3_l3n")
    graph: str = choice("graph that links are predicted on", lambda: GRAPHS).field("kernel")
    windows: str = choice("windows that link scores are averaged over", lambda: WINDOWS).field("in_bounds")
    sparsity: float = share("share of the links that is absent", least=0).field(0.9)
    layers: str = text("sparse layers: names or wildcards, with commas between; * is every convolution").field("*")
    zeta: float = share("share of a kernel's links removed at an evolution", whole_too=True).field(0.3)
    zeta_schedule: str | None = choice(
        "course of zeta until evolution stops; none is that of the method, or cosine", lambda: DECAYS, optional=True
    ).field(None)
    evolutions_per_epoch: float = positive("evolutions an epoch; 0.5 is every second epoch").field(1.0)
    stop_fraction: float = share("share of training after which links stay", whole_too=True).field(0.75)
    allocation: str | None = choice(
        "where the number of links is the same; none is that of the method", lambda: ALLOCATIONS, optional=True
    ).field(None)
    distribution: str = choice("of the sparsity over layers", lambda: DISTRIBUTIONS).field("uniform")
    removal: str | None = choice(
        "which links go; none is that of the method, like what follows", lambda: REMOVALS, optional=True
    ).field(None)
    regrowth: str | None = choice("which links come", lambda: REGROWTHS, optional=True).field(None)
    density: str | None = choice("course of the number of links", lambda: DENSITIES, optional=True).field(None)
    initial_sparsity: float | None = share("sparsity before training", least=0, optional=True).field(None)
    temperature: float | None = nonnegative("power of the link scores in sampling", optional=True).field(None)
    explore: float | None = share(
        "share of sampling that is spread evenly", least=0, whole_too=True, optional=True
    ).field(None)
    smoothing: float | None = share(
        "share of a kernel's link scores that goes by the links of its slices", least=0, whole_too=True, optional=True
    ).field(None)
    kernel_shares: str | None = choice(
        "what a kernel's share in the regrowth of its layer goes by", lambda: SHARES, optional=True
    ).field(None)
    early_stop: float | None = share(
        "overlap of removed and regrown links at which a layer stops", whole_too=True, optional=True
    ).field(None)
    prune_dead: bool = switch("remove the links of channels that lost all on one side").field(False)

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):  # it is checked with all others
            object.__setattr__(self, "layers", ",".join(name.strip() for name in self.layers.split(",")))

    @property
    def chosen_layers(self) -> list[str] | None:
        """The sparse layers as :func:`chtconv.sparsify` takes them.

        >>> Topology(layers="features.*, head").chosen_layers
        ['features.*', 'head']
        """
        return None if self.layers == "*" else self.layers.split(",")

    def changes(self) -> dict[str, Any]:
        """What is different from the named method, as :func:`chtconv.method` takes it."""
        names = "removal", "regrowth", "density", "temperature", "explore", "smoothing", "kernel_shares", "early_stop"
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None} | (
            {"prune_dead": True} if self.prune_dead else {}
        )


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """How the weights are trained; see :mod:`chtconv.training.schedule` for the learning rate."""

    epochs: int = whole("passes over the training images", 1).field(20)
    optimizer: str = choice("what updates the weights", lambda: OPTIMIZERS).field("sgd")
    lr: float = positive("highest learning rate").field(0.05)
    momentum: float = share("momentum of sgd", least=0).field(0.9)
    weight_decay: float = nonnegative("weight decay, coupled").field(5e-4)
    warmup_epochs: float = nonnegative("epochs over which the rate rises linearly").field(1.0)
    schedule: str = choice("how the rate falls", lambda: SCHEDULES).field("cosine")
    final_lr: float = share("where the fall ends, as a share of lr", least=0, whole_too=True).field(0.0)
    decay_end: float = share("share of training at which the fall ends", whole_too=True).field(1.0)


@dataclasses.dataclass(frozen=True)
class Machine:
    """The seed, and what the run is computed on."""

    seed: int = whole("seed of weights, masks, images held out, data order, dropout and evolution", 0).field(0)
    device: str = choice("auto takes a GPU where there is one", lambda: DEVICES).field("auto")
    precision: str = choice("of the forward and backward pass; weights stay float32", lambda: PRECISIONS).field(
        "float32"
    )
    backend: str = choice("kernels of the sparse convolutions; auto measures which are faster", lambda: BACKENDS).field(
        "auto"
    )
    step: str = choice("captured replays steps as one CUDA graph", lambda: STEPS).field("eager")
    optimizer_kernel: str = choice(
        "fused makes one pass over the weights and rounds otherwise; auto is that on a GPU", lambda: OPTIMIZER_KERNELS
    ).field("auto")
    threads: int | None = whole(
        "CPU threads; none is torch's own number, in a comparison the cores shared out", 1, 1024, optional=True
    ).field(None)


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole configuration of a run; every value is checked when it is made.

    Raises:
        ConfigurationError: naming the value that cannot be used, and what is accepted.

    >>> config = Config().replace(sparsity=0.95, method="set")
    >>> config.topology.sparsity, config.to_dict()["method"]
    (0.95, 'set')
    >>> Config.from_dict(config.to_dict()) == config
    True
    """

    data: Data = Data()
    network: Network = Network()
    topology: Topology = Topology()
    optimisation: Optimisation = Optimisation()
    machine: Machine = Machine()

    def __post_init__(self) -> None:
        values = self.to_dict()
        for name, setting in SETTINGS.items():
            setting.check(name, values[name])
        if self.data.crop >= self.data.image_size:
            size = self.data.image_size
            raise ConfigurationError(f"crop={self.data.crop}: accepted is less than image_size, {size} pixels.")
        each = self.optimisation
        if each.schedule != "constant" and each.decay_end * each.epochs < min(each.warmup_epochs, each.epochs):
            raise ConfigurationError(
                f"decay_end={each.decay_end:g}: the rate would have fallen after {each.decay_end * each.epochs:g} "
                f"epochs, before it has risen; accepted is an end after warmup_epochs, {each.warmup_epochs:g}."
            )

    def to_dict(self) -> dict[str, Any]:
        """All values by name, without sections; JSON can hold them."""
        return {name: value for section in dataclasses.asdict(self).values() for name, value in section.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The configuration with these values, and defaults for those not named.

        Raises:
            ConfigurationError: for a name that no field has, or a value that cannot be used.
        """
        return cls().replace(**values)

    def replace(self, **values: Any) -> "Config":
        """A copy with some values replaced, by their names alone.

        Raises:
            ConfigurationError: for a name that no field has, or a value that cannot be used.
        """
        for name in values:
            if name not in SETTINGS:
                raise unknown("configuration value", name, SETTINGS)
        return dataclasses.replace(self, **dict(_changed_sections(self, values)))

    def differences(self, other: "Config") -> dict[str, tuple[Any, Any]]:
        """The values in which two configurations differ: name -> (own, other's)."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def _changed_sections(config: Config, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, fields in SECTIONS.items():
        own = {key: values[key] for key in fields if key in values}
        yield name, dataclasses.replace(getattr(config, name), **own)


def dataset_name(dataset: str) -> str:
    """What a data set goes by wherever it lies: the last part of its name.

    >>> dataset_name("uoft-cs/cifar10"), dataset_name("/data/cifar10/")
    ('cifar10', 'cifar10')
    """
    return PurePath(dataset).name or dataset


_CLASSES: Final = {
    "data": Data,
    "network": Network,
    "topology": Topology,
    "optimisation": Optimisation,
    "machine": Machine,
}
SECTIONS: Final[dict[str, dict[str, Setting]]] = {
    name: {field.name: field.metadata["setting"] for field in dataclasses.fields(section)}
    for name, section in _CLASSES.items()
}
SETTINGS: Final[dict[str, Setting]] = {name: one for fields in SECTIONS.values() for name, one in fields.items()}
