"""How good a model is on images it was not trained on."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from chtconv.data import Batches
from chtconv.training.device import autocast


class TrainingDiverged(ArithmeticError):  # noqa: N818 - an event, not a mistake in the program
    """The loss is no longer a number; the message names epoch and step."""


class Score(NamedTuple):
    """Means over a set of images: cross-entropy in nats, and the share that is classified correctly."""

    loss: float
    accuracy: float


class Meter:
    """Sums up the batches of one epoch on the device, and reads them back seldom.

    Args:
        batches: how many there will be.
        device: where they are computed.
        read_every: batches between two looks at the losses; each is a wait for the device.
    """

    def __init__(self, batches: int, device: torch.device, read_every: int = 1) -> None:
        self._losses = torch.zeros(batches, device=device)
        self._counts = torch.zeros(batches)
        self._correct = torch.zeros((), device=device, dtype=torch.int64)
        self._read_every = read_every
        self._seen = 0
        self._read = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: its mean loss, logits [batch, classes] and labels [batch]."""
        self._losses[self._seen] = loss.detach()
        self._counts[self._seen] = len(labels)
        self._correct += (logits.detach().argmax(1) == labels).sum()
        self._seen += 1

    def due(self) -> bool:
        """Whether enough batches came in since the last reading."""
        return self._seen - self._read >= self._read_every or self._seen == len(self._losses)

    def first_unusable(self) -> int | None:
        """The first batch since the last reading whose loss is not finite, counted from 0; None if all are."""
        unread = self._losses[self._read : self._seen].isfinite().logical_not().nonzero()
        first = self._read + int(unread[0]) if len(unread) else None
        self._read = self._seen
        return first

    def score(self) -> Score:
        """Loss and accuracy of the images so far."""
        counts = self._counts[: self._seen].double()
        images = float(counts.sum())
        loss = float((self._losses[: self._seen].cpu().double() * counts).sum()) / images
        return Score(loss, int(self._correct) / images)


def evaluate(model: nn.Module, batches: Batches, device: torch.device, precision: str) -> Score:
    """Loss and accuracy of ``model`` in evaluation mode; its own mode is put back afterwards.

    Raises:
        TrainingDiverged: if the loss is not a finite number.
    """
    meter = Meter(len(batches), device, read_every=len(batches))
    training = model.training
    model.eval()
    with torch.no_grad(), autocast(device, precision):
        for images, labels in batches.epoch(0):
            logits = model(images).float()
            meter.add(functional.cross_entropy(logits, labels), logits, labels)
    model.train(training)
    score = meter.score()
    if not math.isfinite(score.loss):
        raise TrainingDiverged(f"the loss on held-out images is {score.loss}")
    return score
