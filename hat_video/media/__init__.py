"""Containers, codecs and time: what is in a file, its frames, and the way back. Knows nothing of networks."""
