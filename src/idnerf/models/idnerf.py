"""The model as a user holds it: one class, two configurations of the same parts.

Views(source), Cameras(target)
  IDNeRF.encode(source)                       once per set of source views
  IDNeRF.infer_latent(features, target)       once per target view
  IDNeRF.fit_path(features, path)             once per video: a depth range for all of its frames
  IDNeRF.render_target(features, target)      tile by tile, ray chunk by ray chunk  -> RenderOutput
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from idnerf.checkpoint import (
    fingerprint,
    locate_weights,
    lossless_half,
    parameters_from_half,
    read_metadata,
    read_tensors,
    write_tensors,
)
from idnerf.errors import InputError
from idnerf.hub import WEIGHTS_FILE, HubModel, model_card
from idnerf.models.cascade import Cascade, CascadeConfig, Quality
from idnerf.models.enlargement import ENLARGEMENT, enlarged
from idnerf.models.latent import TargetLatent
from idnerf.models.model_card import CardFacts, Report, card_figures, card_text
from idnerf.models.paper import PaperConfig, PaperModel
from idnerf.rendering.renderer import STEP, TILE_MARGIN, TILE_PIXELS, concatenate, render_in_tiles
from idnerf.types import Cameras, RenderOutput, Views

ADDED_PARTS = (
    "core.latent.",
    "core.view_refinement.",
    "core.encoder.mixing.",
    "core.middle.",
    "core.encoder.middle_head.",
    "core.samples.from_middle.",
    "core.volume.from_halved.",
    "core.volume.halved_gains.",
    "core.volume.unet.more.",
    "core.refinement.deeper.",
    "core.refinement.context_blending.",
)
"""Names of the weights that can be added to trained ones."""


@dataclass(frozen=True)
class ModelConfig:
    """Which configuration, and its sizes."""

    configuration: Literal["cascade", "paper"] = "cascade"
    """`cascade`: few samples drawn from a coarse volume, blended colours; `paper`: MatchNeRF's and ID-NeRF's."""
    cascade: CascadeConfig = field(default_factory=CascadeConfig)
    """Sizes of the `cascade` configuration."""
    paper: PaperConfig = field(default_factory=PaperConfig)
    """Sizes of the `paper` configuration."""


class IDNeRF(nn.Module, HubModel):
    """Generalizable view synthesis from a few posed photos (ID-NeRF, arXiv 2402.01217).

    ``core`` is the configuration's network: ``Cascade`` or ``PaperModel``. ``metadata`` is what the weights' file
    recorded beside the configuration (steps, training data, ...), and goes with the weights when they are saved.

    Attributes:
        added: names of the parameters that ``extending`` could not take from its weights.
        precision: what ``encode`` and ``render_target`` compute the cascade's networks in; camera geometry, depth
            distributions and colours stay float32. `bf16` pays where ``has_fast_bfloat16`` says so.
    """

    precision: Literal["float32", "bf16"] = "float32"

    def __init__(self, config: ModelConfig | None = None):
        super().__init__()
        self.config = config or ModelConfig()
        self.metadata: dict[str, Any] = {}
        self.added: frozenset[str] = frozenset()
        self.core: Cascade | PaperModel
        if self.config.configuration == "cascade":
            self.core = Cascade(self.config.cascade)
        else:
            self.core = PaperModel(self.config.paper)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def has_fast_quality(self) -> bool:
        """Whether quality ``fast`` differs from ``full``: the `paper` configuration renders alike either way."""
        return isinstance(self.core, Cascade)

    @property
    def network_precision(self) -> Literal["float32", "bf16"]:
        """What the networks are computed in: ``precision`` where the configuration heeds it, as the cascade does."""
        return self.precision if isinstance(self.core, Cascade) else "float32"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path = "default", **hub_options: Any) -> "IDNeRF":
        """Load weights: ``default`` (they come with the package), a .safetensors file, a folder of ``save_pretrained``
        or of a training run, or a hub id (``user/model``, ``user/model@revision``).

        Args:
            hub_options: for a hub id: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

        Raises:
            InputError: nothing there, not our format, truncated, or the tensors do not fit the configuration.
        """
        path, tensors, metadata, config = read_weights(pretrained_model_name_or_path, **hub_options)
        model = cls(config)
        expected = model.state_dict()
        wrong = [k for k in expected if k not in tensors or tensors[k].shape != expected[k].shape]
        unknown = [k for k in tensors if k not in expected]
        if wrong or unknown:
            raise InputError(
                f"{path} does not fit this version of the model: {len(wrong)} tensors missing or of another shape "
                f"(first: {wrong[:1]}), {len(unknown)} unknown (first: {unknown[:1]}); use the version that wrote it"
            )
        if spoilt := next((k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()), None):
            raise InputError(
                f"{path} holds numbers that are not finite (in {spoilt}): its training diverged; use others"
            )
        model.load_state_dict(parameters_from_half(tensors))
        model.metadata = metadata
        return model.eval()

    @classmethod
    def extending(cls, weights: str | Path, config: ModelConfig) -> "IDNeRF":
        """A model of ``config`` that starts from ``weights``; parts that can be added (``ADDED_PARTS``) start afresh.

        Raises:
            InputError: the weights hold what ``config`` lacks, or lack more than that.
        """
        path, tensors, metadata, _ = read_weights(weights)
        model = cls(config)
        expected = model.state_dict()
        fits = {name: tensor for name, tensor in tensors.items() if name in expected}
        unknown = [k for k in tensors if k not in expected or tensors[k].shape != expected[k].shape]
        missing = [k for k in expected if k not in tensors and not k.startswith(ADDED_PARTS)]
        if unknown or missing:
            raise InputError(
                f"{path} cannot be extended to these model options: {(unknown or missing)[0]} differs; only "
                "view refinement, latent, cross-view layers, middle stage, halved matching, context blending, further "
                "blocks of the coarse volume and deeper scales of the refinement can be added"
            )
        model.load_state_dict(parameters_from_half(fits), strict=False)
        model.metadata = metadata
        model.added = frozenset(set(expected) - set(fits))
        if isinstance(model.core, Cascade):  # of the weights that were just loaded
            volume = model.core.volume
            gains = (f"core.volume.halved_gains.{number}" for number in range(len(volume.halved_gains)))
            volume.share_similarity(number for number, name in enumerate(gains) if name in model.added)
        return model

    def save(self, path: str | Path, *, half: bool = True, **metadata: Any) -> None:
        """Write weights and configuration as safetensors, in half precision unless ``half=False``.

        ``metadata`` joins what the weights' own file recorded.
        """
        tensors = {k: v.half() if half and v.dtype == torch.float32 else v for k, v in self.state_dict().items()}
        self._write(Path(path), tensors, metadata)

    def _write(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        write_tensors(path, tensors, {**self.metadata, **metadata, "config": config_to_json(self.config)})

    def _save_pretrained(self, save_directory: Path) -> None:
        """What ``save_pretrained`` and ``push_to_hub`` write beside the model card; loaded back bit for bit."""
        tensors = {name: lossless_half(value) for name, value in self.state_dict().items()}
        self._write(save_directory / WEIGHTS_FILE, tensors, {})
        config = json.dumps(config_to_json(self.config), indent=2, sort_keys=True)
        (save_directory / "config.json").write_text(
            config + "\n", encoding="utf-8"
        )  # to read; loading needs only WEIGHTS_FILE

    def generate_model_card(
        self,
        *,
        report: Report | None = None,
        licence: str | None = None,
        data: str | None = None,
        repo_id: str | None = None,
        name: str | None = None,
    ) -> Any:
        """The README.md that goes with the weights (a ``huggingface_hub.ModelCard``).

        Args:
            report: what `idnerf evaluate --json` wrote for these very weights; the card's only source of figures.
            licence: such as ``apache-2.0``.
            data: what the weights were trained on, where their file does not say.
            repo_id: the hub repository it is for, for the lines that say how to load it.
            name: title; the repository's name by default.

        Raises:
            InputError: the report is of other weights.
        """
        own = self.fingerprint()
        if report is not None and report.get("weights_sha256") != own:
            raise InputError(
                f"the report is of other weights ({report.get('weights')!r}, fingerprint "
                f"{str(report.get('weights_sha256'))[:12]}; these have {own[:12]}): run `idnerf evaluate` on these"
            )
        title = name or (repo_id.rpartition("/")[2] if repo_id else "idnerf weights")
        facts = CardFacts(
            name=title,
            location=repo_id or "PATH/TO/THIS/FOLDER",
            configuration=self.config.configuration,
            parameters=sum(parameter.numel() for parameter in self.parameters()),
            fingerprint=own,
            header=self.metadata,
            data=data,
            licence=licence,
        )
        return model_card(card_text(facts, report), card_figures(report), name=title, licence=licence)

    def fingerprint(self) -> str:
        """SHA-256 of the weights' values: tells whose scores a report holds."""
        return fingerprint(self.state_dict())

    def encode(self, source: Views, *, enlarge: bool = True) -> Any:
        """Features of source views [batch view]: everything that does not depend on the target.

        ``enlarge``: small photos first, as the configuration says; without it they take a fifth of the time.
        """
        with self._mixed_precision():
            if enlarge and self.enlarges(source):
                return replace(self.core.encode(enlarged(source)), enlargement=ENLARGEMENT)
            return self.core.encode(source)

    def enlarges(self, source: Views) -> bool:
        """Whether these source views are enlarged before they are encoded, as small ones are."""
        width, height = source.cameras.size
        return isinstance(self.core, Cascade) and width * height <= self.config.cascade.enlarge_up_to

    def _mixed_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.network_precision == "bf16")

    def infer_latent(self, features: Any, target: Cameras) -> TargetLatent | None:
        """The target-view latent of whole targets [batch], or None where the configuration has none."""
        return self.core.infer_latent(features, target)

    @torch.no_grad()
    def fit_path(self, features: Any, path: Cameras, *, quality: Quality = "full") -> Cameras:
        """The cameras [frame] of a video with the depth range that the path as a whole needs, for ``render_target``
        with ``fit_range=False``: frames that each decide for themselves may flicker. A latent is of a frame as it was
        given: pass it to ``render_target``.

        Args:
            features: of one set of source views.

        Raises:
            InputError: an unknown quality; no frames.
        """
        check_quality(quality)
        if len(path.shape) != 1 or len(path) == 0:
            raise InputError(f"expected the cameras [frame] of a path, got shape {list(path.shape)}")
        if not isinstance(self.core, Cascade):
            return path
        with self._mixed_precision():
            return self.core.fit_path(features, path, quality)

    @torch.no_grad()
    def render_target(
        self,
        features: Any,
        target: Cameras,
        *,
        quality: Quality = "full",
        latent: TargetLatent | None = None,
        fit_range: bool = True,
        half_size_depth: bool | None = None,
    ) -> RenderOutput:
        """Render targets [batch] from encoded source views; tiled, so memory does not depend on the image size.

        Args:
            latent: put in the place of the inferred one (``TargetLatent.with_values``: what does it do?).
            fit_range: move near and far outwards where the sources show surfaces beyond them; not for frames of
                ``fit_path``, which have the range of their path.
            half_size_depth: find depth at half the targets' size; None as the configuration says for that size. For a
                window of a target, what it says for the whole.

        Raises:
            InputError: an unknown quality.
        """
        check_quality(quality)
        latent = self.infer_latent(features, target) if latent is None else latent
        if isinstance(self.core, Cascade):
            core = self.core
            with self._mixed_precision():
                target = core.fit_range(features, target, quality) if fit_range else target
                half = core.has_half_size_depth(target) if half_size_depth is None else half_size_depth
                render_tile = partial(core.render_tile, features, latent=latent, quality=quality, half_size_depth=half)
                scale = 2 if half else 1  # of the cells, and of what lies around them
                return render_in_tiles(
                    render_tile,
                    target,
                    tile_pixels=scale * TILE_PIXELS,
                    margin=scale * TILE_MARGIN,
                    step=scale * STEP,
                )
        core_paper = self.core
        return render_in_tiles(lambda tile: core_paper.render_tile(features, tile, latent=latent), target, margin=0)

    @torch.no_grad()
    def render(self, source: Views, target: Cameras, *, quality: Quality = "full") -> RenderOutput:
        """New view of ``target`` (one camera, or [batch]) from ``source`` views [view], or [batch view] for as many
        targets, each with its own.

        Returns images without batch axis when ``target`` is one camera; numbers of any precision become float32.

        Raises:
            InputError: fewer than two source views, images that are not floats, an unknown quality, sources and
                targets of other shapes.
        """
        if not source.images.is_floating_point():
            raise InputError(
                f"expected images as floats in [0, 1], got {source.images.dtype}: divide them by 255, or call "
                "idnerf.render"
            )
        check_quality(quality)
        check_shapes(source, target)
        source, target = source.float(), target.float()
        if len(source.cameras.shape) == 2:
            return self.render_target(self.encode(source), target, quality=quality)
        features = self.encode(source[None])
        if len(target.shape) == 0:
            return self.render_target(features, target[None], quality=quality).map(lambda x: x[0])
        one_by_one = [self.render_target(features, target[i : i + 1], quality=quality) for i in range(len(target))]
        return concatenate(one_by_one, dim=0)


