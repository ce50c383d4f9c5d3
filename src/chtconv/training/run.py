"""Everything that training changes, put together from a configuration, and its state between two epochs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn

from chtconv.data import Batches, Dataset, load_dataset
from chtconv.flops import count_flops
from chtconv.layers.find import find_layers
from chtconv.methods import method
from chtconv.models import WITHOUT_PERCEPTRON, build_model
from chtconv.onednn import any_overruns
from chtconv.sparse_compute.acceleration import Acceleration, accelerate
from chtconv.topology import Topology, sparsify
from chtconv.training.config import DENSE, Config
from chtconv.training.device import check_backend, check_machine, is_fused, resolve
from chtconv.training.environment import describe
from chtconv.training.step import Step, cuda_graph

_EVALUATION_BATCH = 256


@dataclass
class Run:
    """A run between two epochs.

    Attributes:
        config: what decides it.
        device: what it is computed on.
        dataset: the images.
        model: the network, on the device, channels last where its dense kernels may.
        optimizer: of all its parameters.
        topology: the links of its convolutions; None for a dense run.
        batches: training batches.
        step: the training step.
        environment: what this process computes with, see :mod:`chtconv.training.environment`.
        earlier: what earlier processes computed with, each that was another one once.
        epoch: epochs done.
        metrics: a row an epoch done.
        started: UTC, ISO 8601.
    """

    config: Config
    device: torch.device
    dataset: Dataset
    model: nn.Module
    optimizer: torch.optim.Optimizer
    topology: Topology | None
    batches: Batches
    step: Step
    environment: dict[str, Any]
    earlier: list[dict[str, Any]] = field(default_factory=list)
    epoch: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @property
    def records(self) -> list[dict[str, Any]]:
        """What each evolution of each layer did since the start."""
        return list(self.topology.records) if self.topology else []

    def evaluation_batches(self, name: str) -> Batches | None:
        """Batches of the "test" or "validation" images, in order; None if there are none."""
        images = getattr(self.dataset, name)
        if images is None or not len(images.labels):
            return None
        data = self.dataset
        return Batches(images, mean=data.mean, std=data.std, batch_size=_EVALUATION_BATCH, seed=None)

    @property
    def _acceleration(self) -> Acceleration | None:
        acceleration = self.topology.acceleration if self.topology else None
        return acceleration if isinstance(acceleration, Acceleration) else None

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on as if it had never stopped: tensors and plain values."""
        return {
            "epoch": self.epoch,
            "device": self.device.type,
            "labels": self.dataset.labels,
            "metrics": self.metrics,
            "started": self.started,
            "environments": [*self.earlier, self.environment],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "topology": self.topology.state_dict() if self.topology else None,
            "backend": self._acceleration.state_dict() if self._acceleration else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state. The next step checks that masks, weights and optimizer state fit each other.

        Raises:
            ValueError: the state is of another kind of device, whose optimizer and bits are others, or of other images.
        """
        kind = state.get("device", self.device.type)
        if kind != self.device.type:
            raise ValueError(f"it was computed on {kind!r}, and this is {self.device.type!r}")
        if state.get("labels", self.dataset.labels) != self.dataset.labels:
            raise ValueError(f"it was computed on other images than those of {self.dataset.name!r}: labels differ")
        if self.topology:
            self.topology.load_state_dict(state["topology"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step.forget()
        if self._acceleration:
            self._acceleration.load_state_dict(state["backend"])
        self.epoch, self.metrics, self.started = state["epoch"], state["metrics"], state["started"]
        self.earlier = [each for each in state.get("environments", [{}]) if each != self.environment]

    def flops(self) -> dict[str, float]:
        """Floating point operations so far, those of the same network with all links beside them.

        ``inference`` is for one image with the links of now, ``training`` for all images of all epochs; see
        :mod:`chtconv.flops.counting` for what counts.
        """
        # A plain copy of the network: what accelerates this one is no operation that torch could count.
        plain, image = _model_of(self.config, self.dataset, torch.device("cpu")), self.dataset.train.images[:1]
        stats = self.topology.stats()["layers"] if self.topology else {}
        densities = {name: layer["density"] for name, layer in stats.items()}
        counted = count_flops(plain, torch.zeros(image.shape), densities=densities)
        steps = self.epoch * len(self.batches)
        by_layer = {name: 3.0 * layer.dense * steps for name, layer in counted.layers.items()}
        by_layer |= {name: layer["training_flops"] for name, layer in stats.items()}
        images_a_step = len(self.dataset.train) / len(self.batches)
        return {
            "inference": counted.sparse,
            "dense_inference": counted.dense,
            "training": sum(by_layer.values()) * images_a_step,
            "dense_training": counted.dense_step * steps * images_a_step,
        }

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers under the model's own names."""
        return dict(self.model.state_dict())

    def masks(self) -> dict[str, Tensor]:
        """Bool masks under the names of their weights."""
        return dict(self.topology.masks) if self.topology else {}


def prepare(config: Config) -> Run:
    """The run that ``config`` describes, before its first step.

    Raises:
        ConfigurationError: naming what cannot be used: the data set, the device, a value.
    """
    machine, data = config.machine, config.data
    device = resolve(machine.device)
    check_machine(machine, device)
    backend = check_backend(machine.backend, device, config.topology.method)
    dataset = load_dataset(
        data.dataset, image_size=data.image_size, validation=data.validation, seed=machine.seed, device=device
    )
    model = _model_of(config, dataset, device)
    optimizer = _optimizer(config, model, device)
    batches = Batches(
        dataset.train,
        mean=dataset.mean,
        std=dataset.std,
        batch_size=data.batch_size,
        seed=machine.seed,
        flip=data.flip,
        crop=data.crop,
        memory_format=_memory_format(model, device),
    )
    topology = _topology(config, model, optimizer, len(batches))
    if topology:
        accelerate(model, topology, backend=backend)
    recorder = cuda_graph if machine.step == "captured" else None
    step = Step(model, optimizer, topology, batches, device, machine.precision, recorder)
    return Run(config, device, dataset, model, optimizer, topology, batches, step, describe(device))


def check_network(config: Config) -> None:
    """Refuses what can be refused before there are images: a network that cannot be built, layers it does not have.

    Raises:
        ConfigurationError: naming the value that cannot be used.

    >>> check_network(Config().replace(layers="features.0, feature.3"))
    Traceback (most recent call last):
    chtconv.errors.ConfigurationError: layers='feature.3' matches no layer; those of the model are features.0, ...
    """
    # As narrow as can be: only the names of its layers matter.
    head = config.network.head if config.network.model in WITHOUT_PERCEPTRON else None
    model = _model(config.replace(width=1e-3, head=head), classes=1, channels=1)
    if config.topology.method != DENSE:
        find_layers(model, config.topology.chosen_layers)


def _model(config: Config, classes: int, channels: int) -> nn.Module:
    network = config.network
    return build_model(
        network.model,
        classes,
        seed=config.machine.seed,
        width=network.width,
        head=network.head,
        dropout=network.dropout,
        in_channels=channels,
    )


def _model_of(config: Config, dataset: Dataset, device: torch.device) -> nn.Module:
    model = _model(config, len(dataset.classes), dataset.train.images.shape[1])
    return model.to(device=device, memory_format=_memory_format(model, device))  # type: ignore[call-overload,no-any-return]


def _memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    return torch.contiguous_format if device.type == "cpu" and any_overruns(model) else torch.channels_last


def _optimizer(config: Config, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    settings, fused = config.optimisation, is_fused(config.machine, device)
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if fused:
        options["fused"] = True
        if device.type == "cuda":
            # Read by the kernel: a number would be part of it, and the same in every replay of a captured step.
            options["lr"] = torch.tensor(settings.lr, device=device)
    if settings.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), **options)
    return torch.optim.SGD(model.parameters(), momentum=settings.momentum, **options)


def _topology(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Topology | None:
    settings = config.topology
    if settings.method == DENSE:
        return None
    total = steps * config.optimisation.epochs
    return sparsify(
        model,
        optimizer,
        sparsity=settings.sparsity,
        method=method(settings.method, **settings.changes()),
        predictor=settings.predictor,
        graph=settings.graph,
        windows=settings.windows,
        zeta=settings.zeta,
        zeta_schedule=settings.zeta_schedule,
        interval=max(1, round(steps / settings.evolutions_per_epoch)),
        stop=max(1, round(settings.stop_fraction * total)),
        total_steps=total,
        layers=settings.chosen_layers,
        allocation=settings.allocation,
        distribution=settings.distribution,
        initial_sparsity=settings.initial_sparsity,
        seed=config.machine.seed,
    )
