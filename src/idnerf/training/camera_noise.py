"""Cameras that are slightly wrong, as those of real photos are: poses of exact scenes make a network trust them.

Two errors that structure from motion leaves behind, drawn anew for every source camera:

* a shifted lens. Stabilised lenses and sensors move by about a percent of the picture from photo to photo, and a
  calibration with one fixed principal point turns the camera instead. The middle of the picture then agrees and its
  edges do not: delta pixels of shift leave delta (x / f)^2 at x from the middle, whatever the depth. On the target
  views of LLFF's flower this is 1 to 2 pixels of 480 at the left and right edges.
* noise of the poses themselves.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.errors import InputError
from idnerf.types import Cameras


@dataclass(frozen=True)
class CameraNoiseConfig:
    """Errors of the source cameras."""

    share: float = 0.0
    """Share of the examples whose source cameras are wrong; how wrong is drawn evenly up to the following."""
    lens_shift: float = 0.012
    """Standard deviation of the shift of a camera's principal point, as a share of the image's width."""
    pose: float = 0.0008
    """Standard deviation of what rotation and position noise each move a point at near by, as a share of the width."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"--scenes.camera-noise.share: expected a share in [0, 1], got {self.share}")
        for name in ("lens_shift", "pose"):
            if not 0 <= getattr(self, name) <= 0.1:
                raise InputError(
                    f"--scenes.camera-noise.{name.replace('_', '-')}: expected 0 to 0.1 image widths, got "
                    f"{getattr(self, name)}"
                )


def disturb(cameras: Cameras, config: CameraNoiseConfig, generator: torch.Generator) -> Cameras:
    """[view] cameras with errors as ``config`` says; near, far and image size stay."""
    if config.share == 0 or float(torch.rand((), generator=generator)) >= config.share:
        return cameras
    strength = float(torch.rand((), generator=generator)) * cameras.width
    number = len(cameras)
    shift = config.lens_shift * strength * torch.randn(number, 2, generator=generator)
    turn = config.pose * strength * torch.randn(number, 3, generator=generator)
    move = config.pose * strength * torch.randn(number, 3, generator=generator)
    cameras = with_shifted_lens(cameras, shift)
    focal = cameras.K[:, :1, 0]
    c2w = cameras.c2w.clone()
    c2w[:, :3, :3] = c2w[:, :3, :3] @ rotation(turn / focal)
    c2w[:, :3, 3] += move / focal * cameras.near[:, None]
    return replace(cameras, c2w=c2w)


def with_shifted_lens(cameras: Cameras, shift: Float[Tensor, "view 2"]) -> Cameras:
    """The principal point moved by ``shift`` pixels, the camera turned so that what is in the middle stays there."""
    K, c2w = cameras.K.clone(), cameras.c2w.clone()
    K[:, :2, 2] += shift
    x, y = (shift / torch.stack([K[:, 0, 0], K[:, 1, 1]], -1)).unbind(-1)
    c2w[:, :3, :3] = c2w[:, :3, :3] @ rotation(torch.stack([-y, x, torch.zeros_like(x)], -1))
    return replace(cameras, K=K, c2w=c2w)


def rotation(vector: Float[Tensor, "number 3"]) -> Float[Tensor, "number 3 3"]:
    """Matrices that rotate by |vector| radians about its direction."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    return torch.linalg.matrix_exp(skew)
