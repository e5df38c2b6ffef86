"""Specifications of Hugging Face text encoders with norms after the sums: BERT, RoBERTa, DistilBERT."""

from collections.abc import Sequence
from typing import Any

from ot_fusion.errors import SpecError
from ot_fusion.groups import Full, Heads
from ot_fusion.spec.builder import SpecBuilder
from ot_fusion.spec.types import AlignmentSpec

__all__ = ["bert_spec", "distilbert_spec"]

_BERT = {
    "layers": "encoder.layer",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "norm2": "output.LayerNorm",
}
_DISTIL = {
    "layers": "transformer.layer",
    "q": "attention.q_lin",
    "k": "attention.k_lin",
    "v": "attention.v_lin",
    "o": "attention.out_lin",
    "norm1": "sa_layer_norm",
    "fc1": "ffn.lin1",
    "fc2": "ffn.lin2",
    "norm2": "output_layer_norm",
}


def _prefix(keys: Sequence[str], names: Sequence[str]) -> str:
    found = next((f"{n}." for n in names if any(key.startswith(f"{n}.embeddings.") for key in keys)), "")
    if f"{found}embeddings.word_embeddings.weight" not in set(keys):
        raise SpecError(f"the model has no {found}embeddings.word_embeddings; use infer_spec")
    return found


