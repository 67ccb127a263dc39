"""How many processors this process may use: fewer than the machine has where a scheduler or container says so."""

import os

DECODERS = 8
"""Threads that decode photos at most: every one holds a photo at its full size."""


def usable_processors() -> int:
    """Processors that this process may run on, 1 at least."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def decoders(photos: int) -> int:
    """Threads that decode so many photos, 1 at least."""
    return max(1, min(photos, usable_processors(), DECODERS))
