"""Files of weights: safetensors with the configuration as JSON in the header. Nothing is ever unpickled.

This module knows tensors and JSON, not models, so that both models and trainers can stand on it.
"""

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from idnerf.errors import InputError

FORMAT = "idnerf-1"
"""Written into every file; a file of another format is refused by name."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to ``path``: to a temporary file first, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    header = {"format": FORMAT, **{key: json.dumps(value) for key, value in metadata.items()}}
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=header)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path, what: str = "weights") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file that ``write_tensors`` wrote. Raises InputError on anything else."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"expected a file of {what}, found nothing at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise InputError(
                    f"{path} is a safetensors file but not {what} of this version (format {header.get('format')!r}, "
                    f"expected {FORMAT!r}): published checkpoints are brought in by `idnerf convert`"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = {key: json.loads(value) for key, value in header.items() if key != "format"}
    except (SafetensorError, OSError, ValueError) as error:
        hint = "it looks truncated" if path.suffix == ".safetensors" else "is it a .pth? try `idnerf convert`"
        raise InputError(f"{path} is not a readable safetensors file of {what} ({hint})") from error
    return tensors, metadata


def locate_weights(weights: str | Path) -> Path:
    """A file for ``default``, a path, or a Hugging Face hub id such as ``user/model``."""
    text = str(weights)
    if text == "default":
        path = Path(str(resources.files("idnerf") / "weights" / "default.safetensors"))
        if not path.is_file():
            raise InputError("the package holds no default weights (src/idnerf/weights/default.safetensors is missing)")
        return path
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if path.is_dir() and (path / "weights.safetensors").is_file():
        return path / "weights.safetensors"
    looks_like_hub_id = text.count("/") == 1 and path.suffix != ".safetensors" and not text.startswith((".", "/", "~"))
    if not looks_like_hub_id or path.exists():
        raise InputError(
            f"expected --weights to be `default`, a .safetensors file, a run folder or a hub id; got {text!r}"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(text, "weights.safetensors"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(f"no file {text!r} here, and the hub has no weights.safetensors under that id") from error


def parameters_from_half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights are stored in half precision and used in float32."""
    return {k: v.float() if v.dtype in (torch.float16, torch.bfloat16) else v for k, v in tensors.items()}
