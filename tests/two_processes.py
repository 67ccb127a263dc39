"""For test_training.py, alone and under torchrun: the gradient of a batch shared among the processes; several
processes then train together.

python two_processes.py FOLDER BATCH_SIZE
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from idnerf.models.idnerf import IDNeRF
from idnerf.training.examples import StepDataset
from idnerf.training.trainer import TrainerConfig, TrainingDivergedError, launch, train
from tiny_cases import TINY_MODELS, PlaneScenes, tiny_example, waken


class Colours(torch.nn.Module):
    """Mean squared error of the rendered tile without jitter: the mean over the batch is the mean over processes."""

    def __init__(self, model: IDNeRF):
        super().__init__()
        self.model = model

    def forward(self, batch):
        output = self.model.core(self.model.encode(batch.source), batch.target.cameras)
        return (output.render.rgb - batch.target.images).square().mean() + output.error_scale.mean()


def main(folder: Path, batch_size: int) -> None:
    torch.set_num_threads(1)
    config = TrainerConfig(
        model=TINY_MODELS["cascade"],
        out=folder / "run",
        steps=3,
        batch_size=batch_size,
        tile=None,
        device="cpu",
        workers=0,
        log_every=1,
        validate_every=1,
        save_every=2,
    )
    fabric = launch(config)
    torch.manual_seed(0)
    model = waken(IDNeRF(config.model))
    wrapped = fabric.setup(Colours(model))
    dataset = StepDataset(
        PlaneScenes(),
        seed=0,
        batch_size=batch_size,
        source_views=(2, 4),
        tile=(16, 16),
        augment=True,
        rank=fabric.global_rank,
        world=fabric.world_size,
    )
    fabric.backward(wrapped(dataset[5]))
    if fabric.is_global_zero:
        gradients = {name: p.grad for name, p in model.named_parameters()}
        torch.save({"world": fabric.world_size, "gradients": gradients}, folder / f"gradients_{batch_size}.pt")
    if fabric.world_size > 1:
        train(config, PlaneScenes(), [tiny_example()])
        try:  # only the second process meets item 1; the first would wait for it for ever
            train(replace(config, out=folder / "diverged"), PlaneScenes(bad_item=1), [])
        except TrainingDivergedError:
            (folder / f"stopped_{fabric.global_rank}").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
