"""Where a live picture comes from."""

from __future__ import annotations

import re

__all__ = ["masked"]

_USERINFO = re.compile(r"(?<=://)([^/@\s:]*):[^/@\s]*@")
_SECRET = re.compile(r"(?i)([?&;][^=&;\s]*(?:pas|token|key|secret|auth|sig)[^=&;\s]*)=[^&;#\s]+")
_STREAM_KEY = re.compile(r"(rtmps?://\S*/)[A-Za-z0-9_-]{16,}(?=$|[?#\s])")


def masked(text: str) -> str:
    """`text` with passwords and secrets of URLs replaced by `***`."""
    return _STREAM_KEY.sub(r"\1***", _SECRET.sub(r"\1=***", _USERINFO.sub(r"\1:***@", text)))
