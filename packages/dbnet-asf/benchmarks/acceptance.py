"""Accept a checkpoint: words of page(), false boxes on photographs without text, F on rendered scenes.

``python packages/dbnet-asf/benchmarks/acceptance.py [MODEL] [--scenes 60] [--json FILE] [--set NAME=VALUE]``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from dbnet_asf.acceptance import classical, coverage, scenes, synthetic_score
from dbnet_asf.data.dataset import Example
from dbnet_asf.data.scenery import photographs
from dbnet_asf.detect import TextDetector
from dbnet_asf.evaluation import evaluate
from dbnet_asf.model.dbnet import DBNet
from fusion_core.atomic import atomic_write
from fusion_core.images import read_image

WORDS = Path(__file__).parent.parent / "tests" / "data" / "page_words.json"


def page(detector):
    """Coverage of the words of ``skimage.data.page()``, enlarged twice."""
    from skimage import data

    facts = json.loads(WORDS.read_text("utf-8"))
    image = cv2.resize(data.page(), None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    words = [np.array(word["quad"]) * 2 for word in facts["words"]]
    ignored = [np.array(word["quad"]) * 2 for word in facts["ignore"]]
    found = detector(np.repeat(image[..., None], 3, -1))
    result = coverage(words, [region.polygon for region in found], ignored)
    missed = [word["text"] for word, hit in zip(facts["words"], result.covered, strict=True) if not hit]
    return {
        "words": result.words,
        "covered": int(result.covered.sum()),
        "boxes": len(found),
        "false": int(result.false.sum()),
        "missed": missed,
    }


def photos(detector):
    """Boxes on the eight photographs without text."""
    return {path.name: len(detector(read_image(path))) for path in photographs("test")}


def synthetic(detector, count):
    """Rendered scenes over held-out photographs: all together, and recall by the words' short side."""
    native = TextDetector(
        DBNet.from_pretrained(detector.name), device="cpu", resize="native", post=detector.config.post
    )
    examples = [Example(*scene, str(at)) for at, scene in enumerate(scenes(count))]
    found = evaluate(native, examples, progress=False)
    names = ("precision", "recall", "hmean", "average_precision")
    return {**{name: getattr(found, name) for name in names}, "by_size": found.by_size}


def measure(detector, count):
    return {
        "page": page(detector),
        "photos": photos(detector),
        "synthetic": synthetic(detector, count),
        "classical": synthetic_score(classical, count),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", nargs="*", default=[])
    options = parser.parse_args()
    post = {}
    for assignment in options.set:
        name, _, value = assignment.partition("=")
        post[name] = json.loads(value)
    detector = TextDetector.from_pretrained(options.model, device="cpu", **post)
    found = measure(detector, options.scenes)
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        with atomic_write(options.json, "w") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
