"""The one file that knows the Hugging Face hub: weights from it, weights to it, and the metadata of a model card.

It knows files and figures, not models: ``IDNeRF`` stands on ``HubModel`` and says what is in its files. Only
safetensors are fetched; a repository that has nothing but pickled files is refused.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import validate_repo_id

from idnerf.errors import InputError

WEIGHTS_FILE = "weights.safetensors"
"""The file of weights in a repository, in a folder to share and in a run folder."""

TASK, TASK_NAME = "image-to-3d", "Novel view synthesis"
"""The hub's nearest task, and ours."""


@dataclass(frozen=True)
class Figure:
    """One measured number, as a card's metadata lists it.

    Attributes:
        dataset: what was measured on, such as a scene's name.
        setting: under which protocol, and how.
        metric: such as ``psnr``.
        value: the number.
    """

    dataset: str
    setting: str
    metric: str
    value: float


class HubModel(ModelHubMixin, library_name="idnerf", pipeline_tag=TASK, tags=["novel-view-synthesis", "nerf"]):
    """``save_pretrained`` and ``push_to_hub`` of huggingface_hub, with one-line errors."""

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **options: Any) -> str:
        """Upload weights, configuration and model card to the hub repository ``USER/NAME``; it is made if need be.

        Args:
            repo_id: the repository.
            model_card_kwargs: for ``generate_model_card``.
            options: ``private``, ``token``, ``branch``, ``create_pr``, ``commit_message`` ... of huggingface_hub.

        Returns:
            The address of the commit.

        Raises:
            InputError: no such account, not logged in, or no network.
        """
        check_repo_id(repo_id)
        card = {"repo_id": repo_id, **(model_card_kwargs or {})}
        try:
            return str(super().push_to_hub(repo_id, model_card_kwargs=card, **options))
        except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
            raise InputError(f"cannot push to {repo_id}: {_push_trouble(error)}") from error


def check_repo_id(repo_id: str) -> None:
    """Raises InputError unless ``repo_id`` is USER/NAME as the hub wants it."""
    try:
        validate_repo_id(repo_id)
        good = repo_id.count("/") == 1
    except HFValidationError:
        good = False
    if not good:
        raise InputError(
            "expected --repo-id as USER/NAME of letters, digits, '-', '_' and '.', such as me/my-weights; "
            f"got {repo_id!r}"
        )


def fetch_weights(text: str, **options: Any) -> Path:
    """The weights file of a hub id ``user/model`` or ``user/model@revision``, from the cache where it is there.

    Raises:
        InputError: nothing of that name, no weights in it, or no network.
    """
    repo_id, _, revision = text.partition("@")
    if revision:
        options = {**options, "revision": revision}
    try:
        with _no_warnings():
            return Path(hf_hub_download(repo_id, WEIGHTS_FILE, **options))
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = "the hub has no such model, or it is private: check the name, or `hf auth login`"
        raise InputError(f"no file {text!r} here, and {reason}") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repo_id} on the hub has no revision {options.get('revision')!r}") from error
    except LocalEntryNotFoundError as error:  # an EntryNotFoundError too: it comes first
        reason = "it is not in the hub's cache and the hub cannot be reached: go online once, or give a file"
        raise InputError(f"no file {text!r} here; as a hub id {reason}") from error
    except EntryNotFoundError as error:
        raise InputError(
            f"{repo_id} on the hub holds no {WEIGHTS_FILE}: no weights of idnerf (pickled files are never loaded)"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"cannot get {text!r} from the hub: {_first_line(error)}") from error


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Keeps back the hub's words about each of its tries, unless more than warnings were asked for: what comes of them
    is said once, by us."""
    before = hub_logging.get_verbosity()
    if before == hub_logging.WARNING:
        hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


def model_card(text: str, figures: Sequence[Figure], *, name: str, licence: str | None = None) -> ModelCard:
    """A model card: ``text`` below metadata that the hub reads, with the figures as its evaluation results."""
    info = HubModel._hub_mixin_info.model_card_data
    data = ModelCardData(
        library_name=info.library_name,
        pipeline_tag=TASK,
        tags=info.tags,
        license=licence,
        model_name=name if figures else None,
        eval_results=[_result(figure) for figure in figures] or None,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n")


def _result(figure: Figure) -> EvalResult:
    return EvalResult(
        task_type=TASK,
        task_name=TASK_NAME,
        dataset_type=figure.dataset,
        dataset_name=figure.dataset,
        dataset_config=figure.setting,
        metric_type=figure.metric,
        metric_value=figure.value,
    )


def _push_trouble(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on; unset HF_HUB_OFFLINE"
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        return "not logged in there, or not allowed to write: `hf auth login` with a token that may write"
    if status is None:
        return f"the hub cannot be reached ({_first_line(error)}); try again online"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
