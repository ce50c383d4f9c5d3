"""What a person sees while a run goes on: a bar on a terminal, a line an epoch elsewhere."""

from typing import Any, TextIO

from tqdm import tqdm

from chtconv.training.evaluate import Score


class Progress:
    """What :func:`chtconv.training.train` reports to; this one shows nothing."""

    def start(self, *, epochs: int, steps_per_epoch: int, done: int) -> None:
        """Training begins, or goes on after ``done`` epochs."""

    def step(self, steps: int, score: Score) -> None:
        """``steps`` more steps are done; ``score`` is the epoch's so far."""

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """An epoch is kept; ``row`` is its line of metrics.jsonl."""

    def close(self) -> None:
        """Training ended, well or not."""


class Lines(Progress):
    """A line an epoch on ``stream``, for logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Print the line."""
        print(epoch_line(row, epochs), file=self._stream, flush=True)


class Bar(Progress):
    """A bar over the whole training on ``stream``, with loss, accuracy and time left; above it a line an epoch.

    ``note`` ends what is shown beside the bar.
    """

    def __init__(self, stream: TextIO, note: str = "") -> None:
        self._stream = stream
        self._note = note
        self._bar: tqdm[Any] | None = None

    def start(self, *, epochs: int, steps_per_epoch: int, done: int) -> None:
        """Show the bar."""
        self._bar = tqdm(
            total=epochs * steps_per_epoch,
            initial=done * steps_per_epoch,
            file=self._stream,
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}",
            leave=False,
            dynamic_ncols=True,
        )

    def step(self, steps: int, score: Score) -> None:
        """Move the bar."""
        if self._bar is not None:
            text = f"loss {score.loss:.3f}, accuracy {score.accuracy:.1%}{self._note}"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(steps)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Print the line."""
        tqdm.write(epoch_line(row, epochs), file=self._stream)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One line for an epoch's row of metrics.jsonl.

    >>> row = {"epoch": 3, "train_loss": 0.5, "train_accuracy": 0.9, "test_accuracy": 0.8, "seconds": 4.2}
    >>> epoch_line(row | {"validation_accuracy": None, "learning_rate": 0.1, "evolutions": 3}, 10)
    'epoch  3/10  loss 0.500  train 90.0%  test 80.0%  rate 0.1  evolutions 3  4.2 s'
    """
    held_out = f"validation {row['validation_accuracy']:.1%}  " if row["validation_accuracy"] is not None else ""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.3f}  "
        f"train {row['train_accuracy']:.1%}  {held_out}test {row['test_accuracy']:.1%}  "
        f"rate {row['learning_rate']:.2g}  evolutions {row['evolutions']}  {row['seconds']:.1f} s"
    )
