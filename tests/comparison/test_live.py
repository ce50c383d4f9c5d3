"""What a person sees: never wider or higher than the terminal, what is at work first, failures with their reason."""

import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chtconv.comparison import live
from chtconv.comparison.board import Board
from chtconv.comparison.cell import Cell
from chtconv.comparison.live import Lines, Live, progress_line, view_on
from chtconv.comparison.outcome import Outcome
from chtconv.errors import ConfigurationError
from chtconv.training import Config

console = pytest.importorskip("rich.console")
live_table = pytest.importorskip("chtconv.comparison.live_table")


def grid(variants: Sequence[str], sparsities: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    base = Config().replace(epochs=12)
    return [Cell(v, base.replace(sparsity=p, seed=s)) for s in seeds for p in sparsities for v in variants]


def train(folder: Path, cell: Cell, epochs: int, accuracy: float = 0.8, validation: float | None = None) -> None:
    """Leave the metrics of so many epochs of 20 seconds and one of evaluation."""
    row = {"seconds": 20.0, "evaluation_seconds": 1.0, "test_accuracy": accuracy, "validation_accuracy": validation}
    (folder / cell.name).mkdir(exist_ok=True)
    (folder / cell.name / "metrics.jsonl").write_text((json.dumps(row) + "\n") * epochs)


def drawn(board: Board, width: int = 80, height: int = 24) -> list[str]:
    screen = console.Console(width=width, height=height, file=io.StringIO())
    screen.print(live_table.LiveTable(board))
    return [line.rstrip() for line in screen.file.getvalue().splitlines()]


@pytest.fixture
def at_work(tmp_path: Path) -> Board:
    """Four cells: one done, one failed, one that runs, one that waits."""
    cells = grid(["SET", "CHTs"], [0.9], [14, 15])
    board = Board(cells, tmp_path)
    train(tmp_path, cells[0], 12, 0.8421)
    board.ended(cells[0], Outcome("done"))
    board.ended(cells[1], Outcome("failed", "the disk is full"))
    train(tmp_path, cells[2], 3)
    board.look({cells[2].name})
    return board


def test_a_grid_of_words(at_work: Board) -> None:
    assert drawn(at_work) == [
        "variant  sparsity  seed 14     seed 15",
        "──────────────────────────────────────",
        "SET           90%    84.21  epoch 4/12",
        "CHTs          90%   failed     waiting",
        "1 done, 1 running, 1 failed, 1 waiting; about 7 min left",
    ]


@pytest.mark.parametrize("width", [80, 44])
def test_brackets_in_names_are_shown_as_they_are(tmp_path: Path, width: int) -> None:
    """By seed, and by sign where that does not fit."""
    names = ["SET [tuned]", "SET [/x]", "SET, [a-z]*"]
    rows = drawn(Board(grid(names, [0.9], range(10)), tmp_path), width=width)
    assert [row.split(" 90%")[0].rstrip() for row in rows if "90%" in row] == names


def test_time_left_is_that_of_the_epochs_left(at_work: Board, tmp_path: Path) -> None:
    # 9 epochs of the one that runs and 12 of the one that waits, of 21 seconds each, one after the other.
    assert at_work.seconds_left() == 21 * 21.0
    at_work.look({cell.name for cell in at_work.cells[2:]})
    assert at_work.seconds_left() == 12 * 21.0  # side by side: the longer one
    at_work.look(set())
    assert at_work.seconds_left() is None


def test_nothing_is_said_about_time_before_the_first_epoch(tmp_path: Path) -> None:
    cells = grid(["SET"], [0.9], [1, 2])
    board = Board(cells, tmp_path)
    board.look({cells[0].name})
    assert board.seconds_left() is None
    assert drawn(board)[-1] == "1 running, 1 waiting"


def test_the_accuracy_is_that_on_the_images_held_out(tmp_path: Path) -> None:
    (cell,) = grid(["SET"], [0.9], [1])
    train(tmp_path, cell, 12, 0.9, validation=0.7)
    board = Board([cell], tmp_path)
    board.ended(cell, Outcome("done"))
    assert board[cell].accuracy == 0.7


def test_runs_of_earlier_sessions_are_done(tmp_path: Path) -> None:
    cells = grid(["SET"], [0.9], [1, 2])
    train(tmp_path, cells[0], 12, 0.75)
    (tmp_path / cells[0].name / "summary.json").write_text("{}")
    assert drawn(Board(cells, tmp_path))[2].split() == ["SET", "90%", "75.00", "waiting"]


def test_a_cell_whose_worker_died_waits_again(at_work: Board) -> None:
    cell = at_work.cells[2]
    at_work.look(set())
    assert at_work[cell].state == "waiting"
    assert at_work.look({cell.name}) == [cell]


LONG = "CHTs, layer graph, temperature 4, zeta 0.5, soft removal"


@pytest.mark.parametrize(
    ("variants", "seeds", "row"),
    [
        (["SET", "CHTs"], 3, "SET           95%   80.00  epoch 4/12     waiting"),
        (["SET", "CHTs"], 7, "SET           95%  80.00  80.00  80.00   4/12     .  .  ."),
        (["SET", LONG], 5, "CHTs, layer…soft removal       95%  80.00  80.00   4/12     .  ."),
        (["SET", LONG], 24, "CHTs, layer…soft removal       90%  ############>...........  12/24    80.00"),
        (["SET", "CHTs"], 60, "CHTs          90%  ##############################>..............  30/60    80.00"),
    ],
)
def test_many_seeds_fit_the_width(tmp_path: Path, variants: list[str], seeds: int, row: str) -> None:
    cells = grid(variants, [0.9, 0.95], range(1, seeds + 1))
    board, half = Board(cells, tmp_path), len(cells) // 2
    for cell in cells[:half]:
        train(tmp_path, cell, 12)
        board.ended(cell, Outcome("done"))
    for cell in cells[half : half + 3]:
        train(tmp_path, cell, 3)
    board.look({cell.name for cell in cells[half : half + 3]})
    lines = drawn(board)
    assert row in lines
    assert max(map(len, lines)) <= 80


def test_rows_at_work_come_before_those_that_wait_and_those_that_are_done(tmp_path: Path) -> None:
    cells = grid(["SET"], [round(0.5 + n / 100, 2) for n in range(40)], [14])
    board = Board(cells, tmp_path)
    for cell in cells[:30]:
        train(tmp_path, cell, 12)
        board.ended(cell, Outcome("done"))
    board.look({cells[30].name, cells[39].name})
    lines = drawn(board, height=15)
    assert len(lines) < 15
    assert [line.split()[1] for line in lines[2:11]] == ["80%", *(f"{n}%" for n in range(81, 88)), "89%"]
    assert lines[11:] == ["and 31 more rows, 30 of them done", "30 done, 2 running, 8 waiting; about 21 min left"]


def test_what_is_left_behind_is_whole(tmp_path: Path) -> None:
    board = Board(grid(["SET"], [round(0.5 + n / 100, 2) for n in range(40)], [14]), tmp_path)
    stream = io.StringIO()
    with Live(board, stream):
        pass
    assert stream.getvalue().count("SET") == 40


def test_lines_tell_starts_ends_and_once_a_minute_how_far_everything_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    cells, stream = grid(["SET", "CHTs"], [0.9], [14, 15]), io.StringIO()
    with Lines(Board(cells, tmp_path), stream) as view:
        train(tmp_path, cells[1], 3)
        for clock[0] in range(1000, 1101):
            view.look({cell.name for cell in cells[:2]})
        train(tmp_path, cells[0], 12, 0.8421)
        view.ended(cells[0], Outcome("done"))
        view.ended(cells[1], Outcome("failed", "the disk is full"))
        view.ended(cells[2], Outcome("stopped", "the time is up"))
    assert stream.getvalue().splitlines() == [
        "[0/4] SET 90% seed 14: started",
        "[0/4] CHTs 90% seed 14: goes on after epoch 3",
        "[0/4] SET 90% seed 14 epoch 1/12, CHTs 90% seed 14 epoch 4/12; 2 running, 2 waiting; about 8 min left",
        "[1/4] SET 90% seed 14: 84.21% after 12 epochs, 4 min",
        "[1/4] CHTs 90% seed 14: failed: the disk is full",
    ]


def test_a_line_names_three_cells(tmp_path: Path) -> None:
    cells = grid(["SET"], [0.9], range(5))
    board = Board(cells, tmp_path)
    board.look({cell.name for cell in cells})
    assert progress_line(board).endswith("SET 90% seed 2 epoch 1/12, 2 more; 5 running")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_why_a_cell_failed_and_a_table_below(tmp_path: Path) -> None:
    cells, stream = grid(["SET"], [0.9], [14, 15]), _Terminal()
    with view_on(stream, Board(cells, tmp_path)) as view:
        assert isinstance(view, Live)
        view.ended(cells[0], Outcome("failed", "ended with code 1: [Errno 28]"))
        view.look({cells[1].name})
    written = stream.getvalue()
    assert "SET 90% seed 14: failed: ended with code 1: [Errno 28]" in written.replace("\r", "").replace("\n", " ")
    assert "epoch 1/12" in written.rpartition("failed:")[2]


def test_only_the_failure_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    cells, stream = grid(["SET"], [0.9], [14, 15]), _Terminal()
    with view_on(stream, Board(cells, tmp_path)) as view:
        view.ended(cells[0], Outcome("failed", "NaN"))
        written = stream.getvalue()
    red, after = re.split(r"SET 90% seed 14: failed: NaN", written)
    assert red.endswith("\x1b[31m")
    # Of the table, drawn again below, what failed is bold red, and nothing is plainly red.
    assert "variant" in after
    assert "\x1b[31m" not in after


def test_a_log_gets_lines(tmp_path: Path) -> None:
    assert isinstance(view_on(io.StringIO(), Board([], tmp_path)), Lines)


def test_without_rich_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ConfigurationError, match=r"rich: pip install 'chtconv\[compare\]'"):
        Live(Board([], tmp_path), _Terminal())


@pytest.mark.parametrize("content", ["{", '{"epoch": 1}\n', b"\xff"])
def test_metrics_that_cannot_be_read_end_no_session(tmp_path: Path, content: Any) -> None:
    (cell,) = grid(["SET"], [0.9], [1])
    (tmp_path / cell.name).mkdir()
    (tmp_path / cell.name / "metrics.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    board = Board([cell], tmp_path)
    board.look({cell.name})
    assert board[cell].state == "running"


@pytest.mark.parametrize("view", [Lines, Live])
def test_a_warning_of_runs_is_shown_once(view: Any, tmp_path: Path) -> None:
    cells = grid(["SET", "CHTs"], [0.9], [14])
    screen = io.StringIO()
    with view(Board(cells, tmp_path), screen) as shown:
        for cell in cells:
            shown.ended(cell, Outcome("failed", "no reason", ("every score is 0",)))
    assert screen.getvalue().count("warning: every score is 0") == 1
    assert "SET 90% seed 14: warning" in screen.getvalue()
