"""The networks: surveys stacked early, joined late, or let attend to each other; p(z) as logits of bins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_core.checkpoint import load_strict, load_tensors, save_tensors
from fusion_core.errors import CheckpointError, ConfigError, ShapeError, check_shape, reading
from fusion_core.hub import CONFIG, WEIGHTS, model_file, save_model
from mantis_photoz import losses
from mantis_photoz.config import EARLY, FusionConfig
from mantis_photoz.encoders import build_encoder, map_channels
from mantis_photoz.grid import training_edges

TOKENS = 4  # per side of a survey's map, for hybrid fusion
_ACTIVATIONS: dict[str, type[nn.Module]] = {"report": nn.LeakyReLU, "late": nn.ReLU}

Images = Mapping[str, Float[Tensor, "batch bands height width"]]


class Attention(nn.Module):
    """Surveys' maps as tokens of one transformer; what is absent is not attended to (hybrid fusion).

    Args:
        channels: survey -> channels of its map.
        width: of the tokens.
        layers: of the transformer.
    """

    def __init__(self, channels: Mapping[str, int], width: int, layers: int) -> None:
        super().__init__()
        self.project = nn.ModuleDict({name: nn.Conv2d(count, width, 1) for name, count in channels.items()})
        self.survey = nn.Parameter(0.02 * torch.randn(len(channels), 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(TOKENS**2, width))
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 32), 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, maps: Mapping[str, Tensor], present: Bool[Tensor, "batch surveys"]
    ) -> Float[Tensor, "batch width"]:
        """The query's state after it has attended to the surveys that are present."""
        rows = [self.query.expand(present.shape[0], -1, -1)]
        for number, (name, project) in enumerate(self.project.items()):
            small = F.adaptive_avg_pool2d(project(maps[name]), TOKENS).flatten(2).mT
            rows.append(small + self.place + self.survey[number])
        always = present.new_ones(present.shape[0], 1)
        seen = torch.cat([always, present.repeat_interleave(TOKENS**2, dim=1)], dim=1)
        mask = torch.zeros(seen.shape, dtype=rows[0].dtype, device=seen.device).masked_fill(~seen, -torch.inf)
        return self.norm(self.layers(torch.cat(rows, dim=1), src_key_padding_mask=mask)[:, 0])


def quantile_levels(config: FusionConfig) -> Tensor:
    """(components,) even levels inside (0, 1) of the head ``"quantile"``."""
    return (torch.arange(config.components, dtype=torch.float64) + 1) / (config.components + 1)


def bin_logits(outputs: Float[Tensor, "batch outputs"], config: FusionConfig) -> Float[Tensor, "batch bins"]:
    """The last layer's outputs as logits of the bins."""
    if config.head == "bins":
        return outputs
    edges = training_edges(config.bins, config.z_max).to(outputs.device)
    if config.head == "mdn":
        pmf = losses.mixture_pmf(outputs, edges)
    else:
        levels = quantile_levels(config).to(outputs.device)
        pmf = losses.quantile_pmf(losses.quantiles_from(outputs, config.z_max), levels, edges)
    # A row that is not finite stays so: what comes after makes it uniform and says so.
    return pmf.clamp(min=1e-30).log().to(torch.promote_types(outputs.dtype, torch.float32))


