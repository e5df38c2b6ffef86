"""Nine tiny networks of different families that tell the ten scenes apart, shipped as checkpoints.

They take images ``(batch, 3, 32, 32)`` in [0, 1]; normalization is inside. Four serve as surrogates, the
others play the models under audit, one of them adversarially trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaea.scenes import FOLDER
from fusion_core.checkpoint import load_strict, load_tensors
from fusion_core.errors import CheckpointError, InputError

CLASSES = 10
CHECKPOINT = FOLDER / "zoo.safetensors"


class _Scaled(nn.Module, ABC):
    """Base of the zoo: (x - 0.5) / 0.25 before everything else."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, 10)`` of images ``(batch, 3, 32, 32)`` in [0, 1]."""
        return self.logits((images - 0.5) / 0.25)

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Logits of normalized images."""


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=False),
    )


class Residual(_Scaled):
    """A residual CNN: a stem of stride 2, then stages of residual blocks, each stage halving the size."""

    def __init__(self, widths: tuple[int, ...], blocks: int = 1) -> None:
        super().__init__()
        self.stem = _convolution(3, widths[0], 3, 2)
        stages: list[nn.Module] = []
        inputs = widths[0]
        for width in widths:
            if width != inputs:
                stages.append(_convolution(inputs, width, 3, 2))
            stages += [_Block(width) for _ in range(blocks)]
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        """Logits of normalized images."""
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _convolution(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class Inception(_Scaled):
    """Two layers of parallel 1x1, 3x3 and 5x5 branches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = _convolution(3, width, 3, 2)
        self.first = nn.ModuleList([_convolution(width, width // 2, kernel) for kernel in (1, 3, 5)])
        middle = 3 * (width // 2)
        self.second = nn.ModuleList([_convolution(middle, width // 2, kernel) for kernel in (1, 3, 5)])
        self.head = nn.Linear(middle, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        """Logits of normalized images."""
        x = self.stem(x)
        x = torch.cat([branch(x) for branch in self.first], 1)
        x = F.max_pool2d(x, 2)
        x = torch.cat([branch(x) for branch in self.second], 1)
        return self.head(x.mean((2, 3)))


class Plain(_Scaled):
    """A plain CNN in the manner of VGG: convolutions and max pooling, no skips."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 3 * width)
        inputs, layers = 3, list[nn.Module]()
        for outputs in widths:
            layers += [_convolution(inputs, outputs), _convolution(outputs, outputs), nn.MaxPool2d(2)]
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        """Logits of normalized images."""
        return self.head(self.layers(x).mean((2, 3)))


class Transformer(_Scaled):
    """A small vision transformer, pre-norm, with a class token or mean pooling."""

    def __init__(self, patch: int, width: int, depth: int = 2, heads: int = 4, *, mean: bool = False) -> None:
        super().__init__()
        tokens = (32 // patch) ** 2
        self.heads, self.mean = heads, mean
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.start = nn.Parameter(torch.zeros(1, 0 if mean else 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(1, tokens + (0 if mean else 1), width))
        self.blocks = nn.ModuleList([_Attention(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        """Logits of normalized images."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.start.expand(len(x), -1, -1), x], 1) + self.place
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.mean else x[:, 0])


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.after = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        shape = (batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = self.qkv(self.before(x)).reshape(shape).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        x = x + self.project(mixed)
        return x + self.mlp(self.after(x))


class Mixer(_Scaled):
    """An MLP-mixer: layers across patches and across channels in turn, no attention and no convolution."""

    def __init__(self, patch: int, width: int, depth: int = 2) -> None:
        super().__init__()
        tokens = (32 // patch) ** 2
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList([_Mix(tokens, width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        """Logits of normalized images."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class _Mix(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.first(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.second(x))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "res16": lambda: Residual((16, 32)),
    "inc16": lambda: Inception(16),
    "vit8": lambda: Transformer(8, 48),
    "vit8m": lambda: Transformer(8, 64, mean=True),
    "vgg12": lambda: Plain(12),
    "vit16": lambda: Transformer(16, 64),
    "mixer8": lambda: Mixer(8, 48),
    "res12x2": lambda: Residual((12, 24), blocks=2),
    "res16_AT": lambda: Residual((16, 32)),
}
"""Name -> network without weights."""

SURROGATES = ("res16", "inc16", "vit8", "vit8m")
BLACK_BOXES = ("vgg12", "vit16", "mixer8", "res12x2", "res16_AT")


def make_network(name: str) -> nn.Module:
    """A network of the zoo with random weights.

    Args:
        name: a key of :data:`ARCHITECTURES`.

    Raises:
        InputError: no such network; the message lists those there are.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"network is {name!r}, wanted one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]()


def load_network(name: str) -> nn.Module:
    """A shipped network with its weights, in evaluation mode.

    Args:
        name: a key of :data:`ARCHITECTURES`.

    Returns:
        A module that takes images ``(batch, 3, 32, 32)`` in [0, 1] and returns logits ``(batch, 10)``.

    Raises:
        InputError: no such network.
        CheckpointError: the checkpoint is missing or damaged.

    Example:
        >>> from adaea.scenes import load_scenes
        >>> images, labels = load_scenes(50)
        >>> bool((load_network("res16")(images).argmax(1) == labels).float().mean() > 0.5)
        True
    """
    with torch.random.fork_rng(devices=[]):  # random initial weights would move the caller's generator
        network = make_network(name)
    state = load_tensors(CHECKPOINT)
    own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    if not own:
        raise CheckpointError(f"{CHECKPOINT} holds no network {name!r}")
    load_strict(network, own)
    return network.eval()
