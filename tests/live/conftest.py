"""Fixtures of the live tests."""

from collections.abc import Iterator

import pytest

from tests.live.leftovers import nothing_left


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """Fails a test that leaves a thread or a process behind."""
    with nothing_left():
        yield
