"""What every test gets: one torch thread, since tests run side by side; ears for Ctrl-C; a GPU, if it asks for one."""

import os
import signal

import pytest
import torch

torch.set_num_threads(1)
# A shell starts what it puts in the background deaf to it, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where a GPU is promised, a test that finds none has failed."""
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("HAT_VIDEO_REQUIRE_GPU") == "1":
        pytest.fail("HAT_VIDEO_REQUIRE_GPU=1, but torch sees no GPU", pytrace=False)
    pytest.skip("torch sees no GPU")
