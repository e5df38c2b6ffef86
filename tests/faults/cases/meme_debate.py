"""Commands, readers and servers of meme-debate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from faults.cases.common import bench, demo, do
from faults.cases.meme_data import data_sets
from faults.garbage import Reader
from faults.kill import Command
from faults.load import Server

MAIN = "meme_debate.cli:main"
WORDS = ("cat", "dog", "rocket", "coffee", "giant", "tiny", "look", "cold", "again", "moon", "clock")
POLICY = 'name = "spam"\ndefinition = "unasked advertising."\npositive = "spam"\nnegative = "wanted"\n'


def inputs(place: Path) -> None:
    """Memes with pictures, debates about them, judges of both kinds, a policy, a cache, data sets."""
    import numpy as np
    import torch
    from PIL import Image

    from fusion_core.testing import FaultServer
    from meme_debate import Debate, Meme
    from meme_debate.meme import save_debates, save_memes

    draws = np.random.default_rng(0)
    memes, debates = [], []
    (place / "images").mkdir()
    for i in range(24):
        image = place / "images" / f"{i % 4}.png"
        if i < 4:
            Image.fromarray(draws.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(image)
        words = " ".join(draws.choice(WORDS, 3 + i % 5))
        text = f"{words} rude" if i % 2 else words
        memes.append(
            Meme(
                f"m{i}",
                image,
                text,
                f"a {WORDS[i % 4]}",
                i % 2,
                group="even" if i % 4 < 2 else "odd",
                split="train",
            )
        )
        debates.append(
            Debate(
                f"m{i}",
                f"the words are {'rude' if i % 2 else 'odd'}, {words}",
                f"only a {words} joke",
                i // 2 % 2,
            )
        )
    save_memes(place / "memes.jsonl", memes)
    save_debates(place / "debates.jsonl", debates)
    do(
        MAIN,
        "judge",
        "train",
        place / "memes.jsonl",
        "--debates",
        place / "debates.jsonl",
        "--coverage",
        "0.8",
        "--out",
        place / "judge",
    )
    (place / "policy.toml").write_text(POLICY)
    (place / "fused.toml").write_text("epochs = 2\nbatch_size = 8\nlr = 1e-3\n")
    with FaultServer(debater()) as server:
        do(
            MAIN,
            *DEBATE,
            "--out",
            place / "d.jsonl",
            "--cache",
            place / "d.sqlite",
            "--overwrite",
            at=place,
            url=server.url,
        )
    torch.manual_seed(0)
    _parts(place, memes)
    data_sets(place)


def _parts(place: Path, memes: list[Any]) -> None:
    """A tiny T5 with its tokenizer and a tiny CLIP, to make a fused judge of."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    from meme_debate.tokens import word_tokenizer

    tokenizer = word_tokenizer(
        [f"Text: Caption: Harmful: Harmless: {meme.text} {meme.caption}" for meme in memes]
    )
    sizes = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 1}
    T5ForConditionalGeneration(T5Config(**sizes, vocab_size=len(tokenizer))).save_pretrained(place / "t5")
    tokenizer.save_pretrained(place / "t5")
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**vision, image_size=16, patch_size=8)).save_pretrained(place / "clip")
    do(MAIN, *FUSED, "--out", place / "run", at=place)


def debater() -> Any:
    """A server of the chat-completions schema that argues for both sides."""
    from fusion_core.testing.server import Reply

    def answer(request: Any) -> Any:
        parts = request.json()["messages"][1]["content"]
        task = parts[-1]["text"]
        if "Statement A:" in task:
            said = '{"better": "A"}'
        else:
            side = "is kind" if "does not fall under the policy. " in task.split("Task:")[-1] else "mocks"
            said = f"The picture {side}; {re.sub(r'[^a-z ]', '', parts[0].get('text', '').lower())[:40]}."
        message = {"role": "assistant", "content": said, "refusal": None}
        usage = {"prompt_tokens": 700, "completion_tokens": 40}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return Reply(json={"choices": choices, "usage": usage}, delay=0.01)

    return answer


MEMES = ("{in}/memes.jsonl", "--debates", "{in}/debates.jsonl")
JUDGE = ("--judge", "{in}/judge")
DEBATE = (
    "debate",
    "{in}/memes.jsonl",
    "--url",
    "{url}/v1",
    "--model",
    "stub",
    "--limit",
    "4",
    "--concurrency",
    "2",
    "-q",
)
FUSED = (
    "judge",
    "train",
    *MEMES,
    "--kind",
    "fused",
    "--text",
    "{in}/t5",
    "--vision",
    "{in}/clip",
    "--config",
    "{in}/fused.toml",
    "--device",
    "cpu",
    "-q",
)

