"""Several frames of a path at once on a CPU: threads that share a frame wait for one another, frames do not.

How much that gains: benchmarks/NOTES.md.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")

MOST_FRAMES = 4
"""Frames at once at most: each needs the memory of a whole view (docs/performance.md)."""


def frames_at_once(count: int, threads: int) -> int:
    """How many frames of ``count`` share ``threads``: of two or more the number that leaves the fewest idle."""
    choices = range(2, min(MOST_FRAMES, threads, count) + 1)
    return max(choices, key=lambda frames: (threads // frames * frames, frames), default=1)


def made_at_once(count: int, make: Callable[[int], Item], device: torch.device | str = "cpu") -> Iterator[Item]:
    """``make(0)`` to ``make(count - 1)`` in order; on a CPU several are made at the same time.

    PyTorch's threads (``OMP_NUM_THREADS``) are divided among them and given back at the end. What ``make`` raises is
    raised here.
    """
    threads = torch.get_num_threads()
    frames = frames_at_once(count, threads) if torch.device(device).type == "cpu" and count else 1
    if frames <= 1:
        yield from map(make, range(count))
        return
    pool = ThreadPoolExecutor(frames, initializer=torch.set_num_threads, initargs=(threads // frames,))
    running: deque[Future[Item]] = deque()
    try:
        for number in range(count):
            running.append(pool.submit(make, number))
            if len(running) > frames:  # one is waiting, so that no thread does
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
