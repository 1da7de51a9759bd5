"""What can go wrong, as one tree.

Every message is one line that shows the value, what is allowed and what to do next. Each error is also the builtin that
a caller would expect, so `except OSError` and `except ValueError` work as they should::

    HatVideoError
    ├── UsageError (ValueError)          the request cannot be met: no model of that scale, two outputs of one name
    ├── OptionError (ValueError)         an option has a value that is not allowed, or the encoder does not know it
    ├── SourceError (OSError)            the source is missing, unreadable, not video, or damaged beyond use
    ├── ModelError (ValueError)          unknown model, checkpoint of another network, damaged or non-finite weights
    ├── OutputError (OSError)            the output cannot be written: no folder, no right, no space, name already taken
    ├── StrictError (ValueError)         `strict` was asked for and something would be lost
    ├── WorkError (RuntimeError)         a segment could not be made; the committed ones are kept
    │   └── OutOfMemoryError             the frame does not fit, even after the batch was shrunk
    ├── VerifyError (RuntimeError)       the finished file differs from what was promised
    └── CancelledError                   the caller asked to stop; committed segments are kept
"""

from __future__ import annotations

__all__ = [
    "CancelledError",
    "HatVideoError",
    "ModelError",
    "OptionError",
    "OutOfMemoryError",
    "OutputError",
    "SourceError",
    "StrictError",
    "UsageError",
    "VerifyError",
    "WorkError",
]


class HatVideoError(Exception):
    """Base of every error that this library raises on purpose."""


class UsageError(HatVideoError, ValueError):
    """The request as a whole cannot be met (the command exits with 2)."""


class OptionError(HatVideoError, ValueError):
    """An option's value is not allowed, or the encoder does not know the option (the command exits with 2)."""


class SourceError(HatVideoError, OSError):
    """The source is missing, unreadable, not a video, or damaged beyond use."""


class ModelError(HatVideoError, ValueError):
    """A model is unknown, its file is not a HAT checkpoint, or its weights cannot be used."""


class OutputError(HatVideoError, OSError):
    """The output cannot be written."""


class StrictError(HatVideoError, ValueError):
    """Something would be lost, and the caller asked for `strict`."""


class WorkError(HatVideoError, RuntimeError):
    """A segment could not be made. Segments that were committed before are kept for the next run."""


class OutOfMemoryError(WorkError, MemoryError):
    """A frame does not fit in memory, even alone in its batch."""


class DeviceLostError(WorkError):
    """A GPU failed in the middle of the work; another one may still do it."""


class VerifyError(HatVideoError, RuntimeError):
    """The finished file is not what was promised; it was not given its name."""


class CancelledError(HatVideoError):
    """The caller asked to stop. Committed segments are kept for the next run."""