COMMANDS = [
    Command(
        name="meme-debate debate",
        main=MAIN,
        make=inputs,
        serve=debater,
        argv=(*DEBATE, "--out", "d.jsonl"),
        again=("--resume",),
        ignore=r"\.sqlite$",
        volatile={"": (rb'"seconds":[^,}]+',)},
    ),
    Command(
        name="meme-debate judge train",
        main=MAIN,
        make=inputs,
        argv=("judge", "train", *MEMES, "--out", "judge"),
        together=True,
        look=("judge", "predict", "{in}/memes.jsonl", "--judge", "judge", "--json"),
    ),
    Command(
        name="meme-debate judge train --overwrite",
        main=MAIN,
        make=inputs,
        argv=("judge", "train", *MEMES, "--out", "judge", "--overwrite"),
        before=("judge", "train", "{in}/memes.jsonl", "--out", "judge"),
    ),
    Command(
        name="meme-debate judge train (fused)",
        main=MAIN,
        make=inputs,
        argv=(*FUSED, "--set", "save_every=1", "--out", "run"),
        again=("--resume",),
        look=("judge", "predict", "{in}/memes.jsonl", "--judge", "run", "--json"),
    ),
    Command(
        name="meme-debate judge train --features",
        main=MAIN,
        make=inputs,
        again=("--resume",),
        argv=(*FUSED, "--set", "epochs=1", "--features", "states", "--out", "run"),
    ),
    Command(
        name="meme-debate judge predict",
        main=MAIN,
        make=inputs,
        argv=("judge", "predict", *MEMES, *JUDGE, "--out", "scores.jsonl"),
    ),
    Command(
        name="meme-debate judge evaluate",
        main=MAIN,
        make=inputs,
        argv=("judge", "evaluate", *MEMES, *JUDGE, "--ablate", "MD", "--out", "page"),
    ),
    Command(
        name="meme-debate detect",
        main=MAIN,
        make=inputs,
        argv=("detect", *MEMES, *JUDGE, "--out", "cards", "--report", "page.html"),
    ),
    Command(
        name="meme-debate convert",
        main=MAIN,
        make=inputs,
        argv=("convert", "harmc", "{in}/harmc", "--out", "memes.jsonl"),
    ),
    Command(
        name="meme-debate audit",
        main=MAIN,
        make=inputs,
        argv=("audit", *MEMES, *JUDGE, "--swap", "rude=cold", "--out", "page"),
    ),
    bench("meme-debate"),
    demo("meme-debate"),
]


def _reader(
    name: str, argv: tuple[str, ...], file: str, kind: str, *named: str, several: bool = False
) -> Reader:
    return Reader(
        name=f"meme-debate {name}",
        main=MAIN,
        make=inputs,
        argv=argv,
        file=file,
        kind=kind,
        named=named,
        several=several,
    )


def _data_set(name: str, file: str, kind: str) -> Reader:
    named = (f"/{name}", "is not there", "meme ")
    return _reader(
        f"convert {name}",
        ("convert", name, f"{{in}}/{name}", "--out", "m.jsonl"),
        f"{name}/{file}",
        kind,
        *named,
        several=True,
    )


PREDICT = ("judge", "predict", *MEMES, *JUDGE)
ABOUT = ("is about no meme", "debate ")

