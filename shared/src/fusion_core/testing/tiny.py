"""Language models small enough to train in seconds: a tokenizer, a Llama, and a plain training loop.

They need transformers, which the packages that use them bring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fusion_core.seeding import generator

SPECIAL = ("<unk>", "<s>", "</s>")


def bpe(
    texts: Sequence[str], size: int, kind: Literal["bytes", "blanks"] = "bytes", digits: bool = False
) -> Any:
    """A byte-pair tokenizer learned from texts.

    Args:
        texts: to learn from.
        size: of the vocabulary, its three special tokens ``<unk> <s> </s>`` (ids 0, 1, 2) included.
        kind: ``bytes`` works on bytes, blanks included; ``blanks`` marks words by ``\u2581``.
        digits: every digit is a token of its own.

    Returns:
        A ``PreTrainedTokenizerFast`` without a template; ``</s>`` pads.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(models.BPE(unk_token=None if kind == "bytes" else SPECIAL[0]))
    options: dict[str, Any] = {"vocab_size": size, "special_tokens": list(SPECIAL), "show_progress": False}
    if kind == "bytes":
        words: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    else:
        words, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    single = pre_tokenizers.Digits(individual_digits=True)
    order = [single, words] if kind == "bytes" else [words, single]
    made.pre_tokenizer = pre_tokenizers.Sequence(order) if digits else words
    made.train_from_iterator(list(texts), trainers.BpeTrainer(**options))
    names = {
        "unk_token": SPECIAL[0],
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[2],
    }
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def llama(
    vocabulary: int,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    intermediate: int | None = None,
    *,
    seed: int = 0,
    positions: int = 512,
    **config: Any,
) -> Any:
    """A ``LlamaForCausalLM`` with tied tables and random weights that depend on the seed only.

    Args:
        vocabulary: number of tokens; 1 begins, 2 ends.
        hidden: width.
        layers: number of blocks.
        heads: of attention, keys and values included.
        intermediate: width of the gated perceptron; None = 3 * hidden.
        seed: of the weights; the global generators stay as they were.
        positions: longest sequence.
        **config: more of ``LlamaConfig``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden if intermediate is None else intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()


def fit(
    model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float, weight_decay: float = 0.0
) -> nn.Module:
    """Train in place: AdamW, one cycle with a tenth of warm-up, gradients clipped at 1.

    Args:
        model: left in eval mode.
        loss: called once a step, draws its own batch.
        steps: optimizer steps.
        lr: the cycle's peak.
        weight_decay: AdamW's.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def windows(ids: Tensor, length: int, batch_size: int, draws: torch.Generator) -> Tensor:
    """Random rows out of one long text.

    Args:
        ids: token ids ``(tokens,)``.
        length: of a row.
        batch_size: number of rows.
        draws: where they start.

    Returns:
        ``(batch_size, length)``.
    """
    starts = torch.randint(0, len(ids) - length + 1, (batch_size,), generator=draws)
    return ids[starts[:, None] + torch.arange(length)]


def fit_causal(
    model: Any,
    ids: Tensor,
    steps: int,
    lr: float,
    seed: int = 0,
    *,
    length: int = 64,
    batch_size: int = 16,
    weight_decay: float = 0.0,
) -> Any:
    """Next-token training on random windows of one long text; see :func:`fit`.

    Args:
        model: a causal language model of transformers.
        ids: token ids ``(tokens,)``.
        steps: optimizer steps.
        lr: the cycle's peak.
        seed: of the windows.
        length: tokens of a window.
        batch_size: windows a step.
        weight_decay: AdamW's.
    """
    draws = generator(seed, "windows")

    def loss() -> Tensor:
        rows = windows(ids, length, batch_size, draws)
        return model(input_ids=rows, labels=rows).loss

    return fit(model, loss, steps, lr, weight_decay)
