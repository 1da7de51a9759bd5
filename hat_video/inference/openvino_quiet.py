"""OpenVINO, imported without a word to anybody."""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType

__all__ = ["import_openvino"]

_TELEMETRY = "openvino_telemetry"


@cache
def import_openvino() -> ModuleType:
    """The package `openvino`; it is imported nowhere else before.

    By itself its import sends an event to its makers' statistics, from a thread of its own. What is upscaled here, and
    when, is nobody's business; OpenVINO does without the package that sends where that cannot be imported.
    """
    known = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        if known is None:
            del sys.modules[_TELEMETRY]
        else:
            sys.modules[_TELEMETRY] = known
    module: ModuleType = openvino
    return module
