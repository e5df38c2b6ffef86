"""The benchmark of merging: the same SCE merge by this package and by mergekit, as processes, by turns.

mergekit pins many packages, so it gets an environment of its own, made with uv. The checkpoints are a
synthetic Llama in bfloat16: a base and two targets that differ from it by noise of one size.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from fusechat.merge.formulas import sce_merge, sce_weights
from fusion_core.bench import Row, check_target, memory_row
from fusion_core.errors import FusionError, InputError
from fusion_core.seeding import generator
from fusion_core.shards import ShardReader, ShardWriter

MERGEKIT = "mergekit==0.1.4"
BESIDE = "transformers<5"  # it does not start with later ones
CPU_TARGET, MEMORY_TARGET = ">= 3", ">= 4"
CHANGE = 2e-3
"""Root mean square of the targets' changes: large enough for mergekit to weigh them (row 6 of the README)."""


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of the synthetic Llama; the default has 341 M parameters."""

    hidden: int = 1024
    layers: int = 24
    intermediate: int = 2816
    heads: int = 16
    key_value_heads: int = 4
    vocabulary: int = 32_000

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' names and shapes."""
        narrow = self.hidden // self.heads * self.key_value_heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            block = f"model.layers.{layer}."
            found |= {
                f"{block}input_layernorm.weight": (self.hidden,),
                f"{block}mlp.down_proj.weight": (self.hidden, self.intermediate),
                f"{block}mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{block}mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{block}post_attention_layernorm.weight": (self.hidden,),
                f"{block}self_attn.k_proj.weight": (narrow, self.hidden),
                f"{block}self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{block}self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{block}self_attn.v_proj.weight": (narrow, self.hidden),
            }
        return {
            **found,
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocabulary, self.hidden),
        }

    def config(self) -> dict[str, object]:
        """The ``config.json`` of transformers."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def write_checkpoints(folder: Path, size: Size) -> list[Path]:
    """Write ``base``, ``target0`` and ``target1`` below a folder; the seed is fixed."""
    places = [folder / name for name in ("base", "target0", "target1")]
    for number, place in enumerate(places):
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(size.config()))
        with ShardWriter(place, 5_000_000_000) as out:
            for key, shape in size.shapes().items():
                tensor = torch.empty(shape).normal_(0, 0.02, generator=generator(0, key))
                tensor += float(key.endswith("norm.weight"))
                if number:
                    tensor += torch.empty(shape).normal_(0, CHANGE, generator=generator(number, key))
                out.add(key, tensor.bfloat16())
    return places


def exact_merge(places: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """SCE with tau = 1 of written checkpoints, in float64, tensor by tensor."""
    base, *targets = (ShardReader(place) for place in places)
    for key in base.keys():  # noqa: SIM118
        pivot = base.get(key).double()
        deltas = torch.stack([target.get(key).double() - pivot for target in targets])
        yield key, sce_merge(pivot, deltas, sce_weights(deltas.flatten(1).square().sum(1)))


def distances(places: list[Path], *merged: Path) -> list[float]:
    """Root mean square distance of merged checkpoints to the exact merge, each over all entries."""
    readers = [ShardReader(place) for place in merged]
    sums, count = [0.0] * len(readers), 0
    for key, wanted in exact_merge(places):
        count += wanted.numel()
        for j, reader in enumerate(readers):
            sums[j] += float((reader.get(key).double() - wanted).square().sum())
    return [(total / count) ** 0.5 for total in sums]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a process took: CPU seconds (user and system), wall seconds, peak resident bytes."""

    cpu: float
    wall: float
    peak: int


_LAUNCH = """
import os, sys, time
started = time.perf_counter()
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet)
_, status, usage = os.wait4(pid, 0)
print(usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) and 1)
"""
"""A small process in between: Linux begins the peak of a new process with that of the one that started it."""


