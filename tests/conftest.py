import pytest
import torch


@pytest.fixture(autouse=True)
def two_threads():
    """The same number of threads everywhere, whatever the machine has."""
    torch.set_num_threads(2)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
