"""The benchmark: the solvers against the literal grid, and whole generation against its parts.

Random logits and random weights: time does not depend on what a model knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_core.bench import Bench, Row, paired
from fusion_core.device import resolve_device, synchronize, threads
from fusion_core.errors import ConfigError, FusionError
from fusion_core.testing import tiny
from logit_fusion.fuse import fuse_logits
from logit_fusion.plain import members_alone, plain_generate, plain_grid

SIZES = ((32_000, 1), (32_000, 8), (128_256, 1), (128_256, 8))
GRID_TARGET, EXACT_TARGET, WHOLE_TARGET = ">= 3", ">= 0.714", ">= 0.926"
GPU_TARGET = ">= 0.971"
LITERAL, TILED = "literal grid", "our grid"


def draw(vocab: int, batch: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of large, base and expert, float32 (batch, vocab)."""
    made = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(batch, vocab, generator=made)
    large = 3.0 * normal()
    base = 0.5 * large + normal()
    large, base, expert = (x.to(device) for x in (large, base, base + normal()))
    return large, base, expert


def bandwidth(device: torch.device, size: int = 1 << 26) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size / best


def solver_rows(sizes: Sequence[tuple[int, int]] = SIZES, repeats: int = 5, device: str = "cpu") -> list[Row]:
    """Time one fused step of one expert, without any model, with every solver.

    On a CPU on one thread, as the targets were set; the grid once more on as many as torch has.

    Args:
        sizes: (vocabulary, batch).
        repeats: pairs per row.
        device: where the logits are.

    Raises:
        FusionError: our grid does not find what the literal one finds.
    """
    where = resolve_device(device)
    all_threads = torch.get_num_threads()
    rows: list[Row] = []
    with threads(1):
        rows += _solver_rows(sizes, repeats, where)
    if where.type == "cpu" and all_threads > 1:
        for vocab, batch in sizes:
            large, base, expert = draw(vocab, batch, where)
            rows.append(
                paired(
                    f"grid ({vocab}, {batch}), {all_threads} threads",
                    lambda: fuse_logits(large, base, [expert], strategy="single", solver="grid"),  # noqa: B023
                    lambda: plain_grid(large, base, expert),  # noqa: B023
                    against=LITERAL, repeats=repeats, device=device, dtype="float32",
                )
            )  # fmt: skip
    return rows


def _solver_rows(sizes: Sequence[tuple[int, int]], repeats: int, where: torch.device) -> list[Row]:
    speed = bandwidth(where)
    rows: list[Row] = []
    for vocab, batch in sizes:
        large, base, expert = draw(vocab, batch, where)
        step = lambda solver: fuse_logits(large, base, [expert], strategy="single", solver=solver)  # noqa: B023
        literal = lambda: plain_grid(large, base, expert)  # noqa: B023
        if not torch.allclose(step("grid").alpha.squeeze(-1), literal()[0], atol=1e-5):
            raise FusionError("our grid and the literal grid chose different nodes")
        tag = f"({vocab}, {batch})"
        shared: dict[str, Any] = {"repeats": repeats, "device": str(where), "dtype": "float32"}
        grid, exact = (lambda: step("grid")), (lambda: step("exact"))  # noqa: B023
        rows.append(
            paired(
                f"grid {tag}", grid, literal, against=LITERAL,
                target=GRID_TARGET if batch >= 8 else None, **shared,
            )
        )  # fmt: skip
        rows.append(
            paired(
                f"exact {tag}", exact, grid, against=TILED, target=EXACT_TARGET,
                note="<= 1.4x the tiled grid", **shared,
            )
        )  # fmt: skip
        rows.append(paired(f"exact {tag}, literal", exact, literal, against=LITERAL, **shared))
        rows.append(paired(f"newton {tag}", lambda: step("newton"), literal, against=LITERAL, **shared))  # noqa: B023
        static = lambda: (large + (expert - base)).log_softmax(-1)  # noqa: B023
        floor = 8.0 * batch * vocab / speed
        note = (
            f"reading shift and log-probabilities once takes {floor * 1e6:.0f} µs at {speed / 1e9:.1f} GB/s"
        )
        rows.append(
            paired(f"exact {tag}, static", exact, static, against="static softmax", note=note, **shared)
        )
    return rows


def random_llama(hidden: int, layers: int, vocab: int, seed: int, device: torch.device) -> Any:
    """A Llama of random weights."""
    marks: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
    heads, intermediate = max(hidden // 64, 1), hidden * 11 // 4
    return tiny.llama(vocab, hidden, layers, heads, intermediate, seed=seed, **marks).to(device)


def generation_rows(
    hidden: int = 1024,
    layers: int = 8,
    vocab: int = 32_000,
    batch: int = 4,
    *,
    tokens: int = 8,
    repeats: int = 5,
    device: str = "cpu",
) -> list[Row]:
    """Time whole greedy generation with three members of one shape.

    Args:
        hidden: width of the members.
        layers: of each.
        vocab: tokens.
        batch: prompts of 16 tokens.
        tokens: that are generated.
        repeats: pairs per row.
        device: where the members are.
    """
    from logit_fusion.model import FusedModel

    where = resolve_device(device)
    models = tuple(random_llama(hidden, layers, vocab, seed, where) for seed in range(3))
    large, base, expert = models
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocab, (batch, 16), generator=made).to(where)
    mask = torch.ones_like(ids)
    fused: dict[str, Any] = {
        solver: FusedModel(large, base, {"expert": expert}, strategy="single", solver=solver)
        for solver in ("exact", "grid", "newton")
    }

    def ours(solver: str) -> Callable[[], object]:
        return lambda: fused[solver].generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False
        )

    alone = lambda: members_alone(models, ids, tokens)
    plain = lambda: plain_generate(large, base, expert, ids, tokens)
    if not torch.equal(ours("grid")(), plain()):  # pyright: ignore[reportArgumentType]
        raise FusionError("the fused model and the plain loop said different tokens")
    tag = f"{hidden} x {layers}, V={vocab}, batch {batch}"
    shared: dict[str, Any] = {"repeats": repeats, "device": device, "dtype": "float32"}
    target = WHOLE_TARGET if where.type == "cpu" else GPU_TARGET
    note = "whole overhead <= 8 %" if where.type == "cpu" else "whole overhead <= 3 %"
    return [
        paired(
            f"generate exact, {tag}", ours("exact"), alone, against="members alone", target=target, note=note,
            **shared,
        ),
        paired(f"generate newton, {tag}", ours("newton"), alone, against="members alone", **shared),
        paired(
            f"generate exact against plain, {tag}", ours("exact"), plain,
            against="proxy-tuning loop, literal grid", **shared,
        ),
    ]  # fmt: skip


def run(
    *,
    repeats: int = 5,
    device: str = "cpu",
    sizes: Sequence[tuple[int, int]] = SIZES,
    members: bool = True,
    hidden: int = 1024,
    layers: int = 8,
) -> Bench:
    """Measure the solvers and, on request, generation.

    Args:
        repeats: pairs per row, at least 1.
        device: where to measure.
        sizes: (vocabulary, batch) of the solvers' rows.
        members: measure generation too; needs about 3 GB.
        hidden: width of the members.
        layers: of each member.

    Raises:
        ConfigError: fewer than one repeat.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}, wanted at least 1")
    bench = Bench("logit-fusion")
    for row in solver_rows(sizes, repeats, device):
        bench.add(row)
    for row in generation_rows(hidden, layers, repeats=repeats, device=device) if members else ():
        bench.add(row)
    return bench
