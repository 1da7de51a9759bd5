"""Damaged containers by the thousand: never a hang, a crash, a traceback or a silent loss."""
