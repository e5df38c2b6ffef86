"""Train the shipped checkpoint from rendered scenes, on one CPU core or a GPU.

``python -m dbnet_asf.train_checkpoint render CACHE`` renders scenes and their labels into a cache (any
number of processes may do so, each its own part), ``... negatives CACHE`` adds pictures without text, ``...
train CACHE OUT`` learns from what is there and may be stopped and resumed, ``... export OUT DIRECTORY``
writes the averaged weights in half precision.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from dbnet_asf.config import DBConfig, LabelConfig, PostConfig
from dbnet_asf.data.synth import render
from dbnet_asf.losses import DBLoss
from dbnet_asf.model.asf import AdaptiveScaleFusion
from dbnet_asf.model.dbnet import DBNet
from dbnet_asf.targets import Targets, make_targets
from fusion_core.atomic import atomic_directory, atomic_write
from fusion_core.checkpoint import save_tensors
from fusion_core.device import environment, resolve_device
from fusion_core.seeding import rng

CONFIG = DBConfig(
    backbone="nano",
    channels=(16, 32, 64, 96),
    blocks=(1, 1, 2, 1),
    inner=64,
    short_side=640,
    post=PostConfig(box_thresh=0.6, score="component"),
)
LABELS = LabelConfig(distance="exact", precise=True, pieces="all", min_text_size=5.0)
SIDE, CROP, SHARD = 384, 256, 100
NEGATIVES = 0.25  # share of crops without text, beside the quarter of the scenes that hold none
LR, WEIGHT_DECAY, EMA, WARMUP, COOLDOWN = 2.5e-3, 1e-4, 0.998, 200, 0.35


def render_shards(cache: Path, first: int, last: int, seed: int) -> None:
    """Render shards ``first`` to ``last`` of the cache; those that are there already are left alone."""
    cache.mkdir(parents=True, exist_ok=True)
    for shard in range(first, last):
        target = cache / f"{shard:04d}.npy"
        if target.exists():
            continue
        rows = np.zeros((SHARD, SIDE, SIDE, 5), np.uint8)
        for row in range(SHARD):
            image, polygons, ignore = render(shard * SHARD + row, seed, SIDE)
            made = make_targets(polygons, ignore, (SIDE, SIDE), LABELS)
            rows[row, :, :, :3] = image
            rows[row, :, :, 3] = made.gt.numpy() + 2 * made.mask.numpy() + 4 * made.thresh_mask.numpy()
            rows[row, :, :, 4] = np.rint(made.thresh_map.numpy() * 255)
        with atomic_write(target) as file:
            np.save(file, rows)


def render_negatives(cache: Path, first: int, last: int, seed: int) -> None:
    """Render shards of pictures without text: stars, blobs, fur, leaves, windows, fences."""
    cache.mkdir(parents=True, exist_ok=True)
    for shard in range(first, last):
        target = cache / f"n{shard:04d}.npy"
        if target.exists():
            continue
        rows = np.full((SHARD, SIDE, SIDE, 5), (0, 0, 0, 2, 77), np.uint8)  # mask 1, threshold 0.3
        for row in range(SHARD):
            rows[row, :, :, :3] = negative(rng(seed, "negative", shard * SHARD + row), SIDE)
        with atomic_write(target) as file:
            np.save(file, rows)


def negative(random: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """A picture of none but what photographs are full of and what is no text."""
    gray = _octaves(random, side) * random.uniform(10, 60) + random.uniform(5, 180)
    kind = random.integers(6)
    if kind == 0:  # stars and galaxies
        gray = gray * random.uniform(0.05, 0.5)
        for _ in range(int(random.integers(20, 500))):
            _blob(random, gray, random.uniform(40, 255), float(random.uniform(0.5, 1.5) ** 4))
    elif kind == 1:  # blobs, dark or bright
        for _ in range(int(random.integers(5, 120))):
            _blob(random, gray, random.uniform(-120, 120), float(random.uniform(1, 14)))
    elif kind == 2:  # fur, grass, ripples: noise smeared along a direction
        turn, length = random.uniform(0, np.pi), int(random.integers(5, 40))
        kernel = np.zeros((2 * length + 1,) * 2, np.float32)
        step = (length * np.cos(turn), length * np.sin(turn))
        ends = [
            (int(length - step[0]), int(length - step[1])),
            (int(length + step[0]), int(length + step[1])),
        ]
        cv2.line(kernel, ends[0], ends[1], 1.0)
        grain = random.standard_normal((side, side)).astype(np.float32)
        gray = gray + cv2.filter2D(grain, -1, kernel / np.sqrt(kernel.sum())) * random.uniform(10, 60)
    elif kind == 3:  # leaves and rubble: octaves cut at levels
        cut = np.tanh(_octaves(random, side, 5) * random.uniform(2, 20))
        gray = gray + cut * random.uniform(20, 80)
    else:  # windows, tiles, fences: rows of rectangles with frames, roofs and shadows
        gray = _facade(random, gray)
    tint = random.uniform(0.7, 1.1, 3) * (
        1 + 0.1 * _octaves(random, side)[..., None] * random.standard_normal(3)
    )
    picture = gray[..., None] * tint + random.normal(0, random.uniform(0, 8), (side, side, 3))
    sigma = random.uniform(0, 1.2)
    picture = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), sigma) if sigma > 0.3 else picture
    return np.clip(picture, 0, 255).astype(np.uint8)


def _octaves(random: np.random.Generator, side: int, count: int = 4) -> NDArray[Any]:
    total = np.zeros((side, side), np.float32)
    start = int(random.integers(2, 24))
    for octave in range(count):
        cells = min(start << octave, side)
        grid = random.standard_normal((cells, cells)).astype(np.float32)
        total += cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC) / (1.6**octave)
    return total


def _blob(random: np.random.Generator, gray: NDArray[Any], level: float, size: float) -> None:
    x, y = random.uniform(0, gray.shape[1]), random.uniform(0, gray.shape[0])
    stretch, turn = random.uniform(0.3, 1), random.uniform(0, np.pi)
    reach = int(3 * size + 2)
    left, top = max(int(x) - reach, 0), max(int(y) - reach, 0)
    part = gray[top : int(y) + reach, left : int(x) + reach]
    if not part.size:
        return
    v, u = np.mgrid[top : top + part.shape[0], left : left + part.shape[1]]
    a = (u - x) * np.cos(turn) + (v - y) * np.sin(turn)
    b = ((v - y) * np.cos(turn) - (u - x) * np.sin(turn)) / stretch
    part += level * np.exp(-(a * a + b * b) / (2 * size * size))


def _facade(random: np.random.Generator, gray: NDArray[Any]) -> NDArray[Any]:
    side = len(gray)
    gray = np.ascontiguousarray(gray, np.float32)
    for _ in range(int(random.integers(1, 5))):
        x0, y0 = random.integers(-20, side, 2)
        w, h = random.integers(3, 40), random.integers(4, 60)
        gap_x, gap_y = random.uniform(1.1, 2.5), random.uniform(1.1, 2.5)
        level, frame = random.uniform(0, 255), random.uniform(0, 255)
        for row in range(int(random.integers(1, 8))):
            for column in range(int(random.integers(2, 24))):
                x, y = int(x0 + column * w * gap_x), int(y0 + row * h * gap_y)
                corners = (x, y), (x + int(w), y + int(h))
                cv2.rectangle(gray, *corners, float(level + random.normal(0, 15)), -1)
                cv2.rectangle(gray, *corners, float(frame), int(random.integers(1, 3)))
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), float(random.normal(0, 10)), 1.0)
    return cv2.warpAffine(gray, turn, (side, side), borderMode=cv2.BORDER_REFLECT)


class Scenes:
    """Random crops of the scenes that the cache holds at the moment."""

    def __init__(self, cache: Path, seed: int) -> None:
        self.cache, self.seed = cache, seed
        self.shards: list[NDArray[Any]] = []
        self.negatives: list[NDArray[Any]] = []
        self.look()

    def look(self) -> None:
        """Open the shards that have been rendered since."""
        paths = sorted(self.cache.glob("[0-9]*.npy"))
        self.shards += [np.load(path, mmap_mode="r") for path in paths[len(self.shards) :]]
        paths = sorted(self.cache.glob("n*.npy"))
        self.negatives += [np.load(path, mmap_mode="r") for path in paths[len(self.negatives) :]]

    def batch(self, step: int, size: int) -> tuple[Tensor, Targets]:
        """The batch of a step."""
        random = rng(self.seed, "batch", step)
        rows = np.stack([self._crop(random) for _ in range(size)])
        jitter = random.uniform(0.75, 1.25, (size, 1, 1, 3)) * random.uniform(0.8, 1.2, (size, 1, 1, 1))
        image = rows[..., :3].astype(np.float32)
        turned = random.random((size, 1, 1, 1)) < 0.15
        image = np.where(turned, 255 - image, image)
        image = np.clip((image - 127.5) * jitter + 127.5 + random.uniform(-25, 25, (size, 1, 1, 1)), 0, 255)
        mean, std = np.array(CONFIG.mean, np.float32), np.array(CONFIG.std, np.float32)
        x = torch.from_numpy(((image - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)
        bits = torch.from_numpy(rows[..., 3].copy())
        thresh = torch.from_numpy(rows[..., 4].astype(np.float32) / 255)
        return x, Targets((bits & 1) > 0, (bits & 2) > 0, thresh, (bits & 4) > 0)

    def _crop(self, random: np.random.Generator) -> NDArray[Any]:
        source = self.negatives if self.negatives and random.random() < NEGATIVES else self.shards
        shard = source[int(random.integers(len(source)))]
        scene = shard[int(random.integers(len(shard)))]
        side = int(random.integers(192, SIDE + 1)) if random.random() < 0.6 else CROP
        top, left = random.integers(0, SIDE - side + 1, 2)
        cut = np.asarray(scene[top : top + side, left : left + side])
        if side != CROP:
            method = cv2.INTER_AREA if side > CROP else cv2.INTER_LINEAR
            image = cv2.resize(np.ascontiguousarray(cut[..., :3]), (CROP, CROP), interpolation=method)
            labels = cv2.resize(
                np.ascontiguousarray(cut[..., 3:]), (CROP, CROP), interpolation=cv2.INTER_NEAREST_EXACT
            )
            cut = np.concatenate([image, labels], -1)
        if random.random() < 0.1:
            cut = cut.transpose(1, 0, 2)
        return cut[:, ::-1] if random.random() < 0.5 else cut


def fresh() -> DBNet:
    """A network that starts small where the authors' start is large.

    Their first logits have a deviation of 3 and their gates' of 30, made for pretrained features and SGD;
    from scratch Adam gets rid of the noise by shutting the gates for good.
    """
    net = DBNet(CONFIG)
    for part in net.neck.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight, nonlinearity="linear")
    if isinstance(net.neck.asf, AdaptiveScaleFusion):
        torch.nn.init.normal_(net.neck.asf.level.weight, std=0.01)
    heads: Any = net.head.values()
    for head in heads:
        first, last = head[3], head[6]
        torch.nn.init.normal_(first.weight, std=(2 / first.weight.shape[0]) ** 0.5)
        torch.nn.init.normal_(last.weight, std=0.02)
        torch.nn.init.constant_(last.bias, -1.0)
    return net


def learning_rate(step: int, progress: float) -> float:
    """Warm up by steps, stay, and fall to nothing over the last third of the time."""
    return LR * min(1.0, (step + 1) / WARMUP, max(0.0, (1 - progress) / COOLDOWN))


def train(
    cache: Path,
    out: Path,
    *,
    steps: int,
    minutes: float,
    batch_size: int,
    seed: int,
    device: str,
    save_s: float,
) -> None:
    """Train until ``steps`` are done or ``minutes`` of training have passed; resumes what ``out`` holds."""
    where = resolve_device(device)
    torch.manual_seed(seed)
    net = fresh()
    net = net.to(where).to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    average = AveragedModel(net, avg_fn=_decay, use_buffers=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    loss_fn, scenes = DBLoss(), Scenes(cache, seed)
    state_file, step, spent = out / "state.pt", 0, 0.0
    out.mkdir(parents=True, exist_ok=True)
    if state_file.exists():
        state = torch.load(state_file, map_location=where, weights_only=True)
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
    started, saved = time.monotonic() - spent, time.monotonic()
    running: dict[str, float] = {}
    while True:
        spent = time.monotonic() - started
        progress = max(step / steps, spent / (60 * minutes))
        done = progress >= 1
        if done or time.monotonic() - saved > save_s:
            save(out, net, average, optimizer, step, spent)
            saved = time.monotonic()
        if done:
            return
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        images, targets = scenes.batch(step, batch_size)
        images = images.to(where).contiguous(memory_format=torch.channels_last)
        with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
            output = net(images)
        targets = targets.to(where)
        loss, parts = loss_fn(output, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        average.update_parameters(net)
        step += 1
        if step % 10 == 0:
            gap = output.prob.detach()[:, 0]
            gap = gap[targets.gt].mean().nan_to_num() - gap[~targets.gt].mean()
            for name, value in {"loss": loss.detach(), "gap": gap, **parts}.items():
                running[name] = running.get(name, float(value)) * 0.7 + float(value) * 0.3
        if step % 25 == 0:
            scenes.look()
            line = {"step": step, "seconds": round(spent), "lr": optimizer.param_groups[0]["lr"], **running}
            with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _decay(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
    decay = min(EMA, (1 + float(count)) / (10 + float(count)))
    if not averaged.is_floating_point():
        return current
    return averaged + (1 - decay) * (current - averaged)


def save(
    out: Path, net: DBNet, average: AveragedModel, optimizer: torch.optim.Optimizer, step: int, spent: float
) -> None:
    """Write what resuming needs, and the averaged weights."""
    state = {
        "net": net.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": spent,
    }
    with atomic_write(out / "state.pt") as file:
        torch.save(state, file)
    weights = {key: value.contiguous() for key, value in average.module.state_dict().items()}
    save_tensors(out / "average.safetensors", weights)


def export(out: Path, directory: Path) -> None:
    """Write the averaged weights without the threshold head, in half precision."""
    state = torch.load(out / "state.pt", map_location="cpu", weights_only=True)
    # Running statistics reach beyond what half precision holds.
    weights = {
        key.removeprefix("module."): value.half() if "running" not in key else value
        for key, value in state["average"].items()
        if key.startswith("module.") and ".thresh." not in key and value.is_floating_point()
    } | {
        key.removeprefix("module."): value
        for key, value in state["average"].items()
        if key.startswith("module.") and ".thresh." not in key and not value.is_floating_point()
    }
    with atomic_directory(directory, overwrite=True) as made:
        CONFIG.save(made / "config.json")
        save_tensors(made / "model.safetensors", {k: v.contiguous() for k, v in weights.items()})
        record = {
            "steps": state["step"],
            "seconds": round(state["seconds"]),
            "parameters": sum(value.numel() for value in weights.values()),
            "lr": LR,
            "weight_decay": WEIGHT_DECAY,
            "ema": EMA,
            "crop": CROP,
            "labels": LABELS.to_dict(),
            "environment": environment(),
        }
        (made / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """The three commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, count in (("render", 80), ("negatives", 20)):
        rendering = verbs.add_parser(name)
        rendering.add_argument("cache", type=Path)
        rendering.add_argument("--first", type=int, default=0)
        rendering.add_argument("--last", type=int, default=count)
        rendering.add_argument("--seed", type=int, default=0)
    training = verbs.add_parser("train")
    training.add_argument("cache", type=Path)
    training.add_argument("out", type=Path)
    training.add_argument("--steps", type=int, default=12_000)
    training.add_argument("--minutes", type=float, default=math.inf)
    training.add_argument("--batch-size", type=int, default=4)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", default="auto")
    training.add_argument("--save-s", type=float, default=300.0, help="seconds between checkpoints")
    exporting = verbs.add_parser("export")
    exporting.add_argument("out", type=Path)
    exporting.add_argument("directory", type=Path)
    options = vars(parser.parse_args(arguments))
    verb = options.pop("verb")
    jobs = {"render": render_shards, "negatives": render_negatives, "train": train, "export": export}
    jobs[verb](**options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