def check_shapes(source: Views, target: Cameras) -> None:
    """Raises ``InputError`` for batch shapes of sources and targets that do not go together."""
    views, targets = tuple(source.cameras.shape), tuple(target.shape)
    if tuple(source.images.shape[:-3]) != views:
        raise InputError(
            f"expected a camera for each image, got images {list(source.images.shape)} and cameras {list(views)}"
        )
    shared = len(views) == 1 and (targets == () or (len(targets) == 1 and targets[0] > 0))
    own = len(views) == 2 and views[0] > 0 and targets == views[:1]
    if not (shared or own):
        raise InputError(
            "expected source [view] with target [] or [batch], or source [batch, view] with target [batch]; got source "
            f"{list(views)} and target {list(targets)}"
        )


def check_quality(quality: str) -> None:
    """Raises ``InputError`` for what is no ``Quality``: a slip would otherwise render the other one."""
    if quality not in get_args(Quality):
        raise InputError(f"expected quality 'full' or 'fast', got {quality!r}")


def read_weights(
    weights: str | Path, **hub_options: Any
) -> tuple[Path, dict[str, Tensor], dict[str, Any], ModelConfig]:
    """File, tensors, metadata and configuration of ``weights`` (see ``IDNeRF.from_pretrained``)."""
    path = locate_weights(weights, **hub_options)
    tensors, metadata = read_tensors(path)
    config = _config_in(metadata, path)
    del metadata["config"]
    return path, tensors, metadata, config


