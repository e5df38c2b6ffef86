"""The benchmark: the whole flow, its stages, memory over samples, costs and solvers, paired with plain paths.

W1 is the specification's workload: a ViT of width 384, MLP 1536, 12 heads, 2 blocks; 48 images, class token
and 36 patches, Sinkhorn 0.08, float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusion_core.bench import Bench, memory_row, paired, peak_memory
from fusion_core.device import resolve_device
from fusion_core.seeding import generator
from ot_fusion.config import FusionConfig
from ot_fusion.cost import ground_cost, normalize_cost
from ot_fusion.fusing import fuse
from ot_fusion.reference import exact_distances
from ot_fusion.sinkhorn import sinkhorn
from ot_fusion.solvers import assignment

__all__ = ["run"]


def _vit(seed: int, width: int, inner: int, heads: int, side: int) -> nn.Module:
    from ot_fusion.digits import TinyViT

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TinyViT(width, heads, inner, 2)
        model.patches = nn.Conv2d(3, width, 4, 4)
        model.positions = nn.Parameter(torch.randn(1, side * side + 1, width) * 0.02)
    return _Images(model, side).eval()


class _Images(nn.Module):
    """The demo's transformer on colour images of ``4 * side`` pixels."""

    def __init__(self, model: nn.Module, side: int) -> None:
        super().__init__()
        self.model, self.side = model, side

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``(batch, 3, height, width)``."""
        model: Any = self.model
        h = model.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([model.token.expand(len(h), -1, -1), h], 1) + model.positions
        for block in model.blocks:
            h = block(h)
        return model.head(model.norm(h)[:, 0])


@dataclass(frozen=True, eq=False)
class _W1:
    models: tuple[nn.Module, nn.Module]
    spec: Any
    images: Tensor
    config: FusionConfig

    def run(self, reference: str | None = None, solver: str = "sinkhorn") -> object:
        config = self.config.replace(solver=solver)
        return fuse(self.models, data=self.images, config=config, spec=self.spec, reference=reference)


def _w1(quick: bool) -> _W1:
    from ot_fusion.spec import infer_spec

    width, inner, heads, images = (96, 384, 4, 16) if quick else (384, 1536, 12, 48)
    models = _vit(0, width, inner, heads, 6), _vit(1, width, inner, heads, 6)
    data = torch.randn(images, 3, 24, 24, generator=generator(0, "bench"))
    config = FusionConfig.official(samples=None, last_block_tokens="same")
    return _W1(models, infer_spec(models[0], data[:2]), data, config)


def _features(n: int, samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features related by a noisy random mixing: hard to match."""
    draws = generator(0, "features", n)
    z = torch.randn(n, samples, generator=draws)
    mixing = torch.randn(n, n, generator=draws) / n**0.5
    noisy = mixing @ z + 0.5 * torch.randn(n, samples, generator=draws)
    return z.to(device), noisy.to(device)


def _plain_sinkhorn(cost: Tensor, reg: float) -> Callable[[], object]:
    import ot

    host = cost.double().cpu().numpy()
    return lambda: ot.sinkhorn([], [], host, reg, numItermax=1000, stopThr=1e-9)


def _stages(bench: Bench, quick: bool, device: torch.device, repeats: int) -> None:
    samples = 256 if quick else 2048
    for n in (96,) if quick else (768, 1536):
        x, y = _features(n, samples, device)
        host = x.cpu(), y.cpu()
        # One batch of activations is one matrix product, as the streamed moments take it; float64
        # accumulation as there.
        bench.add(
            paired(
                f"cost, n = {n}",
                lambda x=x, y=y: ground_cost(x, y),
                lambda host=host: normalize_cost(exact_distances(*host), "max"),
                repeats=repeats,
                device=str(device),
                dtype="float32",
                against="scipy cdist, float64",
            )
        )
        cost = ground_cost(host[0].double(), host[1].double())
        bench.add(
            paired(
                f"exact plan, n = {n}",
                lambda cost=cost: assignment(cost),
                lambda cost=cost: _emd(cost),
                repeats=repeats,
                dtype="float64",
                against="POT emd",
                note="the assignment fast path for equal uniform masses",
            )
        )
        even = cost.new_full((n,), 1 / n).to(device)
        moved = cost.to(device)
        bench.add(
            paired(
                f"Sinkhorn 0.08, n = {n}",
                lambda moved=moved, even=even: sinkhorn(moved, even, even, 0.08),
                _plain_sinkhorn(cost, 0.08),
                repeats=repeats,
                device=str(device),
                dtype="float64",
                against="POT sinkhorn",
            )
        )


