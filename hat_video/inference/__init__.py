"""Pixels to pixels, fast: the upscaler, exact rewrites of a loaded network, and frames in flight."""
