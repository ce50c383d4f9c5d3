"""Whole training steps, data included: those of ``chtconv train``, and the loop that one would write; see ways.py."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data import Dataset as Source

from chtconv.data import Batches, ImageSet, load_dataset
from chtconv.data.batches import Draw
from chtconv.flops import count_flops
from chtconv.models import build_model
from chtconv.sparse_compute import backends
from chtconv.training import Config
from chtconv.training.device import reproducible, synchronise
from chtconv.training.evaluate import Meter
from chtconv.training.run import Run, prepare
from chtconv.training.step import Step, cuda_graph

# As many as CIFAR has, so that epochs begin as seldom; which images they are changes no time.
IMAGES = 50_000
READ_EVERY = {"cpu": 1, "cuda": 50}


def images(device: torch.device, count: int) -> tuple[ImageSet, Tensor, Tensor]:
    """So many images of 32x32, with mean and standard deviation of their channels."""
    data = load_dataset("digits", device=device)
    times = -(-count // len(data.train))
    repeated = (each.repeat(times, *[1] * (each.dim() - 1))[:count] for each in (data.train.images, data.train.labels))
    return ImageSet(*repeated), data.mean, data.std


class Chtconv:
    """Steps of ``chtconv train`` without evolution: "steps".

    Args:
        steps: in one action.
        device: "cpu" or "cuda".
        count: images of the data set.
        at_once: runs side by side in this process, each in a stream of its own: so many times the steps.
        precision: see :class:`chtconv.training.config.Machine`, like ``values``, anything of the configuration.
    """

    def __init__(
        self,
        steps: int,
        device: str,
        count: int = IMAGES,
        at_once: int = 1,
        precision: str = "float32",
        **values: Any,
    ) -> None:
        self._stack, self._steps, self._device = contextlib.ExitStack(), steps, torch.device(device)
        self._stack.enter_context(reproducible(self._device, None, precision))
        config = Config().replace(**{"flip": True, "crop": 0} | values, device=device, precision=precision)
        self._trained = [self._started(config, count) for _ in range(at_once)]
        self.actions: dict[str, Callable[[], object]] = {"steps": self.run}
        self.run()
        self.about = {"images": steps * config.data.batch_size * at_once} | _computed(self._trained[0].run)

    def run(self) -> None:
        """The steps, one of each run in turn, until the device has done them."""
        meters = [each.meter(self._steps) for each in self._trained]
        for _ in range(self._steps):
            for each, meter in zip(self._trained, meters, strict=True):
                each.step(meter)
        synchronise(self._device)

    def _started(self, config: Config, count: int) -> "_Trained":
        stream = _stream(self._device)
        with stream:
            return _Trained(config, count, stream)

    def close(self) -> None:
        self._stack.close()


class _Trained:
    """A run, its batches without end, and the stream in which it computes."""

    def __init__(self, config: Config, count: int, stream: Any) -> None:
        run = prepare(config)
        train, mean, std = images(run.device, count)
        data, machine = config.data, config.machine
        batches = Batches(train, mean=mean, std=std, batch_size=data.batch_size, seed=0, flip=data.flip, crop=data.crop)
        recorder = cuda_graph if machine.step == "captured" else None
        own = (run.model, run.optimizer, run.topology, batches, run.device, machine.precision, recorder)
        run.step = Step(*own)
        run.model.train()
        self.run, self._draws, self._stream = run, whole_batches(batches), stream

    def meter(self, steps: int) -> Meter:
        """Made in the stream that fills it: streams do not wait for one another."""
        with self._stream:
            return Meter(steps, self.run.device, READ_EVERY[self.run.device.type])

    def step(self, meter: Meter) -> None:
        """What the training loop does in a step."""
        with self._stream:
            step = self.run.step
            meter.add(*step.forward(next(self._draws), 0.01))
            if meter.due():
                meter.first_unusable()
                meter.score()
            step.backward()
            step.update()


def _stream(device: torch.device) -> Any:
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()


def whole_batches(batches: Batches) -> Iterator[Draw]:
    """Epoch after epoch, without the smaller batch at the end."""
    for epoch in itertools.count():
        for draw in batches.draws(epoch):
            if len(draw.chosen) == batches.batch_size:
                yield draw


def _computed(run: Run) -> dict[str, Any]:
    """What is computed for an image: FLOPs of the kernels in use, which skip disabled links or not."""
    topology = run.topology
    chosen = backends(topology) if topology is not None else {}
    sparse = [name for name, backend in chosen.items() if backend.kind == "sparse"]
    network = run.config.network
    # Torch counts no kernels but its own.
    plain = build_model(network.model, 10, seed=0, width=network.width, head=network.head, dropout=network.dropout)
    masks = run.masks()
    densities = {name: float(masks[name].double().mean()) for name in sparse}
    counted = count_flops(plain, torch.zeros(1, 3, 32, 32), densities=densities)
    about: dict[str, Any] = {"flops": counted.sparse_step}
    return about | ({"sparse_layers": f"{len(sparse)} of {len(chosen)}"} if chosen else {})


class Decoded(Source[tuple[Tensor, int]]):
    """Images in memory, mirrored and normalised one by one."""

    def __init__(self, images: ImageSet, mean: Tensor, std: Tensor) -> None:
        self._images, self._mean, self._std = images, mean.view(3, 1, 1), std.view(3, 1, 1)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._images.images[index].float() / 255
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return (image - self._mean) / self._std, int(self._images.labels[index])


class Plain:
    """A loop as tutorials have it: a DataLoader, torch's defaults, ``item()`` in every step; "steps".

    Args:
        steps: in one action, which is an epoch.
        device: "cpu" or "cuda".
        workers: processes of the DataLoader.
        count: images of the data set.
        precision: "float32", which is what torch takes by itself, or "bf16".
        width: of the model, like ``head``.
        batch_size: images.
        optimizer: "sgd" or "adam".
    """

    def __init__(
        self,
        steps: int,
        device: str,
        workers: int = 2,
        count: int = IMAGES,
        precision: str = "float32",
        width: float = 1.0,
        head: int | None = None,
        batch_size: int = 128,
        optimizer: str = "sgd",
    ) -> None:
        self._device, self._bf16 = torch.device(device), precision == "bf16"
        source = Decoded(*images(torch.device("cpu"), count))
        # An epoch is an action: what workers prepare for the next one, nobody's clock would see.
        self._loader = DataLoader(
            source,
            batch_size,
            sampler=RandomSampler(source, num_samples=steps * batch_size),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device == "cuda",
        )
        self._model: nn.Module = build_model("vgg16", 10, seed=0, width=width, head=head).to(self._device)
        weights = self._model.parameters()
        if optimizer == "adam":
            self._optimizer: torch.optim.Optimizer = torch.optim.Adam(weights, lr=0.001)
        else:
            self._optimizer = torch.optim.SGD(weights, lr=0.01, momentum=0.9, weight_decay=5e-4)
        flops = count_flops(self._model, torch.zeros(1, 3, 32, 32, device=self._device)).dense_step
        self.about: dict[str, Any] = {"images": steps * batch_size, "flops": flops}
        self.actions: dict[str, Callable[[], object]] = {"steps": self.run}
        self.run()

    def run(self) -> None:
        total, right = 0.0, 0
        for images, labels in self._loader:
            images, labels = images.to(self._device), labels.to(self._device)
            self._optimizer.zero_grad()
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
                logits = self._model(images)
                loss = functional.cross_entropy(logits, labels)
            loss.backward()
            self._optimizer.step()
            total += loss.item()
            right += (logits.argmax(1) == labels).sum().item()
        synchronise(self._device)


class Updates:
    """Optimizer steps of all weights of VGG16, by how they are computed: "plain", "foreach" and "fused".

    Args:
        optimizer: "sgd" or "adam".
        width: of the model, like ``head``.
    """

    def __init__(self, optimizer: str, width: float = 1.0, head: int | None = None) -> None:
        self.about: dict[str, Any] = {}
        self.actions: dict[str, Callable[[], object]] = {}
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
        values = {"momentum": 0.9, "weight_decay": 5e-4} if optimizer == "sgd" else {}
        for name, flags in {
            "plain": {"foreach": False},
            "foreach": {"foreach": True},
            "fused": {"fused": True},
        }.items():
            model = build_model("vgg16", 10, seed=0, width=width, head=head)
            for weight in model.parameters():
                weight.grad = torch.randn_like(weight)
            self.actions[name] = kind(model.parameters(), lr=1e-3, **values, **flags).step
            self.actions[name]()


class Product:
    """A product of two square matrices: "product". What the device can do at most.

    Args:
        device: "cpu" or "cuda".
        size: rows.
        precision: "float32", "tf32" or "bf16".
    """

    def __init__(self, device: str, size: int, precision: str) -> None:
        self._device = torch.device(device)
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(reproducible(self._device, None, precision))
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._factors = [torch.randn(size, size, device=self._device).to(dtype) for _ in range(2)]
        self.about: dict[str, Any] = {"flops": 2 * size**3}
        self.actions: dict[str, Callable[[], object]] = {"product": self.run}
        self.run()

    def run(self) -> None:
        torch.mm(*self._factors)
        synchronise(self._device)

    def close(self) -> None:
        self._stack.close()
