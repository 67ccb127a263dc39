"""What the arithmetic and the memory of a machine allow, and what a model asks of them, stage by stage.

The floor of a stage is the longer of two times: its floating-point operations at the measured rate of a large matrix
product, and the bytes that its operations read and write at the measured rate of a copy that stays in the cache. A
stage's share is its floor over its measured time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

COPIED_BYTES = 4 * 2**20
"""A buffer of the size that a chunk of samples has; larger ones are copied more slowly on a CPU."""


@dataclass(frozen=True)
class MachineRates:
    """Measured: floating-point operations and bytes per second."""

    matmul: float
    copy: float


@dataclass
class StageCost:
    """What one stage asks for: operations, bytes read and written, seconds taken."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def floor(self, rates: MachineRates) -> float:
        """Seconds below which this sequence of operations cannot come."""
        return max(self.flops / rates.matmul, self.bytes / rates.copy)


def clock(device: torch.device, processor: bool) -> float:
    """Seconds: of the wall, once the device has finished; or of this process's own processor time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if processor else time.perf_counter()


def measure_rates(device: torch.device, processor: bool, dtype: torch.dtype = torch.float32) -> MachineRates:
    """Matrix products in ``dtype`` of 1024 x 1024 (8192 on a GPU) and copies of ``COPIED_BYTES`` (1 GB on a GPU)."""
    side = 1024 if device.type == "cpu" else 8192
    matrix = torch.randn(side, side, device=device).to(dtype)
    numbers = torch.randn((COPIED_BYTES if device.type == "cpu" else 2**30) // 4, device=device)
    other = torch.empty_like(numbers)

    def rate(work: float, function: Callable[[], Any]) -> float:
        function()
        seconds = []
        for _ in range(9):
            start = clock(device, processor)
            function()
            seconds.append(clock(device, processor) - start)
        return work / max(median(seconds), 1e-9)

    return MachineRates(
        rate(2.0 * side**3, lambda: matrix @ matrix), rate(2.0 * numbers.nbytes, lambda: other.copy_(numbers))
    )


class Stages:
    """Knows which of a model's direct parts is running; the rest of the model is the stage ``rest``."""

    def __init__(self, model: nn.Module, device: torch.device, processor: bool) -> None:
        self.costs: dict[str, StageCost] = {"rest": StageCost()}
        self.device, self.processor = device, processor
        self._running = ["rest"]
        self._mark: float | None = None
        self._handles = []
        for name, part in model.named_children():
            self.costs[name] = StageCost()
            self._handles.append(part.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            self._handles.append(part.register_forward_hook(lambda *_: self._leave()))

    @property
    def running(self) -> StageCost:
        return self.costs[self._running[-1]]

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Seconds are counted inside."""
        self._mark = clock(self.device, self.processor)
        yield
        self._count_time()
        self._mark = None

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str) -> None:
        self._count_time()
        self._running.append(name)

    def _leave(self) -> None:
        self._count_time()
        self._running.pop()

    def _count_time(self) -> None:
        if self._mark is not None:
            now = clock(self.device, self.processor)
            self.running.seconds += now - self._mark
            self._mark = now


class OperationCounter(TorchDispatchMode):
    """Adds every operation's floating-point operations and bytes to the stage that is running.

    A gather counts the rows that it takes, not the table that they are taken from; views count nothing.
    """

    def __init__(self, stages: Stages) -> None:
        super().__init__()
        self.stages = stages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:
            with self:  # in inference mode operations come whole: count what they are made of
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.stages.running.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        if not func.is_view:
            self.stages.running.bytes += moved_bytes(func, args, result)
        return result


def moved_bytes(func: Any, args: Any, result: Any) -> float:
    """Bytes that an operation reads and writes, each of its tensors once."""
    name = func._overloadpacket.__name__
    written = sum(tensor.nbytes for tensor in tensors_in(result))
    if name == "_embedding_bag_forward_only" or name == "_embedding_bag":
        table, rows = args[0], args[1]
        first = tensors_in(result)[0].nbytes
        return rows.numel() * table.shape[-1] * table.element_size() + 2 * rows.nbytes + first
    if name == "grid_sampler_2d":
        return 5 * written
    if name in ("index", "gather", "index_select", "embedding"):
        return 2 * written
    return written + sum(tensor.nbytes for tensor in tensors_in(args))


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors_in(part)]
    return []


def stage_costs(
    model: nn.Module, function: Callable[[], Any], device: torch.device, processor: bool, repeats: int = 3
) -> dict[str, StageCost]:
    """Cost of each direct part of ``model`` while ``function`` runs: counted once, timed as the mean of ``repeats``."""
    stages = Stages(model, device, processor)
    try:
        function()
        for _ in range(repeats):
            with stages.timing():
                function()
        for cost in stages.costs.values():
            cost.seconds /= repeats
        with OperationCounter(stages):
            function()
    finally:
        stages.close()
    return {name: cost for name, cost in stages.costs.items() if cost.bytes or cost.flops}
