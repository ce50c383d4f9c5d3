"""A run small enough to be trained in a second, and a Ctrl-C at a chosen moment."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from chtconv.training import Config
from chtconv.training.progress import Progress


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small gain nothing from threads, and lose much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_values() -> dict[str, Any]:
    """Six batches of digits an epoch."""
    return {
        "width": 1 / 16,
        "head": 16,
        "epochs": 3,
        "batch_size": 256,
        "evolutions_per_epoch": 2.0,
        "threads": 1,
        "device": "cpu",
    }


@pytest.fixture
def tiny(tiny_values: dict[str, Any]) -> Config:
    return Config().replace(**tiny_values)


class Stop(Progress):
    """Presses Ctrl-C after so many steps, or so many epochs."""

    def __init__(self, *, steps: int = -1, epochs: int = -1) -> None:
        self._steps, self._epochs = steps, epochs

    def step(self, *_: Any) -> None:
        self._steps -= 1
        if self._steps == 0:
            raise KeyboardInterrupt

    def epoch(self, *_: Any) -> None:
        self._epochs -= 1
        if self._epochs == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="session")
def stop() -> type[Stop]:
    return Stop
