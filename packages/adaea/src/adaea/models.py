"""Models by name (``timm:``, ``torchvision:``, ``hf:``, ``file:``, ``py:``, ``zoo:``) for images in [0, 1].

Nothing is downloaded unless the name asks a library for weights that are not on this machine.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

import torch
from torch import nn

from adaea.wrappers import IMAGENET_MEAN, IMAGENET_STD, Normalized
from fusion_core.checkpoint import KeyMap, check_config, load_foreign, load_strict
from fusion_core.errors import CheckpointError, ConfigError, InputError, reading, require_extra
from fusion_core.modules import load_object

OFFICIAL_NAMES = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "wrn50_2": "wide_resnet50_2",
    "wrn101_2": "wide_resnet101_2",
    "inc_v3": "inception_v3",
    "inc_v4": "inception_v4",
    "bit50_1": "resnetv2_50x1_bit",
    "bit101_1": "resnetv2_101x1_bit",
    "vit_b": "vit_base_patch16_224",
    "vit_s": "vit_small_patch16_224",
    "vit_t": "vit_tiny_patch16_224",
    "deit_b": "deit_base_patch16_224",
    "deit_s": "deit_small_patch16_224",
    "deit_t": "deit_tiny_patch16_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_t": "swin_tiny_patch4_window7_224",
}
"""The authors' names of their 18 models -> timm's."""

_SCHEMES = ("timm", "torchvision", "hf", "file", "py", "zoo")


@dataclass(frozen=True)
class _Found:
    model: nn.Module
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    size: tuple[int, int] | None = None


def load_model(
    name: str,
    *,
    pretrained: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """A model by name, in evaluation mode, that takes images in [0, 1].

    Mean, std and input size come from the model's own configuration; what is passed here goes first. The same
    options may follow the name as a query: ``"timm:resnet18?pretrained=false&num_classes=10&size=64"``.

    Args:
        name: ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME`` (a hub name or a local folder), ``file:PATH``
            (torch.export or TorchScript; open only files you trust), ``py:module:factory`` (called without
            arguments), or ``zoo:NAME`` (the networks of the demo).
        pretrained: with weights; False makes random ones (timm, torchvision).
        mean: per channel; for models whose normalization is outside (``file:``, ``py:``: none by default).
        std: per channel, > 0.
        size: of the input, pixels; other images are resized.
        num_classes: of the head (timm, torchvision).
        device: where the model goes.

    Returns:
        A module; logits ``(batch, classes)`` or what the model returns around them.

    Raises:
        InputError: a name outside the grammar, or one that the library does not know.
        MissingExtraError: the library is not installed; the message has the install line.
        CheckpointError: a file that cannot be read.

    Example:
        >>> load_model("zoo:vit16")(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    plain, options = _split(name)
    scheme, _, rest = plain.partition(":")
    if scheme not in _SCHEMES or not rest:
        raise InputError(
            f"model is {name!r}, wanted timm:NAME, torchvision:NAME, hf:NAME, file:PATH, "
            "py:module:factory or zoo:NAME"
        )
    asked: dict[str, Any] = {"pretrained": pretrained, "num_classes": num_classes} | {
        key: options.pop(key) for key in ("pretrained", "num_classes") if key in options
    }
    if scheme not in ("timm", "torchvision") and asked != {"pretrained": True, "num_classes": None}:
        raise ConfigError(f"{scheme}: models come as they are; pretrained and num_classes are not taken")
    loader = _LOADERS[scheme]
    with torch.random.fork_rng(devices=[]):  # initial weights must not move the caller's random numbers
        found = loader(rest, asked["pretrained"], asked["num_classes"])
    mean, std, size = mean or options.get("mean"), std or options.get("std"), size or options.get("size")
    square = (size, size) if isinstance(size, int) else size
    shift, scale, side = mean or found.mean, std or found.std, square or found.size
    model = found.model
    for part in model.modules():
        part.training = False  # exported graphs refuse .eval()
    if (shift, scale, side) != (None, None, None):
        model = Normalized(model, shift, scale, side)
        model.training = False
    return model.to(device)


def _split(name: str) -> tuple[str, dict[str, Any]]:
    plain, _, query = name.partition("?")
    options: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True, separator="&"):
        try:
            if key in ("mean", "std"):
                options[key] = tuple(float(part) for part in value.split(","))
            elif key == "pretrained":
                options[key] = {"true": True, "1": True, "false": False, "0": False}[value.lower()]
            elif key in ("size", "num_classes"):
                options[key] = int(value)
            else:
                raise ConfigError(
                    f"model {plain!r} has the option {key!r}, wanted mean, std, size, pretrained, num_classes"
                )
        except (ValueError, KeyError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"model {plain!r}: {key} is {value!r}, no such value is taken") from error
    return plain, options


