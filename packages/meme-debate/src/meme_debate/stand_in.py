"""Stand-in memes over real photographs: whether one teases depends on the pair of words and picture."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusion_core.errors import FusionError, MissingExtraError
from fusion_core.images import read_image
from fusion_core.seeding import generator, rng

from .encoding import stack_pixels
from .judge import Fusion, Judge
from .meme import Meme
from .settings import JudgeSettings
from .stand_in_server import LARGE
from .tokens import word_tokenizer

__all__ = ["PHOTOGRAPHS", "StandIn", "debater", "make_judge", "make_memes", "train_tower"]

PHOTOGRAPHS = {
    "rocket": "rocket.jpg",
    "galaxy": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "clock": "clock_motion.png",
    "moon": "moon.png",
    "coins": "coins.png",
}
"""What each photograph of scikit-image shows; the last two are held out of everything but the last test."""
KNOWN, HELD_OUT = tuple(PHOTOGRAPHS)[:6], tuple(PHOTOGRAPHS)[6:]
OPENERS = ("look at this", "behold the", "say hello to the", "here comes the", "meet our", "what a",
           "presenting the", "all hail the")  # fmt: skip
CORES = {
    True: ("giant", "colossus", "titan", "mountain", "mammoth", "huge one"),
    False: ("tiny thing", "small fry", "crumb", "speck", "little one", "wee dot"),
}
CLOSERS = {
    True: ("you can see it from space", "it blocks out the sun", "it needs its own map",
           "it fills the horizon", "doors are too narrow for it", "it has its own gravity"),
    False: ("it fits in a pocket", "bring a magnifying glass", "blink and you miss it",
            "an ant could carry it", "it hides behind a grain of rice", "it came in a thimble"),
}  # fmt: skip
TAILS = ("", "no doubt", "every single day", "ask anyone", "true story", "as always")
SIDE, HIDDEN = 224, 0.4
TOWER_STEPS = 100
_DRAWING = threading.Lock()  # weights are drawn from the global generator, one network at a time


@dataclass(frozen=True)
class StandIn:
    """One stand-in meme.

    Args:
        meme: with the picture's file, as the debater sees it.
        thing: what the picture shows.
        hidden: whether the judge gets a plain gray picture instead ("behind a warning plate").
        digest: of the file's bytes.
    """

    meme: Meme
    thing: str
    hidden: bool
    digest: str

    @property
    def judged(self) -> Meme:
        """The meme as the judge sees it."""
        return replace(self.meme, image=None) if self.hidden else self.meme


def photograph(thing: str) -> Any:
    """One of scikit-image's photographs, as a PIL image.

    Raises:
        MissingExtraError: scikit-image is not installed.
    """
    from PIL import Image

    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            'scikit-image is not installed; it comes with: pip install "meme-debate[demo]"'
        )
    image = Image.fromarray(
        read_image(Path(next(iter(spec.submodule_search_locations))) / "data" / PHOTOGRAPHS[thing])
    )
    image.thumbnail((640, 640))
    return image


def make_memes(
    folder: Path,
    count: int,
    *,
    seed: int = 0,
    split: str = "train",
    things: Sequence[str] = KNOWN,
) -> list[StandIn]:
    """Memes whose label is "says large" XOR "is large": praise that does not fit is a jibe (1).

    Args:
        folder: gets the pictures, JPEG.
        count: memes; the four cells of words and picture are balanced.
        seed: of all draws.
        split: part of the ids and records.
        things: names of :data:`PHOTOGRAPHS` to draw from.
    """
    from PIL import Image, ImageDraw, ImageEnhance, ImageFont

    folder.mkdir(parents=True, exist_ok=True)
    photographs = {thing: photograph(thing) for thing in things}
    large = [thing for thing in things if thing in LARGE or thing == "moon"]
    small = [thing for thing in things if thing not in large]
    font = ImageFont.load_default(17)
    draws = rng(seed, "memes", split)
    found: list[StandIn] = []
    for number in range(count):
        says_large, is_large = bool(number & 1), bool(number & 2)
        thing = str(draws.choice(large if is_large else small))
        core, closer = str(draws.choice(CORES[says_large])), str(draws.choice(CLOSERS[says_large]))
        top, bottom = f"{draws.choice(OPENERS)} {core}", f"{closer} {draws.choice(TAILS)}".strip()
        image = photographs[thing]
        side = int(min(image.size) * draws.uniform(0.55, 0.95))
        left, upper = (int(draws.integers(0, extent - side + 1)) for extent in image.size)
        square = image.crop((left, upper, left + side, upper + side)).resize(
            (SIDE, SIDE), Image.Resampling.BILINEAR
        )
        if draws.random() < 0.5:
            square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        square = ImageEnhance.Contrast(square).enhance(float(draws.uniform(0.7, 1.3)))
        shift = float(draws.uniform(-25, 25))
        levels = [max(0, min(255, round(value + shift))) for value in range(256)]
        square = square.point(levels * 3)
        pen = ImageDraw.Draw(square)
        for words, y, anchor in ((top, 6, "ma"), (bottom, SIDE - 6, "md")):
            pen.multiline_text((SIDE // 2, y), _wrapped(words.upper()), "white", font, anchor, align="center",
                               stroke_width=2, stroke_fill="black")  # fmt: skip
        path = folder / f"{split}-{number:05d}.jpg"
        square.save(path, quality=80)
        meme = Meme(
            f"{split}-{number:05d}", path, f"{top}\n{bottom}", "", int(says_large != is_large),
            split=split, group=thing, source="stand-in",
        )  # fmt: skip
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found.append(StandIn(meme, thing, bool(draws.random() < HIDDEN), digest))
    return [found[i] for i in draws.permutation(count)]


def _wrapped(words: str, width: int = 20) -> str:
    lines = [""]
    for word in words.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


@contextlib.contextmanager
def debater(memes: Sequence[StandIn], folder: Path) -> Generator[str, None, None]:
    """A scripted debater on a local server, in a process of its own; gives its URL.

    Raises:
        FusionError: it does not start.
    """
    table = folder / "pictures.json"
    table.write_text(json.dumps({each.digest: each.thing for each in memes}), encoding="utf-8")
    command = [sys.executable, "-m", "meme_debate.stand_in_server", str(table)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
    try:
        port = process.stdout.readline().strip() if process.stdout else ""
        if not port:
            raise FusionError("the scripted debater did not start; is a local port allowed here?")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


TEXT = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 1,
        "dropout_rate": 0.0, "feed_forward_proj": "relu", "tie_word_embeddings": True}  # fmt: skip
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 48, "patch_size": 12}  # fmt: skip


def make_judge(texts: Sequence[str], fusion: Fusion, seed: int) -> Judge:
    """A small fused judge with random weights and a word tokenizer of its own.

    Args:
        texts: composed texts that the tokenizer is made from.
        fusion: see :class:`Judge`.
        seed: of the weights; the same weights for every fusion.
    """
    tokenizer = word_tokenizer(texts)
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "judge").initial_seed())
        settings = JudgeSettings(max_length=128, name=f"stand-in judge {seed}")
        judge = Judge({**TEXT, "vocab_size": len(tokenizer)}, VISION, fusion, settings)
    judge.tokenizer = tokenizer
    return judge


def read_pixels(memes: Sequence[StandIn]) -> Tensor:
    """The pictures (N, 3, S, S) as the stand-in judges' tower takes them, none withheld."""
    return stack_pixels([each.meme.image for each in memes], int(VISION["image_size"]))


