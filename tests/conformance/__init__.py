"""Odd clips of every kind into every container, with FFmpeg's own programs as referees (docs/conformance.md)."""
