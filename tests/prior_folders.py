"""Tiny models in the real folder formats of diffusers and transformers: a few thousand parameters, random weights."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

EMBEDDING = 12
"""Width of CLIP's embeddings, in place of 768."""


def text_config(hidden: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=20,
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=9,
        hidden_act=activation,
        projection_dim=EMBEDDING,
    )


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=EMBEDDING,
    )


def clip_folder(folder: Path, hidden: int = EMBEDDING, activation: str = "quick_gelu") -> Path:
    """A CLIP repository: both towers and their projections in one file."""
    config = CLIPConfig(
        text_config=text_config(hidden, activation).to_dict(),
        vision_config=vision_config().to_dict(),
        projection_dim=EMBEDDING,
    )
    torch.manual_seed(1)
    CLIPModel(config).save_pretrained(folder)
    return folder


def diffusion_folder(
    folder: Path,
    *,
    width: int = EMBEDDING,
    prediction_type: str = "epsilon",
    text: bool = True,
    activation: str = "quick_gelu",
) -> Path:
    """A Stable Diffusion repository (``text``), or an image-variation one with its own image encoder."""
    torch.manual_seed(2)
    UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    ).save_pretrained(folder / "vae")
    options = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = PNDMScheduler if prediction_type == "epsilon" else DDPMScheduler
    scheduler(**options, prediction_type=prediction_type).save_pretrained(folder / "scheduler")
    if text:
        CLIPTextModel(text_config(width, activation)).save_pretrained(folder / "text_encoder")
    else:
        CLIPVisionModelWithProjection(vision_config()).save_pretrained(folder / "image_encoder")
    return folder
