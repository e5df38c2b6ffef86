"""The benchmark: AdaEA against the published loop written down plainly, paired, in one process.

Four randomly initialised surrogates (a residual network, a mobile network, two vision transformers) on eight
images of 64 x 64 pixels. The targets of speed and memory are those of the package's specification.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaea.attack import AdaEA
from adaea.plain import plain_attack
from fusion_core.bench import Bench, memory_row, paired, peak_memory
from fusion_core.device import resolve_device
from fusion_core.errors import ConfigError, require_extra

VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {"agm": "exact"},
    "linear": {"agm": "linear"},
    "linear, loss fusion": {"agm": "linear", "fusion": "loss"},
}
TARGETS = {"exact": ">= 1.25", "linear": ">= 2.5", "linear, loss fusion": ">= 3.2"}
MEMORY_TARGET = ">= 3.33"
AGAINST = "published loop, plain"


@dataclass(frozen=True, eq=False)
class Workload:
    """Surrogates, images and labels of the benchmark."""

    surrogates: dict[str, nn.Module]
    images: Tensor
    labels: Tensor
    steps: int

    def ours(self, name: str) -> Callable[[], Tensor]:
        """One attack by this package in the named variant."""
        attack = AdaEA(self.surrogates, drf="official", eta=0.0, steps=self.steps, **VARIANTS[name])
        return lambda: attack(self.images, self.labels)

    def plain(self) -> Tensor:
        """One attack by the plain loop."""
        made = torch.Generator().manual_seed(0)
        models = list(self.surrogates.values())
        return plain_attack(models, self.images, self.labels, eta=0.0, steps=self.steps, generator=made)


def workload(
    batch: int = 8, size: int = 64, *, steps: int = 3, device: str = "cpu", seed: int = 0
) -> Workload:
    """Build the surrogates and draw the images.

    Args:
        batch: images.
        size: of a side in pixels, a multiple of 8.
        steps: of each attack; the default is the attack's own.
        device: of all of it.
        seed: of weights and images.

    Raises:
        MissingExtraError: torchvision is not installed.
    """
    require_extra("torchvision", "vision", "adaea")
    from torchvision.models import mobilenet_v2, resnet18
    from torchvision.models.vision_transformer import VisionTransformer

    place = resolve_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = lambda depth: VisionTransformer(size, 8, depth, 3, 192, 768, num_classes=1000)
        nets: dict[str, nn.Module] = {
            "resnet18": resnet18(weights=None),
            "mobilenet_v2": mobilenet_v2(weights=None),
            "vit4": transformer(4),
            "vit6": transformer(6),
        }
        for net in nets.values():
            _wake(net)
        images, labels = torch.rand(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    nets = {name: net.eval().to(place) for name, net in nets.items()}
    return Workload(nets, images.to(place), labels.to(place), steps)


def _wake(net: nn.Module) -> None:
    """A fresh transformer's head is 0 and passes no gradient; give it numbers."""
    for module in net.modules():
        if isinstance(module, nn.Linear) and not bool(module.weight.any()):
            nn.init.normal_(module.weight, std=0.02)


class _Task:
    """One attack in a fresh process; unpickling builds the workload, so that only the attack is measured."""

    def __init__(self, name: str, batch: int, size: int) -> None:
        self.arguments = (name, batch, size)

    def __reduce__(self) -> tuple[Any, ...]:
        return _prepare, self.arguments


def _prepare(name: str, batch: int, size: int) -> Callable[[], Tensor]:
    torch.set_num_threads(1)
    made = workload(batch, size)
    with torch.no_grad():  # libraries set themselves up on the first call
        for net in made.surrogates.values():
            net(made.images[:1])
    return made.plain if name == "plain" else made.ours(name)


def run(
    *,
    repeats: int = 5,
    batch_size: int = 8,
    size: int = 64,
    steps: int = 10,
    device: str = "cpu",
    memory: bool = True,
) -> Bench:
    """Measure speed and, on request, memory.

    Args:
        repeats: pairs per row.
        batch_size: images.
        size: of a side in pixels.
        steps: of each attack.
        device: ``"cpu"`` or ``"cuda"``.
        memory: measure peaks too; on the CPU each in a fresh process, on one thread.

    Returns:
        The rows; their ratio is the plain loop's cost over ours.

    Raises:
        ConfigError: a size that is no multiple of 8.
        MissingExtraError: torchvision is not installed.
    """
    if size < 32 or size % 8:
        raise ConfigError(f"size is {size}, wanted a multiple of 8 of at least 32")
    place, bench = str(resolve_device(device)), Bench("adaea")
    cuda = place.startswith("cuda")
    made = workload(batch_size, size, steps=steps, device=place)
    for name in VARIANTS:
        row = paired(
            name,
            made.ours(name),
            made.plain,
            repeats=repeats,
            target=(">= 2" if name == "exact" else None) if cuda else TARGETS[name],
            device=place,
            dtype="float32",
            against=AGAINST,
            note=f"K=4, B={batch_size}, {size} px, {steps} steps",
        )
        bench.add(row)
    if not memory:
        return bench
    if cuda:
        peaks = {
            "plain": peak_memory(made.plain, place),
            **{n: peak_memory(made.ours(n), place) for n in VARIANTS},
        }
    else:
        peaks = {name: peak_memory(_Task(name, batch_size, size)) for name in ("plain", *VARIANTS)}  # type: ignore[arg-type]
    for name in VARIANTS:
        bench.add(
            memory_row(
                f"{name}, extra peak memory",
                peaks[name],
                peaks["plain"],
                target=MEMORY_TARGET if name == "exact" else None,
                device=place,
                against=AGAINST,
                note="<= 0.3x of the plain loop" if name == "exact" else "",
            )
        )
    return bench
