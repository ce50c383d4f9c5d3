"""The learning rate against torch's own schedulers, and against numbers worked out by hand."""

import pytest
import torch
from torch.optim import lr_scheduler

from chtconv.training.config import Optimisation
from chtconv.training.schedule import learning_rate


def rates(steps_per_epoch: int, settings: Optimisation) -> list[float]:
    return [learning_rate(step, steps_per_epoch, settings) for step in range(settings.epochs * steps_per_epoch)]


def torch_rates(steps: int, warmup: int, rate: float, after: str, final: float, end: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    rising = lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1)
    falling: lr_scheduler.LRScheduler
    if after == "linear":
        falling = lr_scheduler.LinearLR(optimizer, 1.0, max(final, 1e-12), end - warmup)
    else:
        falling = lr_scheduler.CosineAnnealingLR(optimizer, end - warmup, rate * final)
    both = lr_scheduler.SequentialLR(optimizer, [rising, falling], [warmup])
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    return found


@pytest.mark.parametrize("after", ["linear", "cosine"])
@pytest.mark.parametrize("final", [0.0, 0.01])
@pytest.mark.parametrize(("epochs", "warmup", "steps"), [(12, 1, 7), (10, 5, 3), (4, 2, 1)])
def test_agrees_with_torch(after: str, final: float, epochs: int, warmup: int, steps: int) -> None:
    settings = Optimisation(epochs=epochs, lr=0.1, warmup_epochs=warmup, schedule=after, final_lr=final)
    expected = torch_rates(epochs * steps, warmup * steps, 0.1, after, final, epochs * steps)
    assert rates(steps, settings) == pytest.approx(expected, abs=1e-9)


def test_linear_linear_ends_at_zero_by_hand() -> None:
    settings = Optimisation(epochs=5, lr=1.0, warmup_epochs=2, schedule="linear")
    assert rates(2, settings) == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_official_reading_holds_a_hundredth_over_the_last_tenth() -> None:
    settings = Optimisation(
        epochs=10, lr=0.01, warmup_epochs=1, schedule="linear", final_lr=0.01, decay_end=0.9
    )  # fmt: skip
    found = rates(10, settings)
    assert found[9] == found[10] == 0.01
    assert found[50] == pytest.approx(0.01 * (0.01 + 0.99 * 0.5))
    assert found[90:] == [pytest.approx(1e-4)] * 10


def test_constant_stays_after_the_warm_up() -> None:
    settings = Optimisation(epochs=3, lr=0.5, warmup_epochs=1, schedule="constant", final_lr=0.1, decay_end=0.5)
    assert rates(2, settings) == [0.25, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_warm_up_longer_than_training_or_of_part_of_a_step() -> None:
    assert rates(2, Optimisation(epochs=1, lr=1.0, warmup_epochs=4)) == [1 / 8, 2 / 8]
    assert rates(2, Optimisation(epochs=1, lr=1.0, warmup_epochs=0.25, schedule="constant")) == [1.0, 1.0]
    assert rates(2, Optimisation(epochs=1, lr=1.0, warmup_epochs=0, schedule="cosine")) == [1.0, 0.5]