def measure(command: list[str]) -> Cost:
    """Run a command to its end and measure it; one thread for torch and BLAS.

    Args:
        command: the path of a program, and its words.

    Raises:
        FusionError: it failed; its last words are told.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-I", "-S", "-c", _LAUNCH, *command], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise FusionError(f"{Path(command[0]).name} failed: {done.stderr.strip()[-500:]}")
    cpu, wall, peak = map(float, done.stdout.split())
    return Cost(cpu, wall, int(peak) * (1 if sys.platform == "darwin" else 1024))


def mergekit_environment(folder: Path) -> Path:
    """Make an environment with mergekit by uv, or use the one that is there; returns its command.

    Raises:
        InputError: uv is not installed.
    """
    command = folder / ("Scripts" if os.name == "nt" else "bin") / "mergekit-yaml"
    if not command.exists():
        uv = shutil.which("uv")
        if uv is None:
            raise InputError("uv is not installed; the comparison with mergekit needs it")
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", "3.11", str(folder)], check=True)  # noqa: S603
        python = str(command.with_name("python"))
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, MERGEKIT, BESIDE], check=True)  # noqa: S603
    return command


@contextlib.contextmanager
def _fresh(folder: Path) -> Generator[Path, None, None]:
    shutil.rmtree(folder, ignore_errors=True)
    yield folder


def merging_rows(folder: Path, *, repeats: int = 5, size: Size | None = None) -> list[Row]:
    """Merge by both, by turns, and compare costs and results.

    Args:
        folder: a place with 4 GB of room; checkpoints and the environment are left in it.
        repeats: pairs.
        size: of the model.

    Returns:
        Rows of CPU seconds, wall seconds, peak memory, and distance to the float64 merge (in the note).
    """
    size = size or Size()
    command = mergekit_environment(folder / "mergekit-environment")
    checkpoints = folder / "checkpoints"
    if not (checkpoints / "complete").exists():
        shutil.rmtree(checkpoints, ignore_errors=True)
        write_checkpoints(checkpoints, size)
        (checkpoints / "complete").touch()
    places = [checkpoints / name for name in ("base", "target0", "target1")]
    recipe = folder / "recipe.yml"
    models = "".join(f"  - model: {p}\n    parameters:\n      select_topk: 1.0\n" for p in places[1:])
    recipe.write_text(f"merge_method: sce\nbase_model: {places[0]}\nmodels:\n{models}dtype: bfloat16\n")
    ours: list[Cost] = []
    theirs: list[Cost] = []
    here, there = folder / "ours", folder / "theirs"
    words = ["--method", "sce", "--base", str(places[0]), "--tau", "1", "--quiet", "--out", str(here)]
    mine = [sys.executable, "-m", "fusechat", "merge", *map(str, places[1:]), *words]
    for _ in range(repeats):
        with _fresh(there):
            theirs.append(measure([str(command), str(recipe), str(there), "--no-copy-tokenizer"]))
        with _fresh(here):
            ours.append(measure(mine))
    near, far = distances(places, here, there)
    count = sum(torch.Size(shape).numel() for shape in size.shapes().values())
    note = f"SCE, {count / 1e6:.0f} M parameters in bfloat16, base and 2 targets"
    rows = [
        _row("merge, CPU seconds", [c.cpu for c in ours], [c.cpu for c in theirs], CPU_TARGET, note),
        _row("merge, wall seconds", [c.wall for c in ours], [c.wall for c in theirs], None, note),
    ]
    peaks = [int(median(c.peak for c in costs)) for costs in (ours, theirs)]
    rows.append(memory_row("merge, peak resident", *peaks, target=MEMORY_TARGET, against=MERGEKIT, note=note))
    rows.append(
        Row(
            name="merge, distance to float64",
            ratio=far / near,
            reference=MERGEKIT,
            target="> 1",
            met=check_target(far / near, "> 1"),
            note=f"root mean square {near:.3e} against {far:.3e}",
        )
    )
    return rows


def _row(name: str, ours: list[float], theirs: list[float], target: str | None, note: str) -> Row:
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    ratio = median(ratios)
    return Row(
        name=name,
        ratio=ratio,
        ours_s=median(ours),
        reference_s=median(theirs),
        reference=MERGEKIT,
        ratio_low=ratios[0],
        ratio_high=ratios[-1],
        repeats=len(ours),
        target=target,
        met=check_target(ratio, target),
        note=note,
    )
