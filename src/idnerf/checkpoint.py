"""Files of weights: safetensors with the configuration as JSON in the header. Nothing is ever unpickled.

This module knows tensors and JSON, not models, so that both models and trainers can stand on it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from idnerf.errors import InputError
from idnerf.files import place_to_write

FORMAT = "idnerf-1"
"""Written into every file; a file of another format is refused by name."""

FOREIGN_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar", ".pkl", ".npz", ".onnx")
"""A missing path that ends so is a missing file, not a hub id."""

PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How PyTorch's files begin: a zip archive that holds a pickle, or a bare pickle."""

LFS_START = b"version https://git-lfs"
"""What git leaves in the place of a large file that was not fetched."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to ``path``: to a temporary file first, then renamed.

    Raises:
        InputError: the place cannot be written, or is no regular file.
    """
    path = Path(path)
    place = place_to_write(path)
    temporary = place.with_name(place.name + f".{os.getpid()}.tmp")
    header = {"format": FORMAT, **{key: json.dumps(value) for key, value in metadata.items()}}
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=header)
        os.chmod(temporary, 0o644)
        os.replace(temporary, place)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot write {path}: {reason}; choose another place") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def read_tensors(path: Path, what: str = "weights") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file that ``write_tensors`` wrote. Raises InputError on anything else."""
    with _opened(Path(path), what) as (file, metadata):
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 (not a dict)


def read_metadata(path: Path, what: str = "weights") -> dict[str, Any]:
    """Metadata alone of a file that ``write_tensors`` wrote. Raises InputError on anything else."""
    with _opened(Path(path), what) as (_, metadata):
        return metadata


@contextmanager
def _opened(path: Path, what: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open file and its metadata; what goes wrong until it is closed becomes an InputError."""
    if not path.is_file():
        raise InputError(f"expected a file of {what}, found nothing at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise InputError(f"{path} is a safetensors file but not {what} of this version: {_origin(header)}")
            yield file, {key: json.loads(value) for key, value in header.items() if key != "format"}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable safetensors file of {what}: {_trouble(path, error)}") from error


def _origin(header: Mapping[str, str]) -> str:
    """Where a safetensors file that is not of our format seems to come from, and what to do."""
    found = header.get("format")
    if found is not None and found.startswith("idnerf-"):
        return f"its format is {found!r}, this version reads {FORMAT!r}; use the version of idnerf that wrote it"
    return (
        f"another program wrote it (format {found!r}, expected {FORMAT!r}); `idnerf convert` brings in published "
        "checkpoints of MatchNeRF and GMFlow"
    )


def _trouble(path: Path, error: Exception) -> str:
    """What a file that is no safetensors file seems to be, and what to do."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            announced = 8 + length
            if start[8:9] == b"{" and announced <= path.stat().st_size:
                file.seek(8)
                entries = json.loads(file.read(length))
                ends = [e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"]
                announced += max(ends, default=0)
        size = path.stat().st_size
    except OSError as read_error:
        return f"{read_error.strerror or read_error}; check that it may be read"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its header is damaged; copy or download it again"
    if start.startswith(PICKLE_STARTS):
        return (
            "it is a pickled PyTorch file, and weights are never unpickled here; `idnerf convert` brings in published "
            "checkpoints of MatchNeRF and GMFlow"
        )
    if start.startswith(LFS_START):
        return "it is a Git LFS pointer to the file; fetch the file itself with `git lfs pull`"
    if size < 8 or (start[8:9] == b"{" and size < announced):
        wanted = f"at least {announced:,}" if size >= 8 else "more"
        return f"it is truncated ({size:,} bytes of {wanted}); copy or download it again"
    if start[8:9] == b"{":
        return f"its header is damaged ({next(iter(str(error).splitlines()), 'unknown')}); copy or download it again"
    if start.lstrip()[:1] in (b"<", b"{", b"#") or start.isascii():
        return "it is text, perhaps a web page that was saved in its place; download the file itself"
    return "its content is of another kind; expected weights written by `idnerf train` or `idnerf convert`"


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values in float32: the same however the weights are stored."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        value = value.float() if value.is_floating_point() else value
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def locate_weights(weights: str | Path, **hub_options: Any) -> Path:
    """A file for ``default``, a path, a folder, or a Hugging Face hub id such as ``user/model`` or ``user/model@v2``.

    Args:
        hub_options: ``revision``, ``token``, ``cache_dir`` ... of ``huggingface_hub.hf_hub_download``.
    """
    text = str(weights)
    if text == "default":
        path = Path(str(resources.files("idnerf") / "weights" / "default.safetensors"))
        if not path.is_file():
            raise InputError("the package holds no default weights (src/idnerf/weights/default.safetensors is missing)")
        return path
    from idnerf.hub import WEIGHTS_FILE, fetch_weights

    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / WEIGHTS_FILE).is_file():
            raise InputError(f"expected --weights to be a file or a folder with {WEIGHTS_FILE}; {path} has none")
        return path / WEIGHTS_FILE
    repository = text.partition("@")[0]  # a revision may have slashes: refs/pr/1
    looks_like_hub_id = repository.count("/") == 1 and not (text.startswith((".", "/", "~")) or text.endswith("/"))
    if not looks_like_hub_id or path.suffix in FOREIGN_SUFFIXES:
        raise InputError(
            f"expected --weights to be `default`, a .safetensors file, a run folder or a hub id; got {text!r}, which "
            "does not exist"
        )
    # more likely a slip than a user of the hub who is called like a folder here
    if path.parent.is_dir() and "@" not in text and not hub_options:
        raise InputError(
            f"expected --weights to be there, found no file or folder {text!r}: {path.parent} is a folder here, so the "
            "name is not looked up on the hub; check it"
        )
    return fetch_weights(text, **hub_options)


def lossless_half(tensor: Tensor) -> Tensor:
    """The tensor in half precision where that loses nothing, else as it is."""
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor


def parameters_from_half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights are stored in half precision and used in float32."""
    return {k: v.float() if v.dtype in (torch.float16, torch.bfloat16) else v for k, v in tensors.items()}
