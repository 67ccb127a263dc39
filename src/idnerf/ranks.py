"""Work split over the processes that ``torchrun`` has started: rank r takes items r, r + world, ...; rank 0 gathers.

Without torchrun there is one rank, and nothing here does anything. Results do not depend on the number of processes.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from idnerf.errors import InputError

Item = TypeVar("Item")

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun puts into the environment."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The other ranks enter when rank 0 has left: what it made and kept is then there for them."""
        if not self.first:
            self._wait()
        yield
        if self.first:
            self._wait()

    def gather(self, item: Item) -> list[Item]:
        """On rank 0 every rank's item, in the order of ranks; elsewhere nothing. Items are pickled: keep them small."""
        if self.world == 1:
            return [item]
        items: list[Any] | None = [None] * self.world if self.first else None
        torch.distributed.gather_object(item, items)
        return items or []

    def made_in_order(self, count: int, make: Callable[[int], Item]) -> Iterator[Item]:
        """On rank 0 ``make(0)`` to ``make(count - 1)``, made by all ranks in turn; the others yield nothing.

        Every rank must run it to its end. Each process holds one item at a time, rank 0 one of every rank.
        """
        for start in range(0, count, self.world):
            number = start + self.rank
            items = self.gather(make(number) if number < count else None)
            yield from (item for item in items[: count - start] if item is not None)

    def _wait(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """What torchrun says in the environment; one rank without it."""
    if not all(name in environment for name in LAUNCHER_VARIABLES):
        return Ranks()
    return Ranks(int(environment["RANK"]), int(environment["WORLD_SIZE"]))


def is_first_process(environment: Mapping[str, str]) -> bool:
    """Whether this is the process that prints: torchrun numbers all, Lightning Fabric's launcher those of a machine."""
    if "RANK" in environment:
        return environment["RANK"] == "0"
    return environment.get("LOCAL_RANK", "0") == "0" and environment.get("NODE_RANK", "0") == "0"


def join_ranks(device: torch.device | str) -> Ranks:
    """Meet the other processes; on ``cuda`` each takes its own GPU. Ends with the process.

    Raises:
        InputError: more processes on this machine than it has GPUs.
    """
    ranks = ranks_of(os.environ)
    if ranks.world == 1:
        return ranks
    if torch.device(device).type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(
                f"torchrun: expected at most {torch.cuda.device_count()} processes here, one for each GPU, got number "
                f"{local + 1}; lower --nproc-per-node"
            )
        torch.cuda.set_device(local)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
        # left to the process's end, its threads abort it now and then ("terminate called without an active exception")
        atexit.register(_leave_ranks)
    return ranks


def _leave_ranks() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def interleaved(parts: Sequence[Sequence[Item]]) -> list[Item]:
    """Inverse of dealing items out to ranks: items r, r + world, ... are those of part r."""
    world = len(parts)
    return [parts[i % world][i // world] for i in range(sum(map(len, parts)))]
