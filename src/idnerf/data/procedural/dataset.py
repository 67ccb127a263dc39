"""Scenes on the fly."""

import os
from collections.abc import Iterator

import torch
from torch.utils.data import IterableDataset, get_worker_info

from idnerf.data.procedural.config import ProceduralConfig, ProceduralScene
from idnerf.data.procedural.generate import generate_scene
from idnerf.errors import InputError


class ProceduralDataset(IterableDataset[ProceduralScene]):
    """Endless procedural scenes: item i has seed ``start + i`` (``start`` makes it resumable).

    Items are dealt out by stride, first over ranks, then over the loader's workers: with ``rank`` of
    ``world_size`` and any number of workers, a loader yields seeds start + rank, start + rank + world_size,
    ... in this order.
    """

    def __init__(
        self,
        config: ProceduralConfig,
        start: int = 0,
        count: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """
        Args:
            config: what to generate.
            start: seed of the first item.
            count: number of items over all ranks and workers; None is endless.
            rank, world_size: place among the processes; None reads RANK and WORLD_SIZE (torchrun), 0 of 1
            without.
        """
        self.config = config
        self.start = start
        self.count = count
        self.rank = int(os.environ.get("RANK", 0)) if rank is None else rank
        self.world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
        if start < 0:
            raise InputError(f"start: expected a seed of 0 or more, got {start}; change it")
        if not 0 <= self.rank < self.world_size:
            raise InputError(f"rank: expected 0 <= rank < world_size, got {self.rank} of {self.world_size}; change it")

    def __iter__(self) -> Iterator[ProceduralScene]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None:
            torch.set_num_threads(1)
        item = self.rank + self.world_size * number
        while self.count is None or item < self.count:
            yield generate_scene(self.start + item, self.config)
            item += self.world_size * workers