READERS = [
    _reader("judge predict MEMES", PREDICT, "memes.jsonl", "json lines", *ABOUT, several=True),
    _reader("judge predict --debates", PREDICT, "debates.jsonl", "json lines", *ABOUT),
    _reader(
        "judge train MEMES",
        ("judge", "train", *MEMES, "--out", "j"),
        "memes.jsonl",
        "json lines",
        *ABOUT,
        "memes have no label",
    ),
    _reader("judge predict config.json", PREDICT, "judge/config.json", "json", "/judge"),
    _reader("judge predict calibration.json", PREDICT, "judge/calibration.json", "json", "/judge"),
    _reader("judge predict model.safetensors", PREDICT, "judge/model.safetensors", "safetensors", "/judge"),
    _reader(
        "judge predict (fused) config.json",
        (*PREDICT[:-1], "{in}/run"),
        "run/judge/config.json",
        "json",
        "/judge",
        "given/run ",
    ),
    _reader(
        "judge predict (fused) calibration.json",
        (*PREDICT[:-1], "{in}/run"),
        "run/judge/calibration.json",
        "json",
        "/judge",
    ),
    _reader(
        "judge predict (fused) model.safetensors",
        (*PREDICT[:-1], "{in}/run"),
        "run/judge/model.safetensors",
        "safetensors",
        "/judge",
    ),
    _reader(
        "judge predict (fused) tokenizer.json",
        (*PREDICT[:-1], "{in}/run"),
        "run/judge/tokenizer/tokenizer.json",
        "json",
        "/judge",
    ),
    _reader(
        "judge predict (fused) image", (*PREDICT[:-1], "{in}/run"), "images/1.png", "picture", several=True
    ),
    _reader(
        "judge train (fused) --config", (*FUSED, "--set", "epochs=1", "--out", "r"), "fused.toml", "toml"
    ),
    _reader(
        "judge train (fused) --text",
        (*FUSED, "--set", "epochs=1", "--out", "r"),
        "t5/config.json",
        "json",
        "t5",
    ),
    _reader(
        "judge train (fused) --vision",
        (*FUSED, "--set", "epochs=1", "--out", "r"),
        "clip/config.json",
        "json",
        "clip",
    ),
    _reader(
        "judge train (fused) --resume", (*FUSED, "--out", "{in}/run", "--resume"), "run/last.pt", "pickle"
    ),
    _reader(
        "judge train --policy",
        ("judge", "train", *MEMES, "--policy", "{in}/policy.toml", "--out", "j"),
        "policy.toml",
        "toml",
    ),
    _reader(
        "detect MEMES",
        ("detect", *MEMES, *JUDGE, "--out", "cards"),
        "memes.jsonl",
        "json lines",
        *ABOUT,
        several=True,
    ),
    _reader(
        "detect image", ("detect", *MEMES, *JUDGE, "--out", "cards"), "images/2.png", "picture", several=True
    ),
    _reader(
        "debate --cache",
        (
            "debate",
            "{in}/memes.jsonl",
            "--url",
            "http://127.0.0.1:9/v1",
            "--model",
            "stub",
            "--limit",
            "4",
            "--cache",
            "{in}/d.sqlite",
            "--retries",
            "0",
            "-q",
            "--out",
            "d.jsonl",
        ),
        "d.sqlite",
        "database",
        "127.0.0.1",  # nobody is there to be asked what the file does not say
    ),
    _data_set("harmc", "annotations/train.jsonl", "json lines"),
    _data_set("fhm", "train.jsonl", "json lines"),
    _data_set("mami", "training.csv", "fields"),
    _data_set("multioff", "Split Dataset/Training_meme_dataset.csv", "fields"),
    _data_set("pridemm", "PrideMM.csv", "fields"),
]


def _request(draw: Any) -> dict[str, Any]:
    """A meme that says something new, with a small picture or without, with its debate or without."""
    import base64

    meme: dict[str, Any] = {"id": f"m{draw.randrange(10**9)}", "text": " ".join(draw.choices(WORDS, k=6))}
    if draw.random() < 0.3:
        pixel = bytes(draw.randrange(256) for _ in range(12 * 12 * 3))
        meme["image"] = base64.b64encode(b"P6 12 12 255\n" + pixel).decode()
    if draw.random() < 0.3:
        meme["debate"] = {
            "harmful": "it mocks the cat",
            "harmless": "it is kind",
            "verdict": draw.randrange(2),
        }
    return {"memes": [meme]}


def _known(draw: Any) -> dict[str, Any]:
    """One of a hundred memes: their debates are in the cache after a while."""
    return {"memes": [{"id": "m", "text": f"a {draw.choice(WORDS)} number {draw.randrange(10)}"}]}


SERVERS = [
    Server(
        name="meme-debate serve",
        main=MAIN,
        make=inputs,
        request=_request,
        path="/v1/detect",
        argv=("serve", *JUDGE, "--port", "0"),
    ),
    Server(
        name="meme-debate serve --url",
        main=MAIN,
        make=inputs,
        request=_known,
        path="/v1/detect",
        serve=debater,
        argv=(
            "serve",
            *JUDGE,
            "--port",
            "0",
            "--url",
            "{url}/v1",
            "--model",
            "stub",
            "--cache",
            "served.sqlite",
        ),
    ),
]