def _timm(name: str, pretrained: bool, num_classes: int | None) -> _Found:
    timm = require_extra("timm", "zoo", "adaea")
    if not timm.is_model(name.partition(".")[0]) and not name.startswith(
        ("hf_hub:", "hf-hub:", "local-dir:")
    ):
        near = timm.list_models(f"*{name[:6]}*")[:5]
        raise InputError(f"timm has no model {name!r}; near it: {', '.join(near) or 'none'}")
    options = {} if num_classes is None else {"num_classes": num_classes}
    model = timm.create_model(name, pretrained=pretrained, **options)
    config = timm.data.resolve_model_data_config(model)
    height, width = config["input_size"][-2:]
    return _Found(model, config["mean"], config["std"], (int(height), int(width)))


def _torchvision(name: str, pretrained: bool, num_classes: int | None) -> _Found:
    models = require_extra("torchvision.models", "vision", "adaea")
    if name not in models.list_models():
        near = [known for known in models.list_models() if known.startswith(name[:4])][:5]
        raise InputError(f"torchvision has no model {name!r}; near it: {', '.join(near) or 'none'}")
    options = {} if num_classes is None else {"num_classes": num_classes}
    model = models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    if not pretrained:
        return _Found(model, IMAGENET_MEAN, IMAGENET_STD)
    recipe = models.get_model_weights(name)["DEFAULT"].transforms()
    side = int(recipe.crop_size[0])
    return _Found(model, recipe.mean, recipe.std, (side, side))


def _hf(name: str, _pretrained: bool, _num_classes: int | None) -> _Found:
    transformers = require_extra("transformers", "zoo", "adaea")
    base = require_extra("transformers.image_processing_base", "zoo", "adaea")
    with reading(f"hf:{name}", "cannot be loaded"):
        check_config(name)
        model = transformers.AutoModelForImageClassification.from_pretrained(name)
        recipe, _ = base.ImageProcessingMixin.get_image_processor_dict(name)
    size = recipe.get("crop_size") if recipe.get("do_center_crop") else recipe.get("size")
    side = _side(size)
    if recipe.get("do_normalize", True) is False:
        return _Found(model, None, None, side)
    return _Found(model, recipe.get("image_mean"), recipe.get("image_std"), side)


def _side(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if not isinstance(size, dict):
        return None
    words = cast("dict[str, Any]", size)
    edge = words.get("shortest_edge")
    found = (words.get("height", edge), words.get("width", edge))
    return None if None in found else (int(cast("int", found[0])), int(cast("int", found[1])))


def _file(path: str, _pretrained: bool, _num_classes: int | None) -> _Found:
    if not Path(path).is_file():
        raise CheckpointError(f"file:{path} is not there")
    reasons: list[str] = []
    for reader in (_exported, _scripted):
        try:
            return _Found(reader(path))
        except Exception as error:  # noqa: BLE001 - what a foreign file raises is not ours to know
            reasons.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}")
    raise CheckpointError(
        f"file:{path} is neither a torch.export nor a TorchScript file ({'; '.join(reasons)}); a state_dict "
        "needs its class: use py:module:factory"
    )


def _exported(path: str) -> nn.Module:
    log = logging.getLogger("torch.export")
    before = log.level
    log.setLevel(logging.ERROR)  # a file that is none is told of by an error alone
    try:
        return torch.export.load(path).module()
    finally:
        log.setLevel(before)


