import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
import torch

from chtconv.cli import main

hypothesis.settings.register_profile("chtconv", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("chtconv")


# Hundreds of random geometries are no reason to fill anybody's cache; tests/test_cache.py has a folder of its own.
os.environ["CHTCONV_CACHE"] = ""


@pytest.fixture(autouse=True)
def _seeded():
    """Tests that draw from torch's own generator draw the same numbers in whatever order they run."""
    torch.manual_seed(0)


@pytest.fixture
def chtconv(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in an empty folder: exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = main(words)
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def experiments() -> Iterator[Callable[[str], ModuleType]]:
    """The modules of the folder experiments/ by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parent.parent / "experiments")
        yield importlib.import_module
