"""The training loop: epochs of steps, an evaluation and a checkpoint after each."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from chtconv.errors import ConfigurationError
from chtconv.training.config import Config
from chtconv.training.device import reproducible, resolve, seed_dropout, synchronise
from chtconv.training.evaluate import Meter, Score, TrainingDiverged, evaluate
from chtconv.training.progress import Progress
from chtconv.training.run import Run, prepare
from chtconv.training.run_folder import CHECKPOINT, RunFolder
from chtconv.training.schedule import learning_rate
from chtconv.training.summary import summarise

# A look at the losses waits for a GPU, and costs nothing on a CPU.
_READ_EVERY = {"cpu": 1, "cuda": 50}


class OutOfTime(RuntimeError):  # noqa: N818 - an event, not a mistake in the program
    """The next epoch would end too late; the run goes on from its last epoch when it is resumed."""


def train(
    config: Config,
    out: Path | str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    deadline: float | None = None,
) -> dict[str, Any]:
    """Train the network that ``config`` describes, and write the run to the folder ``out``.

    Everything is loaded and built before the folder is made. After every epoch the folder holds a checkpoint,
    from which ``resume`` goes on with the same bits as if nothing had happened. Resuming a complete run returns
    its summary.

    Args:
        config: what to train.
        out: folder of the run; see :mod:`chtconv.training.run_folder` for its files.
        resume: go on with the run in ``out``, which must have the same configuration; its data set may have moved.
        overwrite: replace the run in ``out``.
        progress: told about every step and epoch; nothing is shown by default.
        deadline: an epoch that would end after this time, in seconds of :func:`time.time`, is not begun.

    Returns:
        The content of summary.json.

    Raises:
        ConfigurationError: naming what cannot be used; nothing has been written then.
        OutOfTime: if an epoch would end after ``deadline``; those before it are kept.
        TrainingDiverged: if the loss is no finite number; the last whole epoch is kept.
        StorageError: if a file cannot be written; the last checkpoint is kept.
    """
    folder, progress = RunFolder(out), progress or Progress()
    folder.check(config, resume=resume, overwrite=overwrite)
    if resume and folder.is_complete():
        with contextlib.suppress(OSError):  # a folder of results may be read-only
            folder.remove(CHECKPOINT)
        return folder.stored_summary()
    machine = config.machine
    with reproducible(resolve(machine.device), machine.threads, machine.precision):
        run = prepare(config)
        with folder.opened(config, resume=resume, overwrite=overwrite):
            if resume and folder.is_complete():  # by another process, while this one prepared
                return folder.stored_summary()
            if resume and folder.has_checkpoint():
                _restore(run, folder)
            try:
                _epochs(run, folder, progress, deadline)
            except TrainingDiverged as error:
                raise TrainingDiverged(f"{error}; {_kept(run, folder)}; a lower --lr may help") from error
            finally:
                progress.close()
            summary = summarise(run)
            folder.finish(run.weights(), run.masks(), summary)
    return summary


def _restore(run: Run, folder: RunFolder) -> None:
    state = folder.load_checkpoint(run.device)
    try:
        run.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigurationError(
            f"the checkpoint in {folder.path} does not fit the run: {reason}; without {folder.path} the run starts anew"
        ) from error
    folder.save_tables(run.metrics, run.records)


def _epochs(run: Run, folder: RunFolder, progress: Progress, deadline: float | None) -> None:
    epochs = run.config.optimisation.epochs
    progress.start(epochs=epochs, steps_per_epoch=len(run.batches), done=run.epoch)
    while run.epoch < epochs:
        if deadline is not None and time.time() + longest_epoch(run.metrics) > deadline:
            raise OutOfTime(f"no time for epoch {run.epoch + 1} of {epochs}; {_kept(run, folder)}")
        row = _epoch(run, progress)
        run.metrics.append(row)
        run.epoch += 1
        folder.save_epoch(run.state_dict(), run.metrics, run.records)
        progress.epoch(row, epochs)


def _epoch(run: Run, progress: Progress) -> dict[str, Any]:
    """Train for an epoch, evaluate, and return the line of metrics.jsonl."""
    precision, steps = run.config.machine.precision, len(run.batches)
    began = time.perf_counter()
    trained, evolving = _train_epoch(run, progress)
    seconds = time.perf_counter() - began
    scores: dict[str, Score | None] = {}
    for name in ("validation", "test"):
        batches = run.evaluation_batches(name)
        scores[name] = None
        if batches is not None:
            try:
                scores[name] = evaluate(run.model, batches, run.device, precision)
            except TrainingDiverged as error:
                raise TrainingDiverged(f"after epoch {run.epoch + 1}, step {steps} of {steps}, {error}") from error
    evaluated = time.perf_counter() - began - seconds
    return {
        "epoch": run.epoch + 1,
        "steps": (run.epoch + 1) * steps,
        "learning_rate": run.step.rate,
        "train_loss": trained.loss,
        "train_accuracy": trained.accuracy,
        **{f"{name}_loss": score and score.loss for name, score in scores.items()},
        **{f"{name}_accuracy": score and score.accuracy for name, score in scores.items()},
        "sparsity": run.topology.stats()["sparsity"] if run.topology else 0.0,
        "evolutions": run.topology.evolutions if run.topology else 0,
        "seconds": seconds,
        "evolution_seconds": evolving,
        "evaluation_seconds": evaluated,
        "images_per_second": len(run.dataset.train) / seconds,
    }


def _train_epoch(run: Run, progress: Progress) -> tuple[Score, float]:
    """Train for an epoch: its score, and the seconds spent on evolutions."""
    settings, steps = run.config, len(run.batches)
    seed_dropout(settings.machine.seed, run.epoch, run.device)
    meter = Meter(steps, run.device, _READ_EVERY[run.device.type])
    run.model.train()
    unread, evolving = 0, 0.0
    for number, draw in enumerate(run.batches.draws(run.epoch)):
        rate, evolves = learning_rate(run.epoch * steps + number, steps, settings.optimisation), run.step.evolves
        meter.add(*run.step.forward(draw, rate))
        unread += 1
        # An evolution waits for the device in any case, and can do nothing with weights that are not finite.
        if meter.due() or evolves:
            _check(meter, run.epoch, steps)
            progress.step(unread, meter.score())
            unread = 0
        run.step.backward()
        evolving += _update(run, evolves)
    return meter.score(), evolving


def _update(run: Run, evolves: bool) -> float:
    """The optimizer's step; the seconds it took if the topology evolved with it, else 0."""
    if run.topology is None or not evolves:
        run.step.update()
        return 0.0
    evolutions = run.topology.evolutions
    synchronise(run.device)
    began = time.perf_counter()
    run.step.update()
    synchronise(run.device)
    return time.perf_counter() - began if run.topology.evolutions > evolutions else 0.0


def _check(meter: Meter, epoch: int, steps: int) -> None:
    first = meter.first_unusable()
    if first is not None:
        raise TrainingDiverged(f"the loss is not finite in epoch {epoch + 1}, step {first + 1} of {steps}")


def _kept(run: Run, folder: RunFolder) -> str:
    if not folder.has_checkpoint():
        return "no epoch was complete, so nothing was kept"
    return f"epoch {run.epoch} is kept in {folder.path}{os.sep}"


def longest_epoch(metrics: list[dict[str, Any]]) -> float:
    """Seconds of the longest epoch so far, its evaluation included; 0 before the first.

    >>> longest_epoch([{"seconds": 20.0, "evaluation_seconds": 2.0}, {"seconds": 19.0, "evaluation_seconds": 2.0}])
    22.0
    """
    return max((row["seconds"] + row["evaluation_seconds"] for row in metrics), default=0.0)
