import pytest
import torch


@pytest.fixture(autouse=True)
def two_threads():
    """The same number of threads everywhere, whatever the machine has."""
    torch.set_num_threads(2)
