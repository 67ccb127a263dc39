"""Where a foreign model comes from, and one line that says how to get it when it is not there."""

from dataclasses import dataclass
from pathlib import Path

from idnerf.errors import InputError


@dataclass(frozen=True)
class ModelSource:
    """``text`` as the user gave it; ``folder`` when it is local; ``revision`` of a hub id written ``id@revision``."""

    text: str
    folder: Path | None
    revision: str | None

    @property
    def location(self) -> str:
        """What ``from_pretrained`` takes."""
        return self.text.partition("@")[0] if self.folder is None else str(self.folder)


def model_source(text: str) -> ModelSource:
    """A folder if there is one, else a hub id ``user/model`` or ``user/model@revision``.

    Raises:
        InputError: neither.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return ModelSource(text, path, None)
    name, _, revision = text.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise InputError(
            "--guidance.prior.path or image-encoder: expected a local folder in diffusers' format or a hub id such as "
            f"user/model, got {text!r}"
        )
    return ModelSource(text, None, revision or None)


def hub_error(source: ModelSource, part: str, error: Exception) -> InputError:
    """The one line for a model that cannot be loaded: damaged folder, gated, gone, or no network."""
    chain, cause = [], error
    while cause is not None:
        chain.append(f"{type(cause).__name__} {cause}".lower())
        cause = cause.__cause__ or cause.__context__
    words = " ".join(chain)
    if source.folder is not None:
        reason = " ".join(str(error).split())[:160]
        return InputError(f"{source.folder}/{part} cannot be read ({reason}); download the model anew")
    name = source.location
    if "gated" in words or "401" in words:
        return InputError(
            f"{name} is gated or private: accept its terms at https://huggingface.co/{name}, then `hf auth login`, or "
            "give a local folder in diffusers' format as --guidance.prior.path"
        )
    return InputError(
        f"cannot get {part} of {name} from the Hugging Face hub (no network, offline mode, or no such model): run "
        f"`hf download {name}` where there is one, or give a local folder in diffusers' format as --guidance.prior.path"
    )