class FusionModel(nn.Module, PyTorchModelHubMixin):
    """From scaled images and dust to the logits of p(z).

    Official weights' names after :mod:`mantis_photoz.convert`: ``encoder.early.*`` or ``encoder.SURVEY.*``,
    ``head.0.*``, ``head.2.*``.

    Args:
        config: the network's settings.
        pretrained: start the encoders from timm's weights (they are fetched).

    Raises:
        ConfigError: an encoder that there is not.
        MissingExtraError: an encoder of timm, and timm is not installed.

    Example:
        >>> config = FusionConfig(encoders={"early": "small-8"}, bins=20, hidden=16, size=24)
        >>> images = {s: torch.zeros(2, one.bands, 24, 24) for s, one in config.inputs.items()}
        >>> FusionModel(config).eval()(images, torch.zeros(2, 2)).shape
        torch.Size([2, 20])
    """

    def __init__(self, config: FusionConfig, *, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        options: dict[str, Any] = {"pretrained": pretrained, "stem_scale": config.stem_scale}
        bands = {EARLY: config.channels} | {name: one.bands for name, one in config.inputs.items()}
        built = {name: build_encoder(kind, bands[name], **options) for name, kind in config.encoders.items()}
        self.encoder = nn.ModuleDict(built)
        if config.fusion == "hybrid":
            self.attention = Attention(
                {name: map_channels(one) for name, one in built.items()},
                config.attention_width,
                config.attention_layers,
            )
            features = config.attention_width
        else:
            features = sum(int(one.num_features) for one in built.values())
        bits = len(config.surveys) if config.missing == "mask" and config.fusion != "late" else 0
        if config.missing == "mask" and config.fusion == "late":
            self.absent = nn.ParameterDict(
                {name: nn.Parameter(torch.zeros(int(one.num_features))) for name, one in built.items()}
            )
        activation = _ACTIVATIONS.get(config.fusion, nn.GELU)()
        middle = nn.Sequential(activation, nn.Dropout(config.dropout)) if config.dropout else activation
        self.head = nn.Sequential(
            nn.Linear(features + 2 + bits, config.hidden), middle, nn.Linear(config.hidden, config.outputs)
        )

    # The equations (section 2.4)

    def fused(
        self,
        images: Images,
        ebv: Float[Tensor, "batch 2"],
        present: Bool[Tensor, "batch surveys"] | None = None,
    ) -> Float[Tensor, "batch features"]:
        """The features that the head gets: of the encoders, then dust, then the mask bits.

        Args:
            images: survey -> scaled planes; one grid for early fusion.
            ebv: E(B-V) of CSFD and Planck.
            present: which surveys an object has, in the order of the configuration; None = all.

        Raises:
            ShapeError: a survey is missing, or another number of bands, objects or (early) pixels.
        """
        self._check(images, ebv, present)
        config = self.config
        if present is None:
            present = torch.ones(ebv.shape[0], len(config.surveys), dtype=torch.bool, device=ebv.device)
        planes = {
            name: torch.where(present[:, i, None, None, None], images[name], 0.0)
            for i, name in enumerate(config.surveys)
        }
        if config.stacked:
            vector = self.encoder[EARLY](torch.cat(list(planes.values()), dim=1))
        elif config.fusion == "hybrid":
            maps = {name: one.forward_features(planes[name]) for name, one in self._encoders()}
            vector = self.attention(maps, present)
        else:
            vector = F.relu(self._joined(planes, present))
        parts = [vector, (config.ebv_scale * ebv).to(vector.dtype)]
        if config.missing == "mask" and config.fusion != "late":
            parts.append(present.to(vector.dtype))
        return torch.cat(parts, dim=1)

    def _encoders(self) -> list[tuple[str, Any]]:
        return list(self.encoder.items())

    def _joined(self, planes: Mapping[str, Tensor], present: Tensor) -> Tensor:
        config, parts = self.config, list[Tensor]()
        for name in config.feature_order:
            part = self.encoder[name](planes[name])
            if config.missing == "mask":
                has = present[:, config.surveys.index(name), None]
                part = torch.where(has, part, self.absent[name].to(part.dtype))
            parts.append(part)
        return torch.cat(parts, dim=1)

    def penultimate(
        self,
        images: Images,
        ebv: Float[Tensor, "batch 2"],
        present: Bool[Tensor, "batch surveys"] | None = None,
    ) -> Float[Tensor, "batch hidden"]:
        """The hidden layer of the head: what distances to the training set are taken in."""
        return self.head[1](self.head[0](self.fused(images, ebv, present)))

    def classify(self, hidden: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch bins"]:
        """The logits of a hidden layer of :meth:`penultimate`; of other heads the log of their masses."""
        return bin_logits(self.head[2](hidden), self.config)

    def forward(
        self,
        images: Images,
        ebv: Float[Tensor, "batch 2"],
        present: Bool[Tensor, "batch surveys"] | None = None,
        *,
        raw: bool = False,
    ) -> Float[Tensor, "batch outputs"]:
        """The logits; arguments as in :meth:`fused`; ``raw`` gives the last layer's outputs, for its loss."""
        hidden = self.penultimate(images, ebv, present)
        return self.head[2](hidden) if raw else self.classify(hidden)

    # What people ask of it (section 5.1)

    def evaluate(self, samples: Any, *, batch_size: int = 256, tta: str = "none", **options: Any) -> Any:
        """Scores on cutouts with known redshifts.

        Args:
            samples: as :class:`~mantis_photoz.training.Trainer` takes them.
            batch_size: objects per forward pass.
            tta: ``"none"`` or ``"d4"``.
            **options: of :func:`mantis_photoz.report.evaluate`, whose report comes back.
        """
        from mantis_photoz.predicting import predict
        from mantis_photoz.report import evaluate
        from mantis_photoz.samples import redshifts

        found = predict(self, samples, batch_size=batch_size, tta=tta)
        return evaluate(found.pdf.numpy(), redshifts(samples), **options)

    def band_use(self, samples: Any, **options: Any) -> Any:
        """Exact Shapley values of surveys or bands; see :func:`mantis_photoz.band_use.band_use`."""
        from mantis_photoz.band_use import band_use

        return band_use(self, samples, **options)

    def _check(self, images: Images, ebv: Tensor, present: Tensor | None) -> None:
        batch = check_shape("ebv", ebv, "batch 2")["batch"]
        sides = set[tuple[int, ...]]()
        for name, one in self.config.inputs.items():
            if name not in images:
                raise ShapeError(f"images has {sorted(images)}, wanted {list(self.config.surveys)}")
            shape = f"batch {one.bands} height width"
            check_shape(f"images[{name!r}]", images[name], shape, batch=batch)
            sides.add(tuple(images[name].shape[-2:]))
        if self.config.stacked and len(sides) > 1:
            raise ShapeError(f"images have {sorted(sides)} pixels, early fusion takes one grid for all")
        if present is not None:
            check_shape("present", present, "batch surveys", batch=batch, surveys=len(self.config.surveys))

    # Checkpoints

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> str | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write ``model.safetensors`` and ``config.json``, each whole or not at all, and a card.

        Args:
            save_directory: made if it is not there.
            **options: ``push_to_hub`` and what it takes, as in huggingface_hub.
        """
        return save_model(self, save_directory, options)

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_tensors(save_directory / WEIGHTS, state, {"format": "pt"})
        self.config.save(save_directory / CONFIG)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        map_location: str | torch.device = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Self:
        """A trained network, in eval mode and float32.

        Args:
            pretrained_model_name_or_path: a folder of :meth:`save_pretrained`, or a name on the hub.
            map_location: where the weights go.
            revision: of the hub's repository.
            cache_dir: of the hub's files.
            force_download: as in huggingface_hub.
            local_files_only: as in huggingface_hub.
            token: as in huggingface_hub.

        Raises:
            CheckpointError: no such model, broken files, or settings that do not fit the weights.
        """
        name = os.fspath(pretrained_model_name_or_path)
        options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
        options |= {"force_download": force_download, "local_files_only": local_files_only}
        stored = model_file(name, CONFIG, **options)
        try:
            config = FusionConfig.load(stored)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        with reading(stored, "describes no model", CheckpointError):
            model = cls(config)
        weights = model_file(name, WEIGHTS, **options)
        with reading(weights):
            load_strict(model, {key: _single(value) for key, value in load_tensors(weights).items()})
        return model.to(map_location).eval()


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def shipped() -> dict[str, Path]:
    """The models that come with the package, trained on simulated galaxies only: name -> folder."""
    folder = Path(__file__).parent / "checkpoints"
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))}


def load_model(name: str | os.PathLike[str]) -> FusionModel:
    """A network by folder, by the name of one that ships (:func:`shipped`), or by a name on the hub.

    Raises:
        CheckpointError: no such model.
    """
    text = os.fspath(name)
    own = shipped()
    return FusionModel.from_pretrained(own[text] if text in own and not Path(text).is_dir() else text)
