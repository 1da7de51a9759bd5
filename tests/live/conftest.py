"""Fixtures of the live tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.leftovers import nothing_left

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cameras, servers and viewers run as processes against the clock, on machines that others use too.

    A live test that fails is run again, twice at most and when the machine has had time to recover; the summary shows
    it as RERUN. What fails three times fails. To find what fails now and then: `-p no:rerunfailures`.
    """
    if not config.pluginmanager.hasplugin("rerunfailures"):
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.flaky(reruns=2, reruns_delay=3))


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """Fails a test that leaves a thread or a process behind."""
    with nothing_left():
        yield
