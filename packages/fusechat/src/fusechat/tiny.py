"""The demo's tiny models: tokenizers, Llamas, training and bits per character."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusion_core.checkpoint import load_tensors
from fusion_core.seeding import generator

__all__ = [
    "bits_per_character",
    "fit",
    "language_batches",
    "llama",
    "load_model",
    "load_tokenizer",
    "train_tokenizer",
]

LENGTH, BATCH = 80, 8


def train_tokenizer(texts: Sequence[str], size: int, kind: str) -> Any:
    """A byte-pair tokenizer: ``bytes`` keeps blanks as part of tokens by bytes, ``blanks`` marks words.

    Args:
        texts: to learn from.
        size: of the vocabulary.
        kind: ``bytes`` or ``blanks``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["<unk>", "<s>", "</s>"]
    made: Any = Tokenizer(models.BPE(unk_token=None if kind == "bytes" else special[0]))
    options: dict[str, Any] = {"vocab_size": size, "special_tokens": special, "show_progress": False}
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    else:
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(list(texts), trainers.BpeTrainer(**options))
    pieces: Any = [("<s>", 1), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=pieces)
    return _wrapped(made)


def _wrapped(made: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")  # noqa: C408, S106
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def load_tokenizer(name: str) -> Any:
    """A tokenizer that ships with the package: ``pivot``, ``source1`` or ``source2``."""
    from tokenizers import Tokenizer

    return _wrapped(Tokenizer.from_str((_shipped() / f"{name}.tokenizer.json").read_text("utf-8")))


def _shipped() -> Any:
    return files("fusechat") / "checkpoints"


def llama(vocabulary: int, hidden: int, seed: int = 0) -> Any:
    """A Llama of two layers and four heads with tied tables."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
        return LlamaForCausalLM(config)


def load_model(name: str) -> Any:
    """A model that ships with the package: ``pivot``, ``source1`` or ``source2``."""
    entry = json.loads((_shipped() / "models.json").read_text("utf-8"))[name]
    model = llama(entry["vocabulary"], entry["hidden"])
    state = load_tensors(Path(str(_shipped() / f"{name}.safetensors")))
    model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    model.tie_weights()
    return model.eval()


def language_batches(tokenizer: Any, texts: Sequence[str], draws: torch.Generator) -> Callable[[], Tensor]:
    """Random rows of 80 tokens out of the texts laid end to end."""
    ids = torch.tensor([i for text in texts for i in tokenizer(text)["input_ids"]])

    def batch() -> Tensor:
        starts = torch.randint(0, len(ids) - LENGTH, (BATCH,), generator=draws)
        return ids[starts[:, None] + torch.arange(LENGTH)]

    return batch


def fit(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float) -> nn.Module:
    """Train in place: AdamW without decay, one cycle with a tenth of warm-up, gradients clipped at 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def fit_language(model: Any, tokenizer: Any, texts: Sequence[str], steps: int, lr: float, seed: int) -> Any:
    """Next-token training on texts."""
    batch = language_batches(tokenizer, texts, generator(seed, "language"))

    def loss() -> Tensor:
        rows = batch()
        return model(input_ids=rows, labels=rows).loss

    return fit(model, loss, steps, lr)


def bits_per_character(model: Any, tokenizer: Any, texts: Sequence[str], most: int = 512) -> float:
    """Negative log-likelihood of whole texts in bits per character: comparable between tokenizers."""
    nats, characters = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(texts), 16):
            rows = [tokenizer(text)["input_ids"][:most] for text in texts[start : start + 16]]
            width = max(map(len, rows))
            ids = torch.tensor([row + [2] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            log_probs = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
            found = log_probs.gather(-1, ids[:, 1:, None])[..., 0]
            nats -= float((found * mask[:, 1:]).sum())
            characters += sum(len(text) for text in texts[start : start + 16])
    return nats / characters / math.log(2)
