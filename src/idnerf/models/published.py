"""Published weights into our names: GMFlow's (haofeixu/gmflow) and MatchNeRF's (donydchen/matchnerf).

A published file is recognised by its tensors' names, every name is accounted for and every shape is checked.
"""

import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from idnerf.checkpoint import PICKLE_STARTS
from idnerf.errors import InputError
from idnerf.models.paper import PaperConfig, PaperModel

CheckpointKind = Literal["gmflow", "matchnerf"]

# Ours (a pattern) to the published name, in MatchNeRF's layout; GMFlow's has no "feat_enc.".
_PUBLISHED_NAMES = [
    (r"encoder\.backbone\.stem\.", "feat_enc.backbone.conv1."),
    (r"encoder\.backbone\.head\.", "feat_enc.backbone.conv2."),
    (r"encoder\.transformer\.blocks\.(\d+)\.self_attention\.", r"feat_enc.transformer.layers.\1.self_attn."),
    (
        r"encoder\.transformer\.blocks\.(\d+)\.cross_attention\.",
        r"feat_enc.transformer.layers.\1.cross_attn_ffn.",
    ),
    (
        r"encoder\.transformer\.blocks\.(\d+)\.feed_forward\.",
        r"feat_enc.transformer.layers.\1.cross_attn_ffn.mlp.",
    ),
    (r"encoder\.transformer\.blocks\.(\d+)\.norm\.", r"feat_enc.transformer.layers.\1.cross_attn_ffn.norm2."),
    (r"encoder\.upsampler\.skip\.", "feat_enc.featup_net.conv_l2rs.0."),
    (r"encoder\.upsampler\.refine\.", "feat_enc.featup_net.conv_ls.0."),
    (r"encoder\.upsampler\.project\.", "feat_enc.featup_net.conv_l2rs.1."),
    (r"field\.layers\.(\d+)\.", r"nerf_dec.pts_linears.\1."),
    (r"field\.condition\.", "nerf_dec.pts_bias."),
    (r"field\.to_ray\.", "nerf_dec.alpha_linear.0."),
    (r"field\.ray_transformer\.query\.", "nerf_dec.ray_attention.w_qs."),
    (r"field\.ray_transformer\.key\.", "nerf_dec.ray_attention.w_ks."),
    (r"field\.ray_transformer\.value\.", "nerf_dec.ray_attention.w_vs."),
    (r"field\.ray_transformer\.merge\.", "nerf_dec.ray_attention.fc."),
    (r"field\.ray_transformer\.norm\.", "nerf_dec.ray_attention.layer_norm."),
    (r"field\.density\.", "nerf_dec.out_alpha_linear."),
    (r"field\.feature\.", "nerf_dec.feature_linear."),
    (r"field\.directional\.", "nerf_dec.views_linears.0."),
    (r"field\.colour\.", "nerf_dec.rgb_linear."),
]
_ATTENTION_PARTS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "merge": "merge", "norm": "norm1"}

UNREADABLE = (
    RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error
)  # fmt: skip
"""What PyTorch's reader raises for files of another kind, by what their first bytes happen to mean to a pickle."""

GMFLOW_FLOW_HEAD = ("feature_flow_attn.", "upsampler.")
"""Parts of a GMFlow file that turn features into optical flow, which is not needed here."""


def published_name(name: str) -> str:
    """The published MatchNeRF name of one of our parameters.

    Raises:
        KeyError: the parameter has no published counterpart (symmetric view aggregation has none).
    """
    block = re.match(r"encoder\.backbone\.blocks\.(\d+)\.(conv1|conv2|shortcut)\.(\w+)$", name)
    if block:
        index, part = int(block[1]), block[2].replace("shortcut", "downsample.0")
        return f"feat_enc.backbone.layer{index // 2 + 1}.{index % 2}.{part}.{block[3]}"
    for pattern, published in _PUBLISHED_NAMES:
        if re.match(pattern, name):
            renamed = re.sub(pattern, published, name)
            prefix, part, leaf = renamed.rsplit(".", 2)
            in_attention = prefix.endswith(("self_attn", "cross_attn_ffn"))
            return f"{prefix}.{_ATTENTION_PARTS.get(part, part)}.{leaf}" if in_attention else renamed
    raise KeyError(name)


