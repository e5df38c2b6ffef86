"""The specification of Hugging Face vision transformers (ViT, DeiT), by the names of transformers 4 and 5."""

from collections.abc import Mapping, Sequence
from typing import Any

from ot_fusion.errors import SpecError
from ot_fusion.groups import Full, Heads
from ot_fusion.spec.builder import SpecBuilder
from ot_fusion.spec.types import AlignmentSpec

__all__ = ["VIT_4_TO_5", "vit_spec"]

# Where the layers of a block stand, by major version of transformers.
_NAMES = {
    5: {
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "o": "attention.o_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    },
    4: {
        "q": "attention.attention.query",
        "k": "attention.attention.key",
        "v": "attention.attention.value",
        "o": "attention.output.dense",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
    },
}

# Rules for fusion_core.checkpoint.KeyMap: names of transformers 4 -> 5.
VIT_4_TO_5 = [(r"^(.*)encoder\.layer\.(\d+)\.layernorm_(before|after)\.", r"\1layers.\2.layernorm_\3.")] + [
    (
        rf"^(.*)encoder\.layer\.(\d+)\.{_NAMES[4][part]}\.".replace(
            "attention.attention", r"attention\.attention"
        ),
        rf"\1layers.\2.{_NAMES[5][part]}.",
    )
    for part in _NAMES[4]
]


def vit_spec(config: Any, keys: Sequence[str]) -> AlignmentSpec:
    """The specification of a ViT.

    Args:
        config: with ``hidden_size``, ``num_attention_heads``, ``intermediate_size``, ``num_hidden_layers``.
        keys: the model's tensors, by which its version of names and its classifier are found.

    Raises:
        SpecError: no vision transformer of these names.
    """
    known = set(keys)
    prefix = (
        "vit."
        if any(key.startswith("vit.") for key in known)
        else "deit."
        if any(key.startswith("deit.") for key in known)
        else ""
    )
    table = f"{prefix}embeddings.position_embeddings"
    if table not in known:
        raise SpecError(f"the model has no {table}, so it is no Hugging Face ViT; use infer_spec")
    version = 5 if any(key.startswith(f"{prefix}layers.") for key in known) else 4
    names = _NAMES[version]
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    builder = SpecBuilder("vit", keys)
    stream = builder.space("stream", Full(width))
    builder.embed(f"{prefix}embeddings.cls_token", "class_token", stream, rows=2)
    tokens = ["class_token"]
    if f"{prefix}embeddings.distillation_token" in known:
        tokens.append(
            builder.embed(f"{prefix}embeddings.distillation_token", "distillation_token", stream, rows=2)
        )
    builder.embed(table, "positions", stream, rows=2)
    patch = f"{prefix}embeddings.patch_embeddings.projection"
    builder.linear(patch, None, "patch", stream, kernel=2)
    node = builder.step("add", "embedded", "positions", "patch")
    node = builder.step("join", "stream.0", node, *tokens, hook=f"{prefix}embeddings")
    for number in range(int(config.num_hidden_layers)):
        root = f"{prefix}layers.{number}" if version == 5 else f"{prefix}encoder.layer.{number}"
        block = f"blocks.{number}"
        group = Heads(heads, 1, width // heads)
        space = builder.space(f"{block}.heads", group)
        entry = builder.norm(f"{root}.layernorm_before", node, f"{block}.norm1")
        for view in ("q", "k", "v"):
            builder.linear(f"{root}.{names[view]}", entry, f"{block}.{view}", space, view=view)
        context = builder.step(
            "attention", f"{block}.context", *(f"{block}.{v}" for v in ("q", "k", "v")), space=space, view="o"
        )
        branch = builder.linear(f"{root}.{names['o']}", context, f"{block}.o", stream)
        middle = builder.step("add", f"{block}.middle", node, branch)
        inner = builder.norm(f"{root}.layernorm_after", middle, f"{block}.norm2")
        mlp = builder.space(f"{block}.mlp", Full(int(config.intermediate_size)))
        inner = builder.linear(f"{root}.{names['fc1']}", inner, f"{block}.fc1", mlp)
        inner = builder.step("elementwise", f"{block}.act", inner)
        branch = builder.linear(f"{root}.{names['fc2']}", inner, f"{block}.fc2", stream)
        node = builder.step("add", f"{block}.out", middle, branch, hook=root)
    last = f"blocks.{int(config.num_hidden_layers) - 1}"
    node = builder.norm(f"{prefix}layernorm", node, "norm")
    if f"{prefix}pooler.dense.weight" in known:
        pool = builder.space("pooler", Full(width))
        builder.linear(f"{prefix}pooler.dense", node, "pooler", pool)
    for head in ("classifier", "cls_classifier", "distillation_classifier"):
        if f"{head}.weight" in known:
            builder.notes["cls_nodes"] = f"{last}.o {last}.fc1 {last}.fc2"
            builder.linear(head, node, head, None)
    return builder.build()


def vit_names(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict by the names of transformers 5."""
    from fusion_core.checkpoint import KeyMap

    return KeyMap(VIT_4_TO_5, strip=()).apply(dict(state))
