"""Published data sets of memes in miniature, as their authors lay them out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def data_sets(place: Path) -> None:
    """The annotations of five data sets, each of two memes."""

    def pictures(folder: Path, *names: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names):
            shutil.copyfile(place / "images" / f"{number}.png", folder / name)

    harm = [
        {"id": "a", "image": "a.png", "labels": ["not harmful"], "text": "fine\nday"},
        {"id": "b", "image": "b.png", "labels": ["very harmful", "society"], "text": "odd"},
    ]
    (place / "harmc" / "annotations").mkdir(parents=True)
    (place / "harmc" / "annotations" / "train.jsonl").write_text(
        "".join(f"{json.dumps(row)}\n" for row in harm)
    )
    pictures(place / "harmc" / "images", "a.png", "b.png")
    fhm = [{"id": i, "img": f"img/{i}.png", "label": i % 2, "text": "a"} for i in (1, 2)]
    pictures(place / "fhm" / "img", "1.png", "2.png")
    (place / "fhm" / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in fhm))
    head = "file_name\tmisogynous\tshaming\tstereotype\tobjectification\tviolence\tText Transcription\n"
    pictures(place / "mami" / "TRAINING", "1.jpg", "2.jpg")
    (place / "mami" / "training.csv").write_text(
        head + '1.jpg\t1\t0\t0\t0\t0\ta "line"\n2.jpg\t0\t0\t0\t0\t0\tb\n'
    )
    pictures(place / "multioff" / "Labelled Images", "1.png", "2.png")
    (place / "multioff" / "Split Dataset").mkdir()
    (place / "multioff" / "Split Dataset" / "Training_meme_dataset.csv").write_text(
        'image_name,sentence,label\n1.png,"two\nlines",offensive\n2.png,b,Non-offensiv\n'
    )
    pictures(place / "pridemm" / "Images", "a.png", "b.png")
    (place / "pridemm" / "PrideMM.csv").write_text(
        "name,text,hate,target,stance,humour,split\na.png,x,1,0,1,1,train\nb.png,y,0,,1,1,test\n"
    )
