"""Every odd clip into every container, as docs/conformance.md says it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conformance.cell import CONTAINERS, run_cell
from tests.conformance.kinds import Kind
from tests.conformance.table import ALL_KINDS, words_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "conformance.md"
MAKE_IT = "python -m tests.conformance > docs/conformance.md"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The clips that this process has made so far, by the name of their kind."""
    return {}


@pytest.fixture(scope="session")
def documented() -> dict[tuple[str, str], str]:
    return words_of(DOCUMENT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind.name)
def test_cell(
    kind: Kind,
    container: str,
    made: dict[str, Path],
    documented: dict[tuple[str, str], str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if kind.name not in made:
        made[kind.name] = kind.make(tmp_path_factory.mktemp(kind.name))
    outcome = run_cell(kind, made[kind.name], container, tmp_path)
    assert not outcome.faults
    assert outcome.word == documented[kind.title, container], f"{outcome.what}; make the page anew: {MAKE_IT}"


def test_the_page_has_every_kind_and_every_container() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    cells = words_of(text)
    expected = {(kind.title, container) for kind in ALL_KINDS for container in CONTAINERS}
    assert {key for key in cells if key[0] != "source"} == expected, f"make the page anew: {MAKE_IT}"
    words = [word for key, word in cells.items() if key[0] != "source"]
    assert set(words) == {"exact", "converted", "refused"}
    counts = {word: words.count(word) for word in ("exact", "converted", "refused")}
    said = {word: int(number) for number, word in re.findall(r"(\d+) (exact|converted|refused)", text)}
    assert said == counts


def test_there_are_kinds_enough_and_no_two_of_one_title() -> None:
    assert len(ALL_KINDS) >= 40
    assert len({kind.title for kind in ALL_KINDS}) == len(ALL_KINDS)