def convert_gmflow(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """GMFlow's single-scale weights to the ``encoder.`` part of our state dict, all but the upsampler's.

    Raises:
        InputError: a tensor is missing, unknown, or of another shape.
    """
    tensors = {
        f"feat_enc.{name}": tensor for name, tensor in state_dict.items() if not name.startswith(GMFLOW_FLOW_HEAD)
    }
    wanted = {
        name: shape
        for name, shape in _shapes(PaperConfig()).items()
        if name.startswith("encoder.") and not name.startswith("encoder.upsampler.")
    }
    return _renamed(tensors, wanted, "GMFlow", strip="feat_enc.")


def convert_matchnerf(state_dict: Mapping[str, Tensor]) -> tuple[PaperConfig, dict[str, Tensor]]:
    """MatchNeRF's weights to our configuration (their number of views is read off) and state dict.

    Raises:
        InputError: a tensor is missing, unknown, or of another shape.
    """
    groups = PaperConfig().groups
    condition = state_dict.get("nerf_dec.pts_bias.weight")
    if condition is None or condition.dim() != 2:
        raise InputError(
            "MatchNeRF checkpoint: expected the matrix nerf_dec.pts_bias.weight, found none; "
            "give the published matchnerf_3v.pth or a checkpoint of its training code."
        )
    views, rest = divmod(condition.shape[1] - sum(groups), 4)
    if rest or views < 2:
        raise InputError(
            f"MatchNeRF checkpoint: expected nerf_dec.pts_bias.weight of {sum(groups)} + 4 x views columns, "
            f"got {condition.shape[1]}; only groups {groups} are supported."
        )
    config = PaperConfig(view_aggregation="concatenate", num_views=views, published_behaviour=True)
    return config, _renamed(state_dict, _shapes(config), "MatchNeRF")


def convert_checkpoint(path: Path) -> tuple[CheckpointKind, dict[str, Any], dict[str, Tensor]]:
    """Read a published file, whichever of the two it is.

    Returns its kind, the fields of ``PaperConfig`` that fit it, and tensors by our names: all of a
    ``PaperModel`` for ``matchnerf``; for ``gmflow`` only what ``initialise_encoder`` takes.

    Raises:
        InputError: no such file, not a file of tensors, or neither layout.
    """
    tensors = read_tensors(path)
    if any(name.startswith("nerf_dec.") for name in tensors):
        config, converted = convert_matchnerf(tensors)
        return "matchnerf", asdict(config), converted
    if any(name.startswith("backbone.") for name in tensors):
        return "gmflow", asdict(PaperConfig()), convert_gmflow(tensors)
    raise InputError(
        f"{path}: expected a checkpoint of GMFlow (backbone.*) or MatchNeRF (feat_enc.*, nerf_dec.*), "
        f"got tensors {_listed(tensors)}; give a published file."
    )


def initialise_encoder(model: PaperModel, tensors: Mapping[str, Tensor]) -> None:
    """Start a model's encoder from converted GMFlow weights; its upsampler stays as it is: GMFlow has none.

    Raises:
        InputError: the tensors do not fit this model's encoder.
    """
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wanted = {name for name in own if name.startswith("encoder.") and not name.startswith("encoder.upsampler.")}
    fits = set(tensors) == wanted and all(own[name] == tuple(tensors[name].shape) for name in wanted)
    if not fits:
        raise InputError(
            f"GMFlow weights: expected {len(wanted)} encoder tensors of this model's shapes, got "
            f"{len(tensors)} that do not fit; keep channels and transformer_layers at their defaults."
        )
    model.load_state_dict(dict(tensors), strict=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a PyTorch file, from under its ``model`` or ``state_dict`` entry if it has one.

    Nothing in the file is executed (``weights_only``).

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise InputError(f"{path}: expected a checkpoint file, found none; check the path.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own advice here is to load the file without this protection: not ours
        with open(path, "rb") as file:
            pickled = file.read(8).startswith(PICKLE_STARTS)
        what = "one with other objects, which are never loaded; re-save its state dict alone"
        other = "a file of another kind; give a published checkpoint, or download it again"
        raise InputError(
            f"{path}: expected a PyTorch file of tensors only, got {what if pickled else other}."
        ) from error
    except UNREADABLE as error:
        raise InputError(
            f"{path}: expected a PyTorch checkpoint, got a damaged or other file; download it again."
        ) from error
    for entry in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping):
            content = content[entry]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path}: expected named tensors, got {type(content).__name__}; give a published checkpoint.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(
                f"{path}: expected tensors by name, got {type(value).__name__} at {name!r}; "
                "give a published checkpoint."
            )
    return {name.removeprefix("module."): value for name, value in content.items()}


def _shapes(config: PaperConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter names and shapes, without making the parameters."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in PaperModel(config).state_dict().items()}


def _renamed(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], kind: str, strip: str = ""
) -> dict[str, Tensor]:
    """``wanted`` (our names and shapes) out of ``tensors``; ``strip`` shortens names in messages."""
    published = {published_name(name): name for name in wanted}
    missing = sorted(name.removeprefix(strip) for name in published.keys() - tensors.keys())
    unknown = sorted(name.removeprefix(strip) for name in tensors.keys() - published.keys())
    if missing or unknown:
        raise InputError(
            f"{kind} checkpoint: expected its published layout, missing {_listed(missing)}, "
            f"unknown {_listed(unknown)}; give the published file."
        )
    for name, ours in published.items():
        if tuple(tensors[name].shape) != wanted[ours]:
            raise InputError(
                f"{kind} checkpoint: expected {name.removeprefix(strip)} of shape {wanted[ours]}, "
                f"got {tuple(tensors[name].shape)}; give the published file."
            )
    return {ours: tensors[name].float().contiguous() for name, ours in published.items()}


def _listed(names: Any, most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more
