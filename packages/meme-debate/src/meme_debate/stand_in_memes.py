"""Stand-in memes over real photographs: whether one teases depends on the pair of words and picture.

Nothing here needs PyTorch, so that a process of its own can make them while that is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import FusionError, MissingExtraError
from fusion_core.seeding import rng

from .meme import Meme
from .pixels import normalized_square
from .stand_in_server import LARGE

__all__ = ["PHOTOGRAPHS", "StandIn", "debater", "make_memes", "pixels_of_memes"]

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
PIXELS = 48  # of the square that the stand-in judges' tower sees


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


def photographs_folder() -> Path:
    """Where scikit-image keeps its photographs; it is not imported.

    Raises:
        MissingExtraError: scikit-image is not installed.
    """
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            'scikit-image is not installed; it comes with: pip install "meme-debate[demo]"'
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def photograph(thing: str) -> Any:
    """One of scikit-image's photographs, as a PIL image.

    Raises:
        MissingExtraError: scikit-image is not installed.
    """
    from PIL import Image

    with Image.open(photographs_folder() / PHOTOGRAPHS[thing]) as file:
        image = file.convert("RGB")
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
    from PIL import Image, ImageEnhance

    folder.mkdir(parents=True, exist_ok=True)
    photographs = {thing: photograph(thing) for thing in things}
    large = [thing for thing in things if thing in LARGE or thing == "moon"]
    small = [thing for thing in things if thing not in large]
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
        levels = np.clip(np.rint(np.arange(256) + shift), 0, 255).astype(int).tolist()
        square = square.point(levels * 3)
        for words, y, anchor in ((top, 6, "ma"), (bottom, SIDE - 6, "md")):
            box, outline, letters = _written(words.upper(), y, anchor)
            square.paste("black", box, outline)
            square.paste("white", box, letters)
        path = folder / f"{split}-{number:05d}.jpg"
        square.save(path, quality=80)
        meme = Meme(
            f"{split}-{number:05d}", path, f"{top}\n{bottom}", "", int(says_large != is_large),
            split=split, group=thing, source="stand-in",
        )  # fmt: skip
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found.append(StandIn(meme, thing, bool(draws.random() < HIDDEN), digest))
    return [found[i] for i in draws.permutation(count)]


@lru_cache(maxsize=512)
def _written(words: str, y: int, anchor: str) -> tuple[tuple[int, int, int, int], Any, Any]:
    """Where words stand on a meme, and the masks of their outline and of their letters."""
    from PIL import Image, ImageDraw, ImageFont

    font, masks = ImageFont.load_default(17), list[Any]()
    for stroke in (255, 0):
        mask = Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(mask).multiline_text(
            (SIDE // 2, y), _wrapped(words), 255, font, anchor, align="center", stroke_width=2,
            stroke_fill=stroke,
        )  # fmt: skip
        masks.append(mask)
    box = masks[0].getbbox()
    return box, masks[0].crop(box), masks[1].crop(box)


def pixels_of_memes(memes: Sequence[StandIn]) -> NDArray[np.float32]:
    """The pictures (N, 3, S, S) as the stand-in judges' tower takes them, none withheld."""
    from PIL import Image

    found: list[NDArray[np.float32]] = []
    for each in memes:
        with Image.open(each.meme.image) as file:
            found.append(normalized_square(file.convert("RGB"), PIXELS))
    return np.stack(found)


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
