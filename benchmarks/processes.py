"""A path's frames and a data-parallel training step, shared among processes; one line of JSON from rank 0.

python benchmarks/processes.py                                                    # one process
python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/processes.py
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch
import tyro
from torch.nn.parallel import DistributedDataParallel

from idnerf.allocator import keep_freed_memory
from idnerf.commands.options import choose_device
from idnerf.config import PRESETS
from idnerf.ranks import join_ranks
from idnerf.training.optimizer import make_optimizer
from idnerf.training.trainer import Objectives
from speed_cases import Case, OurSystem, tile_of


@dataclass(frozen=True)
class Shared:
    """Seconds with ``world`` processes.

    Attributes:
        world: number of processes.
        frames: of the path that was rendered, all processes together.
        frames_seconds: for the whole path, sources encoded.
        step_seconds: a training step, one scene a process.
        gradient_bytes: what each process sends into the sum of gradients.
    """

    world: int
    frames: int
    frames_seconds: float
    step_seconds: float
    gradient_bytes: int


def main(frames: int = 8, device: str = "auto", threads: int = 1, repeats: int = 3) -> None:
    """Render a path at 320x256 and train the default configuration with 4096 rays of 320x256 sources."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    where = choose_device(device)
    ranks = join_ranks(where)
    case = Case("cascade full", "frames", (320, 256), rays=4096)
    system = OurSystem(case, where.type)
    features = system.encode()
    system.render(features, 256)

    def timed(function) -> float:
        ranks.gather(0)  # all start together
        start = time.perf_counter()
        function()
        if where.type == "cuda":
            torch.cuda.synchronize()
        ranks.gather(0)
        return time.perf_counter() - start

    of_frames = timed(lambda: list(ranks.made_in_order(frames, lambda _: system.render(features, 256).rgb.cpu())))

    config = replace(PRESETS["cascade-procedural"].trainer, enlarged_share=0.0)  # the sources' size is the case's
    model = Objectives(system.model.train(), config)
    if ranks.world > 1:
        group = torch.distributed.new_group(backend="nccl" if where.type == "cuda" else "gloo")
        wrapped: torch.nn.Module = DistributedDataParallel(model, process_group=group)
    else:
        wrapped = model
    optimizer = make_optimizer(system.model, config.optimizer)
    batch = tile_of(system.batch, case.rays)

    def step() -> None:
        optimizer.zero_grad()
        terms, _, _ = wrapped(batch, 0, ranks.rank)
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()

    step()
    of_step = median(timed(step) for _ in range(repeats))
    size = sum(p.numel() * p.element_size() for p in system.model.parameters() if p.requires_grad)
    if ranks.first:
        print(json.dumps(asdict(Shared(ranks.world, frames, of_frames, of_step, size))))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
