"""Train the demo's checkpoints on this Python's standard library.

``python -m logit_fusion.train_checkpoints [OUT]`` (about three minutes on one core).
"""

from __future__ import annotations

import copy
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

from fusion_core.atomic import atomic_write
from fusion_core.checkpoint import save_tensors
from fusion_core.device import threads as on_threads
from logit_fusion.corpus import DOMAINS, collect, held_out_windows, train_tokenizer
from logit_fusion.tiny import fit, llama, row_source

VOCABULARY = 512
WINDOWS, CHARACTERS = 48, 420
RECIPE: dict[str, Any] = {
    "small": {"steps": 250, "lr": 3e-3},
    "large": {"steps": 170, "lr": 2.5e-3, "runs": 2},
    "expert": {"steps": 70, "lr": 1e-3},
}


def train(seed: int = 0, *, threads: int = 1) -> tuple[dict[str, Any], Any, dict[str, list[str]]]:
    """Models by name, their tokenizer, and windows of held-out text.

    Args:
        seed: of first weights and draws.
        threads: of PyTorch while training; the former number comes back.
    """
    with on_threads(threads):
        corpus = collect()
        tokenizer = train_tokenizer(corpus.general)
        draw = row_source(corpus, tokenizer)
        models: dict[str, Any] = {}
        for name in ("small", "large"):
            recipe = RECIPE[name]
            models[name] = llama(name, len(tokenizer), seed)
            for run in range(recipe.get("runs", 1)):
                fit(
                    models[name],
                    lambda draws: draw("general", draws),
                    steps=recipe["steps"],
                    lr=recipe["lr"],
                    seed=seed * 100 + run,
                )
        for name in DOMAINS:
            expert = copy.deepcopy(models["small"])
            models[name] = fit(
                expert, lambda draws, name=name: draw(name, draws), **RECIPE["expert"], seed=seed
            )
        return models, tokenizer, held_out_windows(corpus, WINDOWS, CHARACTERS)


def main(out: Path) -> None:
    """Write weights in float16, the tokenizer, the windows, and how all were made."""
    start = time.perf_counter()
    models, tokenizer, windows = train()
    out.mkdir(parents=True, exist_ok=True)
    for name, model in models.items():
        state = {key: value.half() for key, value in model.state_dict().items() if key != "lm_head.weight"}
        save_tensors(out / f"{name}.safetensors", state)
    with atomic_write(out / "tokenizer.json", "w") as file:
        file.write(tokenizer.backend_tokenizer.to_str())
    with atomic_write(out / "windows.json", "w") as file:
        file.write(json.dumps(windows, ensure_ascii=False, indent=0) + "\n")
    record = {
        "python": platform.python_version(),
        "seconds": round(time.perf_counter() - start, 1),
        "vocabulary": len(tokenizer),
        "recipe": RECIPE,
    }
    with atomic_write(out / "models.json", "w") as file:
        file.write(json.dumps(record, indent=1) + "\n")
    sys.stdout.write(f"{out}: {record['seconds']} s\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "checkpoints")
