import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("chtconv", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("chtconv")


# Hundreds of random geometries are no reason to fill anybody's cache; tests/test_cache.py has a folder of its own.
os.environ["CHTCONV_CACHE"] = ""


@pytest.fixture(autouse=True)
def _seeded():
    """Tests that draw from torch's own generator draw the same numbers in whatever order they run."""
    torch.manual_seed(0)
