"""chtconv report from the command line to its end."""

import sys
from pathlib import Path

import pytest

from chtconv.cli import main


def test_the_page_is_written_beside_the_folder_or_where_it_is_asked_for(
    set_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("masks.safetensors", "evolution.jsonl"):
        (set_run / name).unlink()  # fewer figures
    set_run = set_run.rename(set_run.with_name("set-0.9"))
    assert main(["report", str(set_run)]) == 0
    assert main(["report", str(set_run), "--out", str(tmp_path / "mine.HTML")]) == 0
    beside = set_run.with_name("set-0.9.html")
    assert capsys.readouterr().out.splitlines() == [f"page: {beside}", f"page: {tmp_path / 'mine.HTML'}"]
    assert beside.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}"], "holds no run"),
        (["{run}", "--out", "page.pdf"], "accepted is a file that ends in .html or .htm"),
        (["{run}", "--out", "{empty}/absent/page.html"], "cannot write"),
        (["{run}", "--results", "{empty}/absent.jsonl"], "is no file"),
        (["{run}", "--output", "page.html"], "did you mean '--out'"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], message: str, set_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (set_run / "summary.json").unlink()  # fewer figures
    words = [word.format(empty=empty, run=set_run) for word in arguments]
    try:
        code = main(["report", *words])
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("package", ["matplotlib", "jinja2", "scipy"])
def test_a_missing_package_is_named_with_the_way_to_get_it(
    package: str, set_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["report", str(set_run)]) == 2
    assert f"needs {package}, which is not installed: pip install 'chtconv[compare]'" in capsys.readouterr().err