def _emd(cost: Tensor) -> object:
    import ot

    return ot.emd([], [], cost.numpy(), numItermax=1_000_000)


def _memory_of(kind: str, samples: int) -> Callable[[], object]:
    """Fuse by activations of so many samples; built in the measured process."""

    def work() -> object:
        from ot_fusion.digits import TinyViT

        torch.manual_seed(0)
        models: list[nn.Module]
        spec = None
        if kind == "perceptron":
            models = [
                nn.Sequential(
                    nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
                )
                for _ in range(2)
            ]
        else:
            from ot_fusion.spec import infer_spec

            models = [TinyViT(), TinyViT()]
            spec = infer_spec(models[0], torch.zeros(2, 64))
        draws = torch.Generator().manual_seed(0)
        stream = (torch.randn(100, 64, generator=draws) for _ in range(samples // 100))
        return fuse(
            models, data=stream, config=FusionConfig(samples=None, last_block_tokens="same"), spec=spec
        )

    return work


def perceptron_200() -> object:
    """Peak memory: perceptrons, 200 samples."""
    return _memory_of("perceptron", 200)()


def perceptron_2000() -> object:
    """Peak memory: perceptrons, 2 000 samples."""
    return _memory_of("perceptron", 2000)()


def perceptron_20000() -> object:
    """Peak memory: perceptrons, 20 000 samples."""
    return _memory_of("perceptron", 20000)()


def transformer_200() -> object:
    """Peak memory: tiny transformers, 200 samples."""
    return _memory_of("transformer", 200)()


def transformer_2000() -> object:
    """Peak memory: tiny transformers, 2 000 samples."""
    return _memory_of("transformer", 2000)()


def transformer_20000() -> object:
    """Peak memory: tiny transformers, 20 000 samples."""
    return _memory_of("transformer", 20000)()


def _memory(bench: Bench, quick: bool) -> None:
    for kind in ("perceptron", "transformer"):
        base = peak_memory(f"ot_fusion.bench:{kind}_200")
        for samples in (2000,) if quick else (2000, 20000):
            peak = peak_memory(f"ot_fusion.bench:{kind}_{samples}")
            bench.add(
                memory_row(
                    f"peak memory, {kind}, {samples} samples",
                    peak,
                    base,
                    target=">= 0.9",
                    against="200 samples",
                    note="ours: so many samples; reference: the same work on 200",
                )
            )


def run(*, repeats: int = 5, device: str = "cpu", quick: bool = False, memory: bool = True) -> Bench:
    """Measure.

    Args:
        repeats: pairs per row.
        device: where costs and Sinkhorn run; exact plans are CPU work.
        quick: smaller problems, without the targets of the full size.
        memory: measure peaks too, each in a process of its own.
    """
    place = resolve_device(device)
    bench = Bench("ot-fusion")
    work = _w1(quick)
    rows: list[tuple[str, str, str | None]] = [
        ("exact", "one input at a time, stored, scipy cdist, POT", None if quick else ">= 5"),
        ("torch", "the same with torch's default cdist", None if quick else ">= 1.4"),
    ]
    for reference, words, target in rows:
        bench.add(
            paired(
                f"W1, whole flow against {reference} cdist",
                work.run,
                lambda reference=reference: work.run(reference),
                repeats=repeats,
                target=target,
                dtype="float32",
                against=words,
            )
        )
    _stages(bench, quick, place, repeats)
    if memory:
        _memory(bench, quick)
    return bench