def _scripted(path: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.load(path, map_location="cpu")


def _py(path: str, _pretrained: bool, _num_classes: int | None) -> _Found:
    made = load_object(path)
    model = made if isinstance(made, nn.Module) else made() if callable(made) else made
    if not isinstance(model, nn.Module):
        raise InputError(f"py:{path} gave a {type(model).__name__}, wanted a torch.nn.Module or its factory")
    return _Found(model)


def _zoo(name: str, _pretrained: bool, _num_classes: int | None) -> _Found:
    from adaea.zoo import load_network

    return _Found(load_network(name))


_LOADERS: dict[str, Callable[[str, bool, int | None], _Found]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _hf,
    "file": _file,
    "py": _py,
    "zoo": _zoo,
}


def load_models(names: str | Sequence[str], *, device: str | torch.device = "cpu") -> dict[str, nn.Module]:
    """Several models by name, as ``{short name: module}``.

    Args:
        names: separated by commas, or a sequence; each ``NAME`` or ``LABEL=NAME``.
        device: where the models go.

    Raises:
        InputError: no names, a bad one, or a label twice.

    Example:
        >>> list(load_models("zoo:res16,other=zoo:res16"))
        ['res16', 'other']
    """
    listed = _commas(names) if isinstance(names, str) else list(names)
    found: dict[str, nn.Module] = {}
    for entry in listed:
        label, mark, rest = entry.partition("=")
        labelled = bool(mark) and label.isidentifier()
        name = rest if labelled else entry
        short = label if labelled else short_name(name)
        if short in found:
            raise InputError(f"two models are called {short!r}; name one with LABEL={name}")
        found[short] = load_model(name, device=device)
    if not found:
        raise InputError("no model is named, wanted names such as timm:resnet18,timm:vit_tiny_patch16_224")
    return found


def _commas(names: str) -> list[str]:
    """Split at commas, except those inside a query's mean and std."""
    parts: list[str] = []
    for part in (part.strip() for part in names.split(",")):
        number = part.partition("&")[0].replace(".", "", 1).isdigit()
        if parts and number and "?" in parts[-1]:
            parts[-1] += f",{part}"
        elif part:
            parts.append(part)
    return parts


def short_name(name: str) -> str:
    """What a model is called in tables: the name without scheme, folders and query.

    Example:
        >>> short_name("timm:resnet18?size=64"), short_name("file:models/mine.pt2")
        ('resnet18', 'mine')
    """
    scheme, _, rest = name.partition("?")[0].partition(":")
    if scheme == "py":
        return rest.rpartition(":")[2]
    return Path(rest).stem if scheme == "file" else rest.rstrip("/").rpartition("/")[2]


def load_official(
    directory: str | Path,
    dataset: str,
    *,
    names: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, nn.Module]:
    """The authors' CIFAR checkpoints, ``directory/NICK/*.pth.tar``, as timm models.

    They take CIFAR images in [0, 1] upsampled to 224 pixels (299 for the Inceptions), without normalization.

    Args:
        directory: holds one folder per model.
        dataset: ``"cifar10"`` or ``"cifar100"``.
        names: the authors' names to load, see :data:`OFFICIAL_NAMES`; None = all that are there.
        device: where the models go.

    Returns:
        The authors' name -> module.

    Raises:
        InputError: another dataset, an unknown name, or nothing there.
        CheckpointError: a missing or damaged file, or one of another model.
        MissingExtraError: timm is not installed.
    """
    classes = {"cifar10": 10, "cifar100": 100}.get(dataset)
    if classes is None:
        raise InputError(f"dataset is {dataset!r}, wanted 'cifar10' or 'cifar100'")
    timm = require_extra("timm", "zoo", "adaea")
    root = Path(directory)
    wanted = list(names) if names is not None else [n for n in OFFICIAL_NAMES if (root / n).is_dir()]
    if unknown := [name for name in wanted if name not in OFFICIAL_NAMES]:
        raise InputError(f"names has {unknown[0]!r}, wanted some of {', '.join(OFFICIAL_NAMES)}")
    if not wanted:
        raise InputError(f"{directory} holds no folder named {', '.join(OFFICIAL_NAMES)}")
    found: dict[str, nn.Module] = {}
    for name in wanted:
        files = sorted(
            path for path in (root / name).glob("*") if path.name.endswith((".pth.tar", ".pth", ".pt"))
        )
        if not files:
            raise CheckpointError(f"{root / name} holds no .pth.tar file")
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(OFFICIAL_NAMES[name], pretrained=False, num_classes=classes)
        load_strict(model, KeyMap().apply(load_foreign(files[0])))
        side = int(model.default_cfg["input_size"][-1])
        found[name] = Normalized(model.eval(), size=(side, side)).eval().to(device)
    return found