def read_model_config(weights: str | Path) -> ModelConfig:
    """The configuration alone of ``weights`` (see ``IDNeRF.from_pretrained``)."""
    path = locate_weights(weights)
    return _config_in(read_metadata(path), path)


def _config_in(metadata: Mapping[str, Any], path: Path) -> ModelConfig:
    if "config" not in metadata:
        raise InputError(f"{path} holds no model configuration: {_other_file(metadata)}")
    config = metadata["config"]
    if not isinstance(config, Mapping):
        raise InputError(f"{path} holds a model configuration of another kind; use the version of idnerf that wrote it")
    return config_from_json(config)


def _other_file(metadata: Mapping[str, Any]) -> str:
    """What a file of ours without a model configuration is, and what to do."""
    if "train_config" in metadata:
        return f"it is the state of a training; the weights are in {WEIGHTS_FILE} beside it"
    if "encoder" in metadata:
        return "it is an encoder alone, which starts a training (`idnerf train idnerf-dtu --encoder-init`)"
    return "expected weights written by `idnerf train` or `idnerf convert`"


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Only the part of the configuration that the weights depend on."""
    name = config.configuration
    return {"configuration": name, name: dataclasses.asdict(getattr(config, name))}


def config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    """Inverse of ``config_to_json``; an unknown field means weights of a newer version, and is named."""
    name = values.get("configuration")
    kinds = {"cascade": CascadeConfig, "paper": PaperConfig}
    if name not in kinds:
        raise InputError(f"weights name an unknown configuration {name!r}; expected one of {sorted(kinds)}")
    fields = dict(values.get(name, {}))
    if name == "cascade":  # weights from before these parts do not speak of them
        fields = {"middle_hypotheses": 0, "context_blending": False, "halvings": 0, **fields}
    known = {f.name for f in dataclasses.fields(kinds[name])}
    if unknown := sorted(set(fields) - known):
        raise InputError(f"weights come from a newer version: unknown option {unknown[0]!r} of {name}; update idnerf")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return ModelConfig(configuration=name, **{name: kinds[name](**fields)})
