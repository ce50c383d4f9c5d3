"""The page: well formed, complete without anything else, escaped, and with the numbers of its runs."""

import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pytest

from chtconv.report.page import page
from chtconv.report.reading import read
from chtconv.report.results import results

VOID = {"meta", "br", "path", "use", "image"}


class Elements(HTMLParser):
    """All elements with their attributes and texts; what is closed must have been opened."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def elements(html: str) -> Elements:
    return Elements(html)


def test_headings_are_in_order_and_begin_with_one_title(elements: Elements) -> None:
    levels = [int(tag[1]) for tag, _ in elements.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert elements.texts["title"] == elements.texts["h1"]
    assert elements.of("html") == [{"lang": "en"}]


def test_every_figure_has_a_caption_and_a_text_alternative(elements: Elements) -> None:
    figures, pictures = len(elements.of("figure")), elements.of("svg")
    assert figures == len(pictures) == len(elements.texts["figcaption"]) > 20
    for picture in pictures:
        assert picture["role"] == "img"
        assert re.search(r"\d", picture["aria-label"] or "")
    for caption in elements.texts["figcaption"]:
        assert re.fullmatch(r"[A-Z].*[^.]\.", caption, re.DOTALL)


def test_every_table_has_a_caption_and_scopes(elements: Elements) -> None:
    assert len(elements.of("table")) == len(elements.of("caption")) >= 4
    scopes = Counter(attributes["scope"] for attributes in elements.of("th"))
    assert scopes["col"] > 10
    assert scopes["row"] > 20


def test_no_identifier_stands_twice_and_every_reference_leads_somewhere(html: str, elements: Elements) -> None:
    names = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(names) == len(set(names))
    links = [attributes["href"] or "" for _, attributes in elements.found if "href" in attributes]
    references = {link[1:] for link in links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert references <= set(names)


def test_nothing_is_loaded_and_nothing_runs(html: str, elements: Elements) -> None:
    assert not {"script", "link", "iframe", "img", "object", "base"} & {tag for tag, _ in elements.found}
    for _, attributes in elements.found:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert re.match(r"#|data:image/png;base64,", value or "")
    assert not re.search(r"@import|https?:", html)
    assert not re.search(r"url\((?!#)", html)


def test_names_from_runs_are_escaped(html: str, elements: Elements, hostile: str) -> None:
    assert "<script" not in html
    shown = [text for texts in elements.texts.values() for text in texts]
    assert any(hostile.replace("\x00", "\ufffd").replace("\ud800", "\ufffd") in text for text in shown)
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", html)
    html.encode()


def test_tables_give_the_numbers_of_the_runs(comparison: Path, elements: Elements) -> None:
    accuracies = [
        100 * json.loads((run.path / "summary.json").read_text())["test_accuracy"]
        for run in read(comparison)[0].done
        if (run.variant, run.sparsity) == ("SET", 0.9)
    ]
    assert len(accuracies) == 2
    error = abs(accuracies[0] - accuracies[1]) / 2
    assert f"{fmean(accuracies):.2f} ± {error:.2f}" in elements.texts["td"]


def test_every_run_is_listed_with_its_state(elements: Elements) -> None:
    states = Counter(text.partition(":")[0] for text in elements.texts["td"])
    assert (states["done"], states["running"], states["stopped"], states["unreadable"]) == (13, 1, 1, 1)
    assert (states["failed"], states["not begun"]) == (1, 1)


def test_no_number_is_missing_in_disguise(html: str) -> None:
    text = re.sub(r"base64,[^\"]*", "", html)
    assert not re.search(r"\b(nan|inf|None)\b", unescape(text))


def test_the_page_is_small(html: str) -> None:
    assert len(html.encode()) < 30_000 * html.count("<figure>")


def test_the_same_runs_give_the_same_page(trained: Path) -> None:
    pages = [page(read(trained / "chts")) for _ in range(2)]
    first, second = (re.sub(r"Written on [^.]*", "", each) for each in pages)
    assert first == second


@pytest.mark.parametrize("kept", [[], ["config.json"], ["config.json", "summary.json"], ["summary.json"]])
def test_a_run_with_few_files_has_a_page(kept: list[str], set_run: Path) -> None:
    (set_run / "failure.json").write_text("{}")
    for path in set_run.iterdir():
        if path.name not in [*kept, "failure.json"]:
            path.unlink()
    found = page(read(set_run))
    assert ("1 done" if "summary.json" in kept else "1 failed") in found


@pytest.mark.parametrize("values", [{"dataset": None}, {"test_accuracy": "high"}])
def test_a_damaged_summary_is_left_out_of_the_tables_and_said(values: dict[str, object], set_run: Path) -> None:
    summary = json.loads((set_run / "summary.json").read_text())
    (set_run / "summary.json").write_text(json.dumps(summary | values))
    tables, problems = results(read(set_run))
    assert tables == []
    assert problems[0].startswith("set is left out of the tables: ")
    assert "Error" in problems[0] or "no test_accuracy" in problems[0]


def test_of_several_comparisons_it_is_said_whose_run_is_left_out(set_run: Path) -> None:
    (found,) = read(set_run)
    (run,) = found.runs
    damaged = replace(found, title="first", runs=[replace(run, summary={**run.summary, "config": {}})])
    tables, problems = results([damaged, replace(found, title="second")])
    assert problems == ["set of first is left out of the tables: KeyError: 'method'"]
    assert len(tables) == 1


def test_figures_leave_out_of_names_what_all_sparse_runs_share_and_tables_do_not(plain: Path) -> None:
    cells = {
        "dense": {"variant": "dense", "method": "dense", "sparsity": 0.0, "seed": 0},
        "set": {"variant": "SET, common part", "method": "set", "sparsity": 0.9, "seed": 0},
        "chts": {"variant": "CHTs, common part, own part", "method": "chts", "sparsity": 0.9, "seed": 0},
    }
    (plain / "comparison.json").write_text(json.dumps({"recipe": "quick", "shared": {}, "cells": cells}))
    elements = Elements(page(read(plain)))
    drawn = {text for texts in (elements.texts.get("text", []), elements.texts.get("tspan", [])) for text in texts}
    assert {"dense", "SET", "CHTs, own part"} <= drawn
    assert not any("common part" in text for text in drawn)
    assert {"SET, common part", "CHTs, common part, own part"} <= set(elements.texts["th"])
    said = "In figures names go without what those of all sparse runs have in common: common part."
    assert said in elements.texts["p"]