def train_tower(
    judge: Judge, memes: Sequence[StandIn], pixels: Tensor, *, seed: int = 0, steps: int = TOWER_STEPS
) -> float:
    """Let the tower learn to name its photograph, which stands for CLIP's pretraining; it sees no label.

    Args:
        judge: its tower is trained in place, then frozen.
        memes: whose pictures are shown.
        pixels: (N, 3, S, S) of :func:`read_pixels`.
        seed: of weights and order.
        steps: of 64 pictures.

    Returns:
        The share of the last steps' pictures that it named.
    """
    names = sorted({each.thing for each in memes})
    target = torch.tensor([names.index(each.thing) for each in memes])
    tower, right = judge.image_transformer, 0.0
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "tower").initial_seed())
        head = nn.Linear(int(judge.vision_config.hidden_size), len(names))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1e-3, fused=True)
    draws = rng(seed, "tower order")
    for _ in range(steps):
        rows = torch.from_numpy(draws.integers(0, len(memes), 64))
        logits = head(tower(pixel_values=pixels[rows]).last_hidden_state[:, 0])
        loss = nn.functional.cross_entropy(logits, target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = 0.9 * right + 0.1 * float((logits.argmax(1) == target[rows]).float().mean())
    optimizer.zero_grad()  # what is left would count in the judge's gradient norm
    tower.requires_grad_(False)
    return right
