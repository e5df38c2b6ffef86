"""The authors' Lightning checkpoint: which tensor is which, and how large the network is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fusion_core.checkpoint import KeyMap
from fusion_core.errors import CheckpointError

__all__ = ["KEYS", "text_config_of", "vision_config_of"]

KEYS = KeyMap(
    [
        (r"^(?!(image_transformer|text_transformer|clf)\.)", None),  # buffers of metrics, optimizers, losses
        (r"position_ids$", None),
        (r"^text_transformer\.(encoder|decoder)\.embed_tokens\.", None),  # copies of shared
        (r"^image_transformer\.vision_model\.", "image_transformer."),  # transformers 4's level
    ],
    strip=("module.", "_orig_mod.", "model."),
)
_HEAD = 64


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(
            f"the checkpoint lacks {key}; give text_config and vision_config, or its source"
        )
    return tuple(state[key].shape)


def _layers(state: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1


def text_config_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of ``T5Config`` that the tensors' shapes tell.

    Raises:
        CheckpointError: a tensor that would tell is missing.
    """
    base = "text_transformer."
    attention = f"{base}encoder.block.0.layer.0.SelfAttention."
    vocabulary, width = _shape(state, f"{base}shared.weight")
    buckets, heads = _shape(state, f"{attention}relative_attention_bias.weight")
    dense = f"{base}encoder.block.0.layer.1.DenseReluDense."
    gated = f"{dense}wi_0.weight" in state
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "d_kv": _shape(state, f"{attention}q.weight")[0] // heads,
        "d_ff": _shape(state, f"{dense}{'wi_0' if gated else 'wi'}.weight")[0],
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "num_layers": _layers(state, r"text_transformer\.encoder\.block\.(\d+)\."),
        "num_decoder_layers": _layers(state, r"text_transformer\.decoder\.block\.(\d+)\."),
        "tie_word_embeddings": f"{base}lm_head.weight" not in state,
    }


def vision_config_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of ``CLIPVisionConfig`` that the tensors' shapes tell, with heads of width 64.

    Raises:
        CheckpointError: a tensor that would tell is missing.
    """
    base = "image_transformer."
    hidden, _, patch, _ = _shape(state, f"{base}embeddings.patch_embedding.weight")
    patches = _shape(state, f"{base}embeddings.position_embedding.weight")[0] - 1
    return {
        "hidden_size": hidden,
        "intermediate_size": _shape(state, f"{base}encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _layers(state, r"image_transformer\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, hidden // _HEAD),
        "patch_size": patch,
        "image_size": patch * round(patches**0.5),
    }
