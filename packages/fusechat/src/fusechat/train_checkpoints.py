"""Train the demo's checkpoints.

``python -m fusechat.train_checkpoints [OUT]`` (about a minute on one core).
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from fusechat.corpus import docstrings, split
from fusechat.tiny import bits_per_character, fit_language, train_tokenizer
from fusion_core.atomic import atomic_write
from fusion_core.checkpoint import save_tensors
from fusion_core.testing import tiny

RECIPE: dict[str, dict[str, Any]] = {
    "pivot": {"kind": "blanks", "vocabulary": 600, "hidden": 48, "texts": "tuning", "steps": 100},
    "source1": {"kind": "bytes", "vocabulary": 900, "hidden": 64, "texts": "first", "steps": 700},
    "source2": {"kind": "blanks", "vocabulary": 400, "hidden": 64, "texts": "second", "steps": 700},
}
LR = 3e-3


def main(out: Path) -> None:
    """Write tokenizers, weights, texts and what was measured."""
    torch.set_num_threads(1)
    corpus = split(docstrings())
    known = [*corpus.tuning, *corpus.first, *corpus.second]
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {}
    for name, entry in RECIPE.items():
        tokenizer = train_tokenizer(known, entry["vocabulary"], entry["kind"])
        model = tiny.llama(len(tokenizer), entry["hidden"], seed=0)
        fit_language(model, tokenizer, getattr(corpus, entry["texts"]), entry["steps"], LR, seed=0)
        state = {k: v.half() for k, v in model.state_dict().items() if k != "lm_head.weight"}
        save_tensors(out / f"{name}.safetensors", state)
        with atomic_write(out / f"{name}.tokenizer.json", "w") as file:
            file.write(tokenizer.backend_tokenizer.to_str())
        bits = bits_per_character(model, tokenizer, corpus.held_out)
        record[name] = {**entry, "vocabulary": len(tokenizer), "held_out_bits_per_character": round(bits, 4)}
        sys.stdout.write(f"{name}: {bits:.3f} bits per character\n")
    with atomic_write(out / "models.json", "w") as file:
        file.write(json.dumps(record | {"python": platform.python_version(), "lr": LR}, indent=1) + "\n")
    with atomic_write(out / "corpus.json", "w") as file:
        texts = {"held_out": corpus.held_out, "tuning": corpus.tuning}
        file.write(json.dumps(texts, ensure_ascii=False, indent=0) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "checkpoints")
