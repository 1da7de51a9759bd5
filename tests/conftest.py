"""What every test gets: one torch thread, since the tests themselves run side by side; a GPU, if it asks for one."""

import os

import pytest
import torch

torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where a GPU is promised, a test that finds none has failed."""
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("HAT_VIDEO_REQUIRE_GPU") == "1":
        pytest.fail("HAT_VIDEO_REQUIRE_GPU=1, but torch sees no GPU", pytrace=False)
    pytest.skip("torch sees no GPU")
