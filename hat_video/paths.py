"""Paths in JSON: as they are where they are UTF-8, else by their bytes, since a file may have any name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated
from urllib.parse import quote, unquote_to_bytes

from pydantic import BeforeValidator, PlainSerializer

__all__ = ["JsonPath"]

_BYTES = "bytes:"


def _to_text(path: Path) -> str:
    text = str(path)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return _BYTES + quote(os.fsencode(path))
    return text


def _from_text(value: object) -> object:
    if isinstance(value, str) and value.startswith(_BYTES):
        return Path(os.fsdecode(unquote_to_bytes(value.removeprefix(_BYTES))))
    return value


JsonPath = Annotated[Path, PlainSerializer(_to_text, return_type=str, when_used="json"), BeforeValidator(_from_text)]
"""A `Path` field of what is written as JSON; `bytes:` and percent signs where its name is no UTF-8."""
