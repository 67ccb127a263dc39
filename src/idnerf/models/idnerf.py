"""The model as a user holds it: one class, two configurations of the same parts.

Views(source), Cameras(target)
  IDNeRF.encode(source)                       once per set of source views
  IDNeRF.infer_latent(features, target)       once per target view
  IDNeRF.render_target(features, target)      tile by tile, ray chunk by ray chunk  -> RenderOutput
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from idnerf.checkpoint import locate_weights, parameters_from_half, read_tensors, write_tensors
from idnerf.errors import InputError
from idnerf.models.cascade import Cascade, CascadeConfig, Quality
from idnerf.models.latent import TargetLatent
from idnerf.models.paper import PaperConfig, PaperModel
from idnerf.rendering.renderer import render_in_tiles
from idnerf.types import Cameras, RenderOutput, Views

ADDED_PARTS = ("core.latent.", "core.view_refinement.")
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


class IDNeRF(nn.Module):
    """Generalizable view synthesis from a few posed photos (ID-NeRF, arXiv 2402.01217).

    ``core`` is the configuration's network: ``Cascade`` or ``PaperModel``.
    """

    def __init__(self, config: ModelConfig | None = None):
        super().__init__()
        self.config = config or ModelConfig()
        self.core: Cascade | PaperModel
        if self.config.configuration == "cascade":
            self.core = Cascade(self.config.cascade)
        else:
            self.core = PaperModel(self.config.paper)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @classmethod
    def from_pretrained(cls, weights: str | Path = "default") -> "IDNeRF":
        """Load weights: ``default`` (they come with the package), a .safetensors file, a run folder, or a hub id.

        Raises:
            InputError: nothing there, not our format, truncated, or the tensors do not fit the configuration.
        """
        path, tensors, config = read_weights(weights)
        model = cls(config)
        expected = model.state_dict()
        wrong = [k for k in expected if k not in tensors or tensors[k].shape != expected[k].shape]
        unknown = [k for k in tensors if k not in expected]
        if wrong or unknown:
            raise InputError(
                f"{path} does not fit this version of the model: {len(wrong)} tensors missing or of another shape "
                f"(first: {wrong[:1]}), {len(unknown)} unknown (first: {unknown[:1]}); use the version that wrote it"
            )
        model.load_state_dict(parameters_from_half(tensors))
        return model.eval()

    @classmethod
    def extending(cls, weights: str | Path, config: ModelConfig) -> "IDNeRF":
        """A model of ``config`` that starts from ``weights``; view refinement and latent that they lack start afresh.

        Raises:
            InputError: the weights hold what ``config`` lacks, or lack more than that.
        """
        path, tensors, _ = read_weights(weights)
        model = cls(config)
        expected = model.state_dict()
        fits = {name: tensor for name, tensor in tensors.items() if name in expected}
        unknown = [k for k in tensors if k not in expected or tensors[k].shape != expected[k].shape]
        missing = [k for k in expected if k not in tensors and not k.startswith(ADDED_PARTS)]
        if unknown or missing:
            raise InputError(
                f"{path} cannot be extended to these model options: {(unknown or missing)[0]} differs; only view "
                "refinement and latent of the cascade can be added to trained weights"
            )
        model.load_state_dict(parameters_from_half(fits), strict=False)
        return model

    def save(self, path: str | Path, *, half: bool = True, **metadata: Any) -> None:
        """Write weights and configuration as safetensors, in half precision unless ``half=False``."""
        tensors = {k: v.half() if half and v.dtype == torch.float32 else v for k, v in self.state_dict().items()}
        write_tensors(Path(path), tensors, {"config": config_to_json(self.config), **metadata})

    def encode(self, source: Views) -> Any:
        """Features of source views [batch view]: everything that does not depend on the target."""
        return self.core.encode(source)

    def infer_latent(self, features: Any, target: Cameras) -> TargetLatent | None:
        """The target-view latent of whole targets [batch], or None where the configuration has none."""
        return self.core.infer_latent(features, target)

    @torch.no_grad()
    def render_target(
        self,
        features: Any,
        target: Cameras,
        *,
        quality: Quality = "full",
        latent: TargetLatent | None = None,
    ) -> RenderOutput:
        """Render targets [batch] from encoded source views; tiled, so memory does not depend on the image size.

        ``latent``: put in the place of the inferred one (``TargetLatent.with_values``: what does it do?).
        """
        latent = self.infer_latent(features, target) if latent is None else latent
        if isinstance(self.core, Cascade):
            core = self.core
            return render_in_tiles(
                lambda tile: core.render_tile(features, tile, latent=latent, quality=quality), target
            )
        core_paper = self.core
        return render_in_tiles(lambda tile: core_paper.render_tile(features, tile, latent=latent), target, margin=0)

    @torch.no_grad()
    def render(self, source: Views, target: Cameras, *, quality: Quality = "full") -> RenderOutput:
        """New view of ``target`` (one camera, or [batch]) from ``source`` views [view] (or [batch view]).

        Returns images without batch axis when ``target`` is one camera.
        """
        single = len(target.shape) == 0
        if single:
            source, target = source[None], target[None]
        output = self.render_target(self.encode(source), target, quality=quality)
        return output.map(lambda x: x[0]) if single else output


def read_weights(weights: str | Path) -> tuple[Path, dict[str, Tensor], ModelConfig]:
    """File, tensors and configuration of ``weights`` (see ``IDNeRF.from_pretrained``)."""
    path = locate_weights(weights)
    tensors, metadata = read_tensors(path)
    if "config" not in metadata:
        raise InputError(f"{path} holds no model configuration; expected weights written by `idnerf train`")
    return path, tensors, config_from_json(metadata["config"])


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
    known = {f.name for f in dataclasses.fields(kinds[name])}
    if unknown := sorted(set(fields) - known):
        raise InputError(f"weights come from a newer version: unknown option {unknown[0]!r} of {name}; update idnerf")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return ModelConfig(configuration=name, **{name: kinds[name](**fields)})
