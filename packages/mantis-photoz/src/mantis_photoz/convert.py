"""The authors' checkpoints under our names (section 5.4): files are read without running any of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fusion_core.atomic import PathLike
from fusion_core.checkpoint import KeyMap, digest_file, load_foreign, load_strict
from fusion_core.errors import CheckpointError, reading
from mantis_photoz.config import EARLY, FusionConfig
from mantis_photoz.encoders import REPORT
from mantis_photoz.fusion import FusionModel

OFFICIAL = KeyMap(
    [
        (r"^Base\.", "encoder.early."),
        (r"^model_(galex|ps|unwise)\.", r"encoder.\1."),
        (r"^encoder\.ps\.", "encoder.ps1."),
        (r"^(conv1|bn1|layer[1-4])\.", r"encoder.early.\1."),
        (r"^(fc0|fc)\.(?=weight$|bias$)", "head.0."),
        (r"^fc1\.", "head.2."),
        (r"^fc2\.", "head.2."),
    ]
)
"""From the authors' names to ours: early, late, and the report's ResNet-50."""

# (blocks of the four stages, channels of the first) -> timm's name
CONVNEXTS = {
    ((3, 3, 27, 3), 192): "convnext_large",
    ((3, 3, 27, 3), 128): "convnext_base",
    ((3, 3, 27, 3), 96): "convnext_small",
    ((3, 3, 9, 3), 96): "convnext_tiny",
    ((2, 2, 8, 2), 80): "convnext_nano",
    ((2, 2, 6, 2), 64): "convnext_pico",
    ((2, 2, 6, 2), 48): "convnext_femto",
    ((2, 2, 6, 2), 40): "convnext_atto",
}


def load_official(path: PathLike, *, z_max: float | None = None, sha256: str | None = None) -> FusionModel:
    """Load a checkpoint of the authors' code: ``best_early.pt``, a late one, or the report's ResNet-50.

    A state dict and a dictionary with ``state_dict`` (and the optimizer's state) are taken; prefixes
    ``module.`` and ``_orig_mod.`` are taken off; the architecture follows from names and shapes.

    Args:
        path: the file.
        z_max: upper end of the redshift grid; None = 1.6, and 1.0 for the report.
        sha256: that the file must have, or its first digits.

    Returns:
        The network in evaluation mode, set to the authors' views ("stretch", no signed pixels).

    Raises:
        CheckpointError: missing, damaged, a Git LFS pointer, another hash, more than tensors, or no network
            of
            these; the message names the tensors.
    """
    file = Path(path)
    state = load_foreign(file)
    check_hash(file, sha256)
    with reading(file, error=CheckpointError):
        return from_official(state, z_max=z_max)


def check_hash(path: PathLike, sha256: str | None) -> None:
    """Compare a file with a hash, or its first digits; None takes any file.

    Raises:
        CheckpointError: another hash.
    """
    if sha256 is not None and not (found := digest_file(path)).startswith(sha256.lower()):
        raise CheckpointError(
            f"{path} has sha256 {found[:16]}..., wanted {sha256[:16]}...; the download is damaged or of "
            "another version"
        )


def from_official(state: Mapping[str, Tensor], *, z_max: float | None = None) -> FusionModel:
    """As :func:`load_official`, from tensors.

    Raises:
        CheckpointError: no network of the authors, or a tensor is missing, extra or of another shape.
    """
    mapped = OFFICIAL.apply(state)
    model = FusionModel(infer_config(mapped, z_max=z_max))
    dtype = next((value.dtype for value in mapped.values() if value.is_floating_point()), None)
    load_strict(model if dtype is None else model.to(dtype), mapped)
    return model.eval()


def infer_config(state: Mapping[str, Tensor], *, z_max: float | None = None) -> FusionConfig:
    """The architecture of a state dict under our names.

    Raises:
        CheckpointError: neither ConvNeXt encoders with a head of two layers nor the report's ResNet-50.
    """
    first, last = state.get("head.0.weight"), state.get("head.2.weight")
    names = list(dict.fromkeys(key.split(".")[1] for key in state if key.startswith("encoder.")))
    if first is None or last is None or not names or first.ndim != 2 or last.ndim != 2:
        found = sorted({key.partition(".")[0] for key in state})[:8]
        raise CheckpointError(
            f"no network of the authors: parts {found}; wanted Base or model_galex, model_ps, "
            f"model_unwise with "
            "fc0 and fc1, or conv1 ... layer4 with fc and fc2"
        )
    changes: dict[str, Any] = {"bins": int(last.shape[0]), "hidden": int(first.shape[0])}
    if "encoder.early.conv1.weight" in state:
        made = FusionConfig.official("report", **changes)
    elif names == [EARLY]:
        made = FusionConfig.official("early", encoders={EARLY: _convnext(state, EARLY)}, **changes)
    else:
        fit = FusionConfig.official("late")
        wanted = set(names)
        if not wanted <= set(fit.inputs):
            raise CheckpointError(f"encoders are {sorted(wanted)}, wanted some of {sorted(fit.inputs)}")
        inputs = {name: one for name, one in fit.inputs.items() if name in wanted}
        encoders = {name: _convnext(state, name) for name in inputs}
        made = FusionConfig.official("late", inputs=inputs, encoders=encoders, **changes)
    if made.stacked:
        made = _ablated(made, state)
    return made if z_max is None else made.replace(z_max=z_max)


def _ablated(config: FusionConfig, state: Mapping[str, Tensor]) -> FusionConfig:
    """The surveys that a retrained early network kept, told by its stem's channels."""
    key = "encoder.early.conv1.weight" if config.encoders[EARLY] == REPORT else "encoder.early.stem.0.weight"
    channels = int(state[key].shape[1]) if key in state and state[key].ndim == 4 else 0
    kept = {9: ("galex", "ps1", "unwise"), 5: ("ps1",)}.get(channels)
    if kept is None:
        raise CheckpointError(
            f"{key} takes {channels} channels, wanted 9 (all surveys) or 5 (Pan-STARRS1); 7 could be either "
            "GALEX or unWISE beside it: build the FusionConfig and use fusion_core.checkpoint.load_strict"
        )
    return config.replace(inputs={name: config.inputs[name].to_dict() for name in kept})


def _convnext(state: Mapping[str, Tensor], encoder: str) -> str:
    prefix = f"encoder.{encoder}.stages."
    parts = {tuple(key.removeprefix(prefix).split(".")[:3]) for key in state if key.startswith(prefix)}
    blocks = tuple(len({p[2] for p in parts if p[0] == str(i) and p[1] == "blocks"}) for i in range(4))
    stem = state.get(f"encoder.{encoder}.stem.0.weight")
    width = 0 if stem is None else int(stem.shape[0])
    try:
        return CONVNEXTS[blocks, width]  # pyright: ignore[reportArgumentType]
    except KeyError:
        raise CheckpointError(
            f"encoder {encoder!r} has {blocks} blocks and a stem of {width} channels, which is no "
            f"ConvNeXt that the "
            f"authors' code takes; known are {sorted(CONVNEXTS.values())}"
        ) from None


def to_official(state: Mapping[str, Tensor], config: FusionConfig) -> dict[str, Tensor]:
    """Our names back to the authors', for their code.

    Raises:
        CheckpointError: a network that the authors' code does not have.
    """
    if config.fusion == "hybrid" or config.missing != "zeros":
        raise CheckpointError(
            f"the authors' code has no fusion {config.fusion!r} with missing {config.missing!r}"
        )
    report = config.fusion == "report"
    rules = [
        (r"^encoder\.early\.", "" if report else "Base."),
        (r"^encoder\.ps1\.", "model_ps."),
        (r"^encoder\.(galex|unwise)\.", r"model_\1."),
        (r"^head\.0\.", "fc." if report else "fc0."),
        (r"^head\.2\.", "fc2." if report else "fc1."),
    ]
    return KeyMap(rules, strip=()).apply(state)