def _encoder(
    builder: SpecBuilder, prefix: str, names: dict[str, str], depth: int, width: int, heads: int, inner: int
) -> str:
    """Embeddings and blocks; the name of the last activation."""
    stream = builder.space("stream", Full(width))
    root = f"{prefix}embeddings."
    node = builder.embed(f"{root}word_embeddings.weight", "words", stream, hook=f"{root}word_embeddings")
    for table in ("position_embeddings", "token_type_embeddings"):
        if f"{root}{table}.weight" in builder.keys:
            name = table.partition("_")[0]
            other = builder.embed(f"{root}{table}.weight", f"{name}s", stream, hook=f"{root}{table}")
            node = builder.step("add", f"embedded.{name}", node, other)
    for buffer in ("position_ids", "token_type_ids"):
        if f"{root}{buffer}" in builder.keys:
            builder.copied.append(f"{root}{buffer}")
    node = builder.norm(f"{root}LayerNorm", node, "stream.0", hook=f"{root}LayerNorm")
    for number in range(depth):
        path, block = f"{prefix}{names['layers']}.{number}", f"blocks.{number}"
        space = builder.space(f"{block}.heads", Heads(heads, 1, width // heads))
        parts = [f"{block}.{view}" for view in ("q", "k", "v")]
        for view, part in zip(("q", "k", "v"), parts, strict=True):
            builder.linear(f"{path}.{names[view]}", node, part, space, view=view)
        context = builder.step("attention", f"{block}.context", *parts, space=space, view="o")
        branch = builder.linear(f"{path}.{names['o']}", context, f"{block}.o", stream)
        middle = builder.step("add", f"{block}.middle", node, branch)
        norm1 = f"{path}.{names['norm1']}"
        middle = builder.norm(norm1, middle, f"{block}.norm1", hook=norm1)
        mlp = builder.space(f"{block}.mlp", Full(inner))
        hidden = builder.linear(f"{path}.{names['fc1']}", middle, f"{block}.fc1", mlp)
        hidden = builder.step("elementwise", f"{block}.act", hidden)
        branch = builder.linear(f"{path}.{names['fc2']}", hidden, f"{block}.fc2", stream)
        summed = builder.step("add", f"{block}.sum", middle, branch)
        norm2 = f"{path}.{names['norm2']}"
        node = builder.norm(norm2, summed, f"{block}.out", hook=norm2)
    builder.notes["post_norm"] = "yes"
    return node


def _masked_head(builder: SpecBuilder, node: str, dense: str, norm: str, out: str, bias: str) -> None:
    """Transform, norm and the output table, which is most often the word table itself."""
    width = builder.spaces["stream"].group.views()[""]
    space = builder.space("transform", Full(width))
    node = builder.linear(dense, node, "transform", space)
    node = builder.step("elementwise", "transform.act", node)
    node = builder.norm(norm, node, "transform.norm")
    builder.linear(out, node, "logits", None)
    if bias and bias in builder.keys and bias != f"{out}.bias":
        builder.tied.append((f"{out}.bias", bias))


def bert_spec(config: Any, keys: Sequence[str]) -> AlignmentSpec:
    """The specification of BERT and RoBERTa with any head of transformers, or none.

    The word table of a masked-language head is tied to the input table only where the transform keeps the
    stream's coordinates; BERT's transform has coordinates of its own, so tied tables tie the two spaces.

    Args:
        config: with ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``, ``intermediate_size``.
        keys: the model's tensors.

    Raises:
        SpecError: other names than transformers gives.
    """
    prefix = _prefix(keys, ("bert", "roberta"))
    builder = SpecBuilder(str(config.model_type), keys)
    depth, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    node = _encoder(
        builder, prefix, _BERT, depth, int(config.hidden_size), heads, int(config.intermediate_size)
    )
    last = f"blocks.{depth - 1}"
    head = next((name for name in ("classifier", "qa_outputs") if f"{name}.weight" in builder.keys), None)
    if f"{prefix}pooler.dense.weight" in builder.keys:
        pool = builder.space("pooler", Full(int(config.hidden_size))) if head else None
        pooled = builder.linear(f"{prefix}pooler.dense", node, "pooler", pool)
        if head:
            builder.notes["cls_nodes"] = f"{last}.o {last}.fc1 {last}.fc2"
            node = builder.step("elementwise", "pooler.act", pooled)
    if "classifier.dense.weight" in builder.keys:  # RoBERTa's classification head
        space = builder.space("classifier.hidden", Full(int(config.hidden_size)))
        node = builder.linear("classifier.dense", node, "classifier.dense", space)
        node = builder.step("elementwise", "classifier.act", node)
        builder.linear("classifier.out_proj", node, "logits", None)
    elif head:
        builder.linear(head, node, "logits", None)
    table = f"{prefix}embeddings.word_embeddings.weight"
    if "cls.predictions.transform.dense.weight" in builder.keys:
        root = "cls.predictions"
        _tied_head(
            builder,
            config,
            node,
            f"{root}.transform.dense",
            f"{root}.transform.LayerNorm",
            f"{root}.decoder",
            table,
            f"{root}.bias",
        )
    elif "lm_head.dense.weight" in builder.keys:
        _tied_head(
            builder,
            config,
            node,
            "lm_head.dense",
            "lm_head.layer_norm",
            "lm_head.decoder",
            table,
            "lm_head.bias",
        )
    return builder.build()


def _tied_head(
    builder: SpecBuilder, config: Any, node: str, dense: str, norm: str, out: str, table: str, bias: str
) -> None:
    if not getattr(config, "tie_word_embeddings", True):
        _masked_head(builder, node, dense, norm, out, bias)
        return
    # The output table is the word table, so what it reads lies on the stream's own space.
    node = builder.linear(dense, node, "transform", "stream")
    node = builder.step("elementwise", "transform.act", node)
    builder.norm(norm, node, "transform.norm")
    builder.tied.append((table, f"{out}.weight"))
    _fixed_bias(builder, f"{out}.bias")
    if bias in builder.keys and bias != f"{out}.bias":
        builder.tied.append((f"{out}.bias", bias))


def _fixed_bias(builder: SpecBuilder, key: str) -> None:
    from ot_fusion.spec.types import Op

    if key in builder.keys:
        builder.tensor(key, None)
        builder.ops.append(
            Op("norm", "logits.bias", ("transform.norm",), None, key, space=None, view="fixed")
        )


def distilbert_spec(config: Any, keys: Sequence[str]) -> AlignmentSpec:
    """The specification of DistilBERT with any head of transformers, or none.

    Args:
        config: with ``dim``, ``n_layers``, ``n_heads``, ``hidden_dim``.
        keys: the model's tensors.

    Raises:
        SpecError: other names than transformers gives.
    """
    prefix = _prefix(keys, ("distilbert",))
    builder = SpecBuilder("distilbert", keys)
    width = int(config.dim)
    node = _encoder(
        builder, prefix, _DISTIL, int(config.n_layers), width, int(config.n_heads), int(config.hidden_dim)
    )
    if "pre_classifier.weight" in builder.keys:
        space = builder.space("pre_classifier", Full(width))
        node = builder.linear("pre_classifier", node, "pre_classifier", space)
        node = builder.step("elementwise", "pre_classifier.act", node)
    for head in ("classifier", "qa_outputs"):
        if f"{head}.weight" in builder.keys:
            builder.linear(head, node, "logits", None)
    if "vocab_transform.weight" in builder.keys:
        table = f"{prefix}embeddings.word_embeddings.weight"
        _tied_head(builder, config, node, "vocab_transform", "vocab_layer_norm", "vocab_projector", table, "")
    return builder.build()
