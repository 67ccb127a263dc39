"""Drives a checkout of the published MatchNeRF or ID-NeRF code, for timing beside ours on the same inputs.

git clone https://github.com/donydchen/matchnerf REFERENCE/matchnerf
git clone https://github.com/Iron-LYK/idnerf REFERENCE/idnerf

Only what computes is used: encoder, latent, reprojection, decoder, compositing. The diffusion prior is left out on both
sides. Libraries that their files import for logging and video alone are replaced by empty modules where missing.
"""

import importlib
import math
import sys
import types
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from idnerf.types import Cameras, Views

Kind = Literal["matchnerf", "idnerf"]

UNUSED_LIBRARIES = ("ipdb", "termcolor", "skvideo", "skvideo.io", "cv2", "torchvision", "torchvision.transforms")
"""Imported by the published files that are needed, but not used by what is timed."""


class EmptyModule(types.ModuleType):
    """A library that is imported, but not used: any name in it is None."""

    __path__: list[str] = []  # noqa: RUF012 - what makes a module a package

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class AttributeDict(dict):
    """Stands in for easydict: nested dictionaries read as attributes."""

    def __init__(self, values: Any = None, **more: Any) -> None:
        super().__init__()
        self.update(values or {}, **more)

    def update(self, values: Any = None, **more: Any) -> None:
        for key, value in {**(values or {}), **more}.items():
            self[key] = AttributeDict(value) if type(value) is dict else value

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def options(kind: Kind, device: str) -> AttributeDict:
    """The published configuration (configs/base.yaml), 3 views."""
    return AttributeDict(
        device=device,
        n_src_views=3,
        guidance_scale=100,
        lambda_guidance=1,
        encoder={
            "attn_splits_list": [2],
            "cos_n_group": [2, 8],
            "num_transformer_layers": 6,
            "feature_upsampler": "network",
            "upsample_factor": 2,
            "wo_self_attn": False,
            "feature_sample_local_radius": 0 if kind == "matchnerf" else 1,
            "feature_sample_local_dilation": 1,
        },
        latent_inference={"input_channel": 9, "latent_dim": 4},
        decoder={
            "net_width": 128,
            "net_depth": 6,
            "skip": [4],
            "posenc": {"L_3D": 10, "L_view": 0},
            "raytrans_posenc": False,
            "density_maskfill": False,
            "raytrans_act": "ReLU",
        },
        nerf={
            "legacy_coord": True,
            "wo_render_interval": True,
            "view_dep": True,
            "depth": {"param": "metric"},
            "sample_intvs": 128,
            "sample_stratified": True,
            "density_noise_reg": None,
        },
    )


def named_random_weight(name: str, value: Tensor) -> Tensor:
    """A tensor that depends on its name and shape alone; of a size at which signals neither vanish nor blow up."""
    if not value.is_floating_point():
        return value
    x = torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if x.dim() > 1:
        return x / math.sqrt(x[0].numel())
    if name.endswith("running_var"):
        return 1 + 0.1 * x.abs()
    return 1 + 0.1 * x if name.endswith("weight") else 0.1 * x


@dataclass(frozen=True)
class PublishedModel:
    """The published network behind three calls like ours."""

    kind: Kind
    network: Any

    def encode(self, images: Tensor) -> list[Tensor]:
        """Feature maps of [1 view 3 height width] images."""
        return self.network.get_img_feat(images, attn_splits_list=[2], cur_n_src_views=images.shape[1])

    def latent(self, images: Tensor, source: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Tensor]:
        """What ``render`` takes beside the features: nothing for MatchNeRF."""
        if self.kind == "matchnerf":
            return {}
        return {"latent": self.network.latent_inference(images, source, target)[0]}

    def render(
        self,
        images: Tensor,
        features: list[Tensor],
        poses: tuple[dict[str, Tensor], dict[str, Tensor]],
        rays: Tensor,
        *,
        latent: dict[str, Tensor],
        mode: str = "test",
    ) -> Any:
        """Colours of the rays of these indices (row by row); ``poses`` of sources and target."""
        source, target = poses
        return self.network.render(
            self.network.opts,
            target,
            ray_idx=rays,
            mode=mode,
            ref_poses=source,
            ref_images=images,
            ref_feats_list=features,
            **latent,
        )


def published_model(reference: Path, kind: Kind, device: str) -> PublishedModel:
    """Import the checkout's network and give it weights that depend on their names alone.

    Args:
        reference: folder that holds the checkout as ``matchnerf`` or ``idnerf``, or the checkout itself.
    """
    root = reference / kind if (reference / kind).is_dir() else reference
    file = root / "models" / f"{kind}.py"
    if not file.is_file():
        raise SystemExit(f"--reference {reference}: expected a checkout of {kind} there with models/{kind}.py")
    for name in UNUSED_LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = EmptyModule(name)
    try:
        importlib.import_module("easydict")
    except ImportError:
        sys.modules["easydict"] = types.ModuleType("easydict")
        sys.modules["easydict"].EasyDict = AttributeDict  # type: ignore[attr-defined]
    sys.path.insert(0, str(root))
    network_class = getattr(importlib.import_module(f"models.{kind}"), "MatchNeRF" if kind == "matchnerf" else "IDNeRF")
    network = network_class(options(kind, device)).to(device)
    network.load_state_dict({name: named_random_weight(name, value) for name, value in network.state_dict().items()})
    return PublishedModel(kind, network)


def published_poses(source: Views, target: Cameras) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Cameras as the published code takes them (w2c), of [1 view] sources and a [1] target."""

    def poses(cameras: Cameras) -> dict[str, Tensor]:
        w2c = torch.linalg.inv(cameras.c2w.double()).float()
        return {
            "extrinsics": w2c[..., :3, :],
            "intrinsics": cameras.K,
            "near_fars": torch.stack([cameras.near, cameras.far], -1),
        }

    return poses(source.cameras), poses(target)
