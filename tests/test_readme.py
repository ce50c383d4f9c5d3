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
    assert names["topology"].evolutions == 2
    assert float(capsys.readouterr().out.split()[0]) == pytest.approx(0.9, abs=0.01)
    assert names["scores"].shape == (64, 64, 3, 3)
    assert names["scores"].dtype == torch.float32


def test_the_tables_are_made_from_the_results():
    command = [sys.executable, str(ROOT / "experiments" / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_recipes_of_the_readme_are_all_there_are():
    assert set(re.findall(r"`(quick|[a-z]+-[a-z0-9]+)`", README)) == set(RECIPES)


def test_links_of_the_pages_lead_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
