"""What the benchmark of training steps trains: a model with its optimizer, dense, with chtconv and with rigl-torch."""

import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from common import seconds
from torch import Tensor, nn

import chtconv
from chtconv.models import build_model

NEVER = 10**9
MODELS: dict[str, Callable[[float], nn.Module]] = {
    name: lambda width, name=name: build_model(name, 10, seed=0, width=width) for name in ("vgg16", "resnet18")
}
BATCHES = {"vgg16": 128, "resnet18": 64}
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-4),
}
Batch = tuple[Tensor, Tensor]


def rigl_scheduler() -> Any:
    """The scheduler of rigl-torch, None where it is not installed."""
    names = ("torchvision", "torchvision.models", "torchvision.models.resnet")
    if "torchvision" not in sys.modules:
        # It is imported for two classes that are compared with, and no more.
        vision, models, resnet = (sys.modules.setdefault(name, ModuleType(name)) for name in names)
        vision.models, models.resnet = models, resnet
        resnet.BasicBlock = resnet.Bottleneck = type("Block", (), {})
    try:
        from rigl_torch.RigL import RigLScheduler
    except ImportError:
        return None
    return RigLScheduler


def random_batch(model: str, size: int | None = None) -> Batch:
    size = size or BATCHES[model]
    return torch.randn(size, 3, 32, 32), torch.randint(10, (size,))


class Dense:
    """A model with its optimizer."""

    memory_format = torch.channels_last

    def __init__(self, model: str, optimizer: str, width: float) -> None:
        self.model = MODELS[model](width).to(memory_format=self.memory_format)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())

    def gradients(self, batch: Batch) -> None:
        images, labels = batch
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(images.to(memory_format=self.memory_format)), labels).backward()

    def step(self, batch: Batch) -> None:
        self.gradients(batch)
        self.optimizer.step()


class Contiguous(Dense):
    memory_format = torch.contiguous_format


class Sparse(Dense):
    """The same with chtconv."""

    def __init__(self, *which: Any, method: str, sparsity: float, interval: int = NEVER) -> None:
        super().__init__(*which)
        self.topology = chtconv.sparsify(
            self.model, self.optimizer, method=method, sparsity=sparsity, interval=interval
        )

    def last_gradients(self, batch: Batch) -> None:
        """Those of the step before an evolution."""
        self.topology.capture_gradients()
        self.gradients(batch)

    def evolving_step(self, batch: Batch) -> tuple[float, float]:
        """Seconds of a step that ends with an evolution, without it, and of the evolution."""
        before = seconds(lambda: self.last_gradients(batch))
        evolution = seconds(self.topology.evolve)
        return before + seconds(self.optimizer.step), evolution


class RigLTorch(Contiguous):
    """The same with rigl-torch, which evolves instead of the optimizer's step, as RigL was published."""

    def __init__(self, *which: Any, sparsity: float, interval: int = NEVER) -> None:
        super().__init__(*which)
        options = {"dense_allocation": 1 - sparsity, "delta": interval, "T_end": 10 * NEVER}
        self.scheduler = rigl_scheduler()(self.model, self.optimizer, **options)

    def step(self, batch: Batch) -> None:
        self.gradients(batch)
        if self.scheduler():
            self.optimizer.step()

    def last_gradients(self, batch: Batch) -> None:
        self.scheduler.step = self.scheduler.delta_T - 1
        self.gradients(batch)

    def evolving_step(self, batch: Batch) -> tuple[float, float]:
        return seconds(lambda: self.last_gradients(batch)), seconds(self.scheduler)
