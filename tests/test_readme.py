"""What the README says: its code runs, its tables are those of the results, its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chtconv.training import RECIPES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    sparsity, evolutions, _ = capsys.readouterr().out.split(maxsplit=2)
    assert float(sparsity) == pytest.approx(0.9, abs=0.01)
    assert int(evolutions) == 2
    assert names["topology"].acceleration is not None
    assert names["scores"].shape == (64, 64, 3, 3)
    assert names["scores"].dtype == torch.float32


def test_the_tables_are_made_from_the_results():
    command = [sys.executable, str(ROOT / "experiments" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_recipes_of_the_readme_are_all_there_are():
    assert set(re.findall(r"`(quick|[a-z]+-[a-z0-9]+)`", README)) == set(RECIPES)


def anchors(page):
    """Those that the headings of a page get: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_pages_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name} links to {link}"
            assert not anchor or anchor in anchors(target), f"{page.name} links to {link}#{anchor}"
