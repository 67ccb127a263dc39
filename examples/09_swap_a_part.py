"""9. Swap a part: what is the learnt blending of the source colours worth? Put a plain mean in its place and see."""

from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

import idnerf
from idnerf.data.image_io import write_png
from idnerf.evaluation.metrics import psnr
from idnerf.models.cascade import Cascade
from idnerf.models.fine_samples import FineOutput
from idnerf.models.view_blending import LEAST_VISIBLE, Blend


class MeanOfWhatIsSeen(nn.Module):
    """Stands where `ViewBlending` does: the mean colour of the views that see a pixel, no network."""

    def forward(
        self, fine: FineOutput, source: idnerf.Cameras, target: idnerf.Cameras, added: Tensor | None = None
    ) -> Blend:
        weight = fine.visibility[:, :, None] + LEAST_VISIBLE
        shares = weight / weight.sum(1, keepdim=True)
        rgb = (shares * fine.colours).sum(1)
        deviation = ((shares * (fine.colours - rgb[:, None]).square()).sum((1, 2)) + 1e-6).sqrt()
        return Blend(rgb, deviation, hidden=weight, logits=weight.log()[:, :, 0])


def main(scene: Path | None = None, out: Path = Path("out/examples"), target: int = 0, width: int = 320) -> None:
    """Render one view with the network as it is and with the part swapped.

    Args:
        scene: folder of posed photos; the bundled scene by default.
        out: folder for swapped.png.
        target: the view to render.
        width: of the pictures, in pixels.
    """
    loaded = idnerf.load_scene(scene or idnerf.demo_folder())
    loaded = loaded.resized((width, round(width * loaded.cameras.height / loaded.cameras.width)))
    sources = loaded.nearest(loaded.cameras[target], n=min(3, len(loaded) - 1))
    camera = loaded.cameras[target].with_bounds(*loaded.target_bounds(sources.cameras))
    truth = loaded.image(target)

    model = idnerf.IDNeRF.from_pretrained()
    assert isinstance(model.core, Cascade)
    learnt = model.render(sources, camera).rgb
    model.core.blending = MeanOfWhatIsSeen()  # type: ignore[assignment]
    model.core.refinement.context_blending = None  # it corrects learnt shares
    plain = model.render(sources, camera).rgb

    write_png(out / "swapped.png", torch.cat([learnt, plain, truth], dim=-1))
    print(f"learnt blending {psnr(learnt, truth):.2f} dB, mean of what is seen {psnr(plain, truth):.2f} dB")
    print(f"{out / 'swapped.png'}: learnt, mean, truth")


if __name__ == "__main__":
    tyro.cli(main)
