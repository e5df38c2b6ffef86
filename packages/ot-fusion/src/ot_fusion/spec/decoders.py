"""Specifications of Hugging Face decoders.

GPT-2, and the Llama family with grouped queries, rotary positions and norms.
"""

from collections.abc import Sequence
from typing import Any

from ot_fusion.errors import SpecError
from ot_fusion.groups import Full, Heads
from ot_fusion.spec.builder import SpecBuilder
from ot_fusion.spec.types import AlignmentSpec

__all__ = ["gpt2_spec", "llama_spec"]


def _head(builder: SpecBuilder, config: Any, node: str, table: str) -> None:
    """The output table: the input table itself where they are tied."""
    if "score.weight" in builder.keys:
        builder.linear("score", node, "logits", None)
    if "lm_head.weight" not in builder.keys:
        return
    if getattr(config, "tie_word_embeddings", True):
        builder.tied.append((table, "lm_head.weight"))
    else:
        builder.linear("lm_head", node, "logits", None)


def gpt2_spec(config: Any, keys: Sequence[str]) -> AlignmentSpec:
    """The specification of GPT-2.

    Transposed layers, queries, keys and values packed in one, learned positions.

    Args:
        config: with ``n_embd``, ``n_layer``, ``n_head``, ``n_inner``.
        keys: the model's tensors.

    Raises:
        SpecError: other names than transformers gives, or cross attention.
    """
    known = set(keys)
    prefix = "transformer." if "transformer.wte.weight" in known else ""
    if f"{prefix}wte.weight" not in known or any(".crossattention." in key for key in known):
        raise SpecError("the model has no wte table, or has cross attention; use infer_spec")
    width, heads = int(config.n_embd), int(config.n_head)
    inner = int(getattr(config, "n_inner", None) or 4 * width)
    builder = SpecBuilder("gpt2", keys)
    builder.notes["decoder"] = "yes"
    stream = builder.space("stream", Full(width))
    builder.embed(f"{prefix}wte.weight", "words", stream, hook=f"{prefix}wte")
    builder.embed(f"{prefix}wpe.weight", "positions", stream, hook=f"{prefix}wpe")
    node = builder.step("add", "stream.0", "positions", "words")
    for number in range(int(config.n_layer)):
        path, block = f"{prefix}h.{number}", f"blocks.{number}"
        builder.copied += [key for key in keys if key in (f"{path}.attn.bias", f"{path}.attn.masked_bias")]
        space = builder.space(f"{block}.heads", Heads(heads, 1, width // heads))
        entry = builder.norm(f"{path}.ln_1", node, f"{block}.norm1")
        parts = [(f"{block}.{view}", space, view, width) for view in ("q", "k", "v")]
        builder.packed(f"{path}.attn.c_attn", entry, parts)
        context = builder.step(
            "attention", f"{block}.context", *(part[0] for part in parts), space=space, view="o"
        )
        builder.packed(f"{path}.attn.c_proj", context, [(f"{block}.o", stream, "", width)])
        middle = builder.step("add", f"{block}.middle", node, f"{block}.o")
        entry = builder.norm(f"{path}.ln_2", middle, f"{block}.norm2")
        mlp = builder.space(f"{block}.mlp", Full(inner))
        builder.packed(f"{path}.mlp.c_fc", entry, [(f"{block}.fc1", mlp, "", inner)])
        hidden = builder.step("elementwise", f"{block}.act", f"{block}.fc1")
        builder.packed(f"{path}.mlp.c_proj", hidden, [(f"{block}.fc2", stream, "", width)])
        node = builder.step("add", f"{block}.out", middle, f"{block}.fc2", hook=path)
    node = builder.norm(f"{prefix}ln_f", node, "norm")
    _head(builder, config, node, f"{prefix}wte.weight")
    return builder.build()


def llama_spec(config: Any, keys: Sequence[str]) -> AlignmentSpec:
    """The specification of Llama, Mistral, Qwen2, Qwen3 and Gemma.

    Grouped queries, rotary positions, gated MLP.

    Args:
        config: with ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``, ``num_key_value_heads``,
            ``intermediate_size`` and, where it has them, ``head_dim`` and ``partial_rotary_factor``.
        keys: the model's tensors.

    Raises:
        SpecError: other names than transformers gives.
    """
    known = set(keys)
    prefix = "model." if "model.embed_tokens.weight" in known else ""
    if f"{prefix}embed_tokens.weight" not in known:
        raise SpecError("the model has no embed_tokens table; use infer_spec")
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    kv = int(getattr(config, "num_key_value_heads", None) or heads)
    dim = int(getattr(config, "head_dim", None) or width // heads)
    turning = int(dim * _partial(config))
    builder = SpecBuilder(str(config.model_type), keys)
    builder.notes["decoder"] = "yes"
    stream = builder.space("stream", Full(width))
    node = builder.embed(f"{prefix}embed_tokens.weight", "stream.0", stream, hook=f"{prefix}embed_tokens")
    for number in range(int(config.num_hidden_layers)):
        path, block = f"{prefix}layers.{number}", f"blocks.{number}"
        normed = f"{path}.self_attn.q_norm.weight" in known
        group = Heads(kv, heads // kv, dim, qk="rotary", rotary=turning, norm="head" if normed else "none")
        space = builder.space(f"{block}.heads", group)
        entry = builder.norm(f"{path}.input_layernorm", node, f"{block}.norm1")
        parts = [f"{block}.{view}" for view in ("q", "k", "v")]
        for view, part in zip(("q", "k", "v"), parts, strict=True):
            builder.linear(f"{path}.self_attn.{view}_proj", entry, part, space, view=view)
        if normed:
            for view in ("q", "k"):
                builder.norm(
                    f"{path}.self_attn.{view}_norm", f"{block}.{view}", f"{block}.{view}_norm", view="qk_norm"
                )
        context = builder.step("attention", f"{block}.context", *parts, space=space, view="o")
        branch = builder.linear(f"{path}.self_attn.o_proj", context, f"{block}.o", stream)
        middle = builder.step("add", f"{block}.middle", node, branch)
        entry = builder.norm(f"{path}.post_attention_layernorm", middle, f"{block}.norm2")
        mlp = builder.space(f"{block}.mlp", Full(int(config.intermediate_size)))
        for name in ("gate", "up"):
            builder.linear(f"{path}.mlp.{name}_proj", entry, f"{block}.{name}", mlp)
        hidden = builder.step("gate", f"{block}.act", f"{block}.gate", f"{block}.up")
        branch = builder.linear(f"{path}.mlp.down_proj", hidden, f"{block}.down", stream)
        node = builder.step("add", f"{block}.out", middle, branch, hook=path)
    node = builder.norm(f"{prefix}norm", node, "norm")
    _head(builder, config, node, f"{prefix}embed_tokens.weight")
    return builder.build()


def _partial(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    found = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
    return float(found or getattr(config, "partial_rotary_factor", None) or 1.0)
