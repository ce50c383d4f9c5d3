"""The page in a real Chromium: on a phone, on a screen and on paper."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
ARGUMENTS = ["--no-sandbox", "--headless", "--disable-gpu", "--disable-background-networking"]
SMALL_FIGURES = """[...document.querySelectorAll("figure svg")].filter(
    svg => { const box = svg.getBoundingClientRect(); return box.width < 200 || box.height < 80; }).length"""
CUT_TEXT = """[...document.querySelectorAll("figure svg")].flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].filter(text => {
        const box = text.getBoundingClientRect();
        return box.left < frame.left - 2 || box.right > frame.right + 2;
    }).map(text => text.textContent); })"""
# Where a table is moved sideways, the names of its rows and their heading stay.
MOVED = """[...document.querySelectorAll(".scroll")].filter(each => each.scrollWidth > each.clientWidth).map(each => {
    each.scrollLeft = 80;
    return [...each.querySelectorAll("tbody th, .name")].map(
        name => name.getBoundingClientRect().left - each.getBoundingClientRect().left); })"""
COLUMNS = "getComputedStyle(document.querySelector('.figures')).gridTemplateColumns.trim().split(' ').length"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def file(html: str, tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_bytes(html.encode())
    return path


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_nothing_fails_and_every_figure_is_seen(
    browser: Any, file: Path, width: int, scheme: str
) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, requests = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.route("**/*", lambda route: route.continue_() if route.request.url == file.as_uri() else route.abort())
    tab.goto(file.as_uri())
    assert said == []
    assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.locator("figure svg").count() > 20
    assert tab.evaluate(SMALL_FIGURES) == 0
    assert tab.evaluate(CUT_TEXT) == []
    assert tab.evaluate(COLUMNS) == (1 if width == 360 else 3)
    moved = tab.evaluate(MOVED)
    assert moved or width > 360
    assert all(left > -1 for table in moved for left in table)
    tab.close()


def test_paper_is_white_and_as_wide_as_the_page(browser: Any, file: Path) -> None:
    tab = browser.new_page(viewport={"width": 680, "height": 960}, color_scheme="dark")
    tab.emulate_media(media="print")
    tab.goto(file.as_uri())
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 680
    assert tab.evaluate(COLUMNS) == 2
    assert not tab.locator("nav").is_visible()
    assert tab.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    tab.close()
