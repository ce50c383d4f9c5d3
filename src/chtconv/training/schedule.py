"""The learning rate of a step: a linear rise, then a fall along a line or a cosine.

With rate r, warm-up W, end of the fall E (steps), final share f, at step s = 0, 1, ...:

    s < W:      r (s + 1) / W
    W <= s < E: r (f + (1 - f) fall(u)),  u = (s - W) / (E - W),
                fall(u) = 1 - u (linear), (1 + cos(pi u)) / 2 (cosine), 1 (constant)
    s >= E:     r f, or r if the rate is constant

The paper calls its schedules "Linear-Linear" and "Linear-CosAnnealing" (appendix A); the readings of the former
are in :mod:`chtconv.training.recipes`.
"""

import math

from chtconv.training.config import Optimisation


def learning_rate(step: int, steps_per_epoch: int, optimisation: Optimisation) -> float:
    """The learning rate of optimizer step ``step`` (from 0).

    >>> settings = Optimisation(epochs=4, lr=1.0, warmup_epochs=1, schedule="linear")
    >>> [learning_rate(step, 2, settings) for step in range(8)][:4]
    [0.5, 1.0, 1.0, 0.8333333333333334]
    """
    rate, final = optimisation.lr, optimisation.final_lr
    warmup = optimisation.warmup_epochs * steps_per_epoch
    end = optimisation.decay_end * optimisation.epochs * steps_per_epoch
    if step < warmup:
        return rate * min(1.0, (step + 1) / warmup)
    if optimisation.schedule == "constant":
        return rate
    if step >= end:
        return rate * final
    done = (step - warmup) / (end - warmup)
    fall = 1 - done if optimisation.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return rate * (final + (1 - final) * fall)
