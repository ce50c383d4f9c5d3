import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("chtconv", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("chtconv")


@pytest.fixture(autouse=True)
def _seeded():
    """Tests that draw from torch's own generator draw the same numbers in whatever order they run."""
    torch.manual_seed(0)
