"""The fused judge: T5 reads meme and debate, cross-attention lets it see the picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration
from transformers.utils.generic import ModelOutput

from fusion_core.checkpoint import digest, digest_state, load_foreign, load_strict
from fusion_core.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    check_range,
    check_shape,
    reading,
)
from fusion_core.numerics import masked_mean
from fusion_core.tokenizers import load_tokenizer

from .attention import use_attention
from .calibrate import Calibration
from .fusion import CrossAttention
from .official import KEYS, text_config_of, vision_config_of
from .settings import JudgeSettings

__all__ = ["FUSIONS", "Fusion", "Judge", "JudgeOutput"]

Fusion = Literal["layerwise", "final", "none"]
FUSIONS: tuple[Fusion, ...] = ("layerwise", "final", "none")
CALIBRATION, TOKENIZER, CARD = "calibration.json", "tokenizer", "card.md"

_Seen = tuple[list[CrossAttention], Tensor]
_IMAGE: ContextVar[_Seen | None] = ContextVar("image that the encoder's blocks see", default=None)


@dataclass
class JudgeOutput(ModelOutput):
    """What the judge returns.

    Args:
        loss: mean cross-entropy, where labels were given.
        logits: (B, 2), harmless then harmful.
        pooled: (B, d) mean of the decoder's states over the unpadded tokens.
        encoder: (B, L, d) the encoder's output.
        decoder: (B, L, d) the decoder's output.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    pooled: Tensor | None = None
    encoder: Tensor | None = None
    decoder: Tensor | None = None


class _Look:
    """Forward hook of encoder block ``index``: adds what its cross-attention sees, for the next block."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, _block: nn.Module, _inputs: Any, output: Any) -> Any:
        seen = _IMAGE.get()
        if seen is None:
            return output
        blocks, image = seen
        states = output[0] if isinstance(output, tuple) else output
        states = states + blocks[self.index](states, image)
        return (states, *output[1:]) if isinstance(output, tuple) else states


_TEXT_SIZES = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_heads",
    "num_layers",
    "num_decoder_layers",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)
_VISION_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)


def _check_configs(text: Any, vision: Any) -> None:
    """Refuse what PyTorch and transformers would take, or tell of late and in other words.

    Of sizes of nothing PyTorch makes empty layers, with a warning; of far too much an overflow, or no end.
    Flags that are none pass the first versions of transformers 5, which take any words for yes.
    """
    for config, dropout in ((text, "dropout_rate"), (vision, "attention_dropout")):
        check_range(dropout, getattr(config, dropout), 0, 1)
    for config, names in ((text, _TEXT_SIZES), (vision, _VISION_SIZES)):
        for name in names:
            check_range(name, getattr(config, name), 1, 1_000 if name.endswith("layers") else 1 << 31)
        if odd := next((name for name, value in config.to_dict().items() if value != value), None):
            raise ConfigError(f"{odd} is {getattr(config, odd)}, wanted a number")
        for name, usual in vars(type(config)()).items():
            flag = isinstance(usual, bool) and not name.startswith("_")
            if flag and not isinstance(value := getattr(config, name), bool):
                raise ConfigError(f"{name} is {value!r}, wanted true or false")


class Judge(nn.Module, PyTorchModelHubMixin):
    """Reads a meme's text, both rationales and the picture, and tells how probable it is that it is harmful.

    A T5 encoder whose blocks look at the states of a frozen CLIP tower; the decoder runs over the same tokens
    (causal, unshifted), its mean over the unpadded positions goes through one linear layer. The state dict
    has the same names for every fusion: ``image_transformer``, ``text_transformer`` (with
    ``encoder.ca_block.i``), ``clf``.

    Args:
        text_config: ``transformers.T5Config``, or its dictionary.
        vision_config: ``transformers.CLIPVisionConfig``, or its dictionary.
        fusion: ``"layerwise"`` (the paper: after each encoder block), ``"final"`` (once, on the encoder's
            output, with the weights of block 0) or ``"none"`` (what the authors' released code does: the
            picture is never looked at).
        settings: how texts and pictures are prepared and what the classes mean; see :class:`JudgeSettings`.

    Raises:
        ConfigError: another fusion, settings that do not exist, or a size, a flag or a dropout that is none.

    Example:
        >>> import torch
        >>> text = dict(vocab_size=50, d_model=8, d_kv=4, num_heads=2, d_ff=16, num_layers=1)
        >>> vision = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...               image_size=8, patch_size=4)
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> Judge(text, vision).eval()(ids, torch.ones_like(ids), torch.zeros(1, 3, 8, 8)).logits.shape
        torch.Size([1, 2])
    """

    kind: ClassVar[Literal["fused"]] = "fused"

    def __init__(
        self,
        text_config: T5Config | Mapping[str, Any],
        vision_config: CLIPVisionConfig | Mapping[str, Any],
        fusion: Fusion = "layerwise",
        settings: JudgeSettings | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise ConfigError(f"fusion is {fusion!r}, wanted one of {', '.join(map(repr, FUSIONS))}")
        text = text_config if isinstance(text_config, T5Config) else T5Config(**text_config)
        vision = (
            vision_config
            if isinstance(vision_config, CLIPVisionConfig)
            else CLIPVisionConfig(**vision_config)
        )
        _check_configs(text, vision)
        text.use_cache = False
        self.fusion: Fusion = fusion
        self.settings = (
            settings if isinstance(settings, JudgeSettings) else JudgeSettings.from_dict(settings or {})
        )
        tower = CLIPVisionModel(vision)
        self.image_transformer: nn.Module = getattr(tower, "vision_model", tower)
        self.text_transformer = T5ForConditionalGeneration(text)
        use_attention(self.text_transformer)
        self.text_config: Any = text
        self.vision_config: Any = vision
        encoder: Any = self.text_transformer.encoder
        encoder.ca_block = nn.ModuleList(
            CrossAttention(text.d_model, vision.hidden_size) for _ in range(text.num_layers)
        )
        for index, block in enumerate(encoder.block):
            block.register_forward_hook(_Look(index))
        for stack in (encoder, self.text_transformer.decoder):  # one embedding, whatever lm_head is tied to
            stack.embed_tokens.weight = self.text_transformer.shared.weight
        self.clf = nn.Linear(text.d_model, 2)
        self.tokenizer: Any = None
        self.calibration = Calibration()
        self._hub_mixin_config = {  # what save_pretrained writes as config.json
            "text_config": text.to_diff_dict(),
            "vision_config": vision.to_diff_dict(),
            "fusion": fusion,
            "settings": self.settings.to_dict(),
        }

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but the tower, which is frozen."""
        super().train(mode)
        self.image_transformer.eval()
        return self

    def idle_parameters(self) -> list[nn.Parameter]:
        """Parameters that the loss does not depend on: cross-attention that the fusion leaves out, T5's head.

        They are part of the state dict whatever the fusion.
        """
        encoder: Any = self.text_transformer.encoder
        head: Any = self.text_transformer.lm_head.weight
        used = {"layerwise": len(encoder.ca_block), "final": 1, "none": 0}[self.fusion]
        idle = [weight for block in encoder.ca_block[used:] for weight in block.parameters()]
        return idle if head is self.text_transformer.shared.weight else [*idle, head]

    def image_states(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Tensor:
        """The tower's states of all patches, CLS first: what ``forward`` takes as ``image_features``.

        Raises:
            ShapeError: another size than the tower's.
        """
        side = self.vision_config.image_size
        check_shape("pixel_values", pixel_values, "batch 3 height width", height=side, width=side)
        return self.image_transformer(pixel_values=pixel_values).last_hidden_state

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"],
        attention_mask: Int[Tensor, "batch length"],
        pixel_values: Float[Tensor, "batch 3 height width"] | None = None,
        image_features: Float[Tensor, "batch patches vision"] | None = None,
        labels: Int[Tensor, " batch"] | None = None,
    ) -> JudgeOutput:
        """Logits, and the states on the way to them.

        Args:
            input_ids: (B, L) tokens of :func:`meme_debate.compose`'s text, padded on the right.
            attention_mask: (B, L) 1 = takes part; each row has a token.
            pixel_values: (B, 3, S, S) normalized pixels, or
            image_features: (B, P + 1, Dv) of :meth:`image_states`; neither is needed with ``fusion="none"``.
            labels: (B,) 1 = harmful.

        Raises:
            ShapeError: shapes that do not fit.
            InputError: a fusion needs exactly one of pixels and features.
        """
        found = check_shape("input_ids", input_ids, "batch length")
        check_shape("attention_mask", attention_mask, "batch length", **found)
        image = self._image(pixel_values, image_features)
        if image is not None:
            check_shape("image_features", image, "batch patches vision", batch=found["batch"])
            image = image.to(self.clf.weight.dtype)
        return self._read({"input_ids": input_ids}, attention_mask, image, labels)

    def from_embeddings(
        self, embeddings: Float[Tensor, "batch length width"], attention_mask: Tensor, image: Tensor | None
    ) -> JudgeOutput:
        """:meth:`forward` from the tokens' embeddings on, for gradients to the words."""
        return self._read({"inputs_embeds": embeddings}, attention_mask, image, None)

    def _read(
        self, tokens: dict[str, Tensor], attention_mask: Tensor, image: Tensor | None, labels: Tensor | None
    ) -> JudgeOutput:
        """Encoder and decoder over the same tokens, unshifted."""
        encoded = self._encode(tokens, attention_mask, image)
        decoded = self.text_transformer.decoder(
            **tokens,
            attention_mask=attention_mask,
            encoder_hidden_states=encoded,
            encoder_attention_mask=attention_mask,
            use_cache=False,
        ).last_hidden_state
        return self._output(encoded, decoded, attention_mask, labels)

    def _image(self, pixel_values: Tensor | None, image_features: Tensor | None) -> Tensor | None:
        if self.fusion == "none":
            return None
        if (pixel_values is None) == (image_features is None):
            raise InputError(
                f"fusion {self.fusion!r} takes pixel_values or image_features, got "
                + ("neither" if pixel_values is None else "both")
            )
        return image_features if pixel_values is None else self.image_states(pixel_values)

    def _encode(self, tokens: dict[str, Tensor], mask: Tensor, image: Tensor | None) -> Tensor:
        encoder: Any = self.text_transformer.encoder
        blocks = cast("list[CrossAttention]", encoder.ca_block)
        seen = None if image is None or self.fusion != "layerwise" else (blocks, image)
        token = _IMAGE.set(seen)
        try:
            states = encoder(**tokens, attention_mask=mask).last_hidden_state
        finally:
            _IMAGE.reset(token)
        if self.fusion == "final" and image is not None:
            states = states + blocks[0](states, image)
        return states

    def _output(self, encoded: Tensor, decoded: Tensor, mask: Tensor, labels: Tensor | None) -> JudgeOutput:
        pooled = masked_mean(decoded, mask.bool()[..., None].expand_as(decoded), 1)
        logits = self.clf(pooled)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return JudgeOutput(loss=loss, logits=logits, pooled=pooled, encoder=encoded, decoder=decoded)

    def digest(self) -> str:
        """Of weights, configuration and calibration: which judge it was."""
        return digest(
            digest_state(self.state_dict()), self.fusion, self.settings.to_dict(), self.calibration.to_dict()
        )

    # Files: config.json and model.safetensors are the mixin's, the rest is written beside them.

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        with (save_directory / CALIBRATION).open("w", encoding="utf-8") as file:
            json.dump(self.calibration.to_dict(), file, indent=1)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory / TOKENIZER)
        (save_directory / CARD).write_text(self.settings.card("fused", self.fusion), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Read a judge's folder, or one from the Hugging Face hub, with tokenizer and calibration.

        Args:
            pretrained_model_name_or_path: what ``save_pretrained`` or :func:`train_judge` wrote.
            **options: of ``PyTorchModelHubMixin.from_pretrained``.

        Raises:
            CheckpointError: no judge there, or a damaged one.
        """
        name = pretrained_model_name_or_path
        with reading(name, "holds no fused judge", CheckpointError):
            return super().from_pretrained(str(name), **options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        judge = super()._from_pretrained(model_id=model_id, **options)
        folder = Path(model_id)
        if (folder / CALIBRATION).is_file():
            judge.calibration = Calibration.load(folder / CALIBRATION)
        if (folder / TOKENIZER).is_dir():
            with reading(folder / TOKENIZER, error=CheckpointError):
                judge.tokenizer = load_tokenizer(folder / TOKENIZER, local_files_only=True)
        return judge.eval()

    @classmethod
    def from_parts(
        cls,
        text: str | Path,
        vision: str | Path,
        fusion: Fusion = "layerwise",
        settings: JudgeSettings | Mapping[str, Any] | None = None,
    ) -> Self:
        """A judge to train, of a pretrained T5 and a pretrained CLIP; cross-attention and head are new.

        Args:
            text: name or folder of a T5 with its tokenizer, such as ``"google/flan-t5-base"``.
            vision: name or folder of a CLIP, such as ``"openai/clip-vit-base-patch32"``.
            fusion: see the class.
            settings: see the class.

        Raises:
            CheckpointError: one of them cannot be loaded.
        """
        with reading(f"text {text} or vision {vision}", "cannot be loaded", CheckpointError):
            _check_configs(T5Config.from_pretrained(text), CLIPVisionConfig.from_pretrained(vision))
        with reading(f"text {text}", "cannot be loaded", CheckpointError):
            t5 = T5ForConditionalGeneration.from_pretrained(text)
            tokenizer = load_tokenizer(text)
        with reading(f"vision {vision}", "cannot be loaded", CheckpointError):
            clip = CLIPVisionModel.from_pretrained(vision)
        judge = cls(t5.config, clip.config, fusion, settings)
        missing, _ = judge.text_transformer.load_state_dict(t5.state_dict(), strict=False)
        if other := [key for key in missing if ".ca_block." not in key]:
            raise CheckpointError(f"text {text} lacks {', '.join(other[:5])}")
        load_strict(judge.image_transformer, getattr(clip, "vision_model", clip).state_dict())
        judge.tokenizer = tokenizer
        return judge

    @classmethod
    def load_official(
        cls,
        path: str | Path,
        *,
        fusion: Fusion = "none",
        text_config: T5Config | Mapping[str, Any] | None = None,
        vision_config: CLIPVisionConfig | Mapping[str, Any] | None = None,
    ) -> Self:
        """Read a Lightning checkpoint of the authors' code; tensors only, none of its objects are loaded.

        Args:
            path: the ``.ckpt`` file.
            fusion: the released code never looks at the picture, hence ``"none"``.
            text_config: of T5; None reads the sizes off the tensors.
            vision_config: of CLIP; None reads the sizes off the tensors (heads of 64, as CLIP has them).

        Returns:
            The judge in eval mode. Pictures are normalized as the released code does it (mean and deviation
            0.5); it has no tokenizer, set ``judge.tokenizer`` to that of ``google/flan-t5-base``.

        Raises:
            CheckpointError: damaged, unsafe, or tensors that are missing, too many or of another shape.
        """
        state = KEYS.apply(load_foreign(path))
        shared = state.get("text_transformer.shared.weight")
        if shared is None:
            raise CheckpointError(f"{path} has no text_transformer.shared.weight; wanted the authors' judge")
        text = text_config_of(state) if text_config is None else text_config
        vision = vision_config_of(state) if vision_config is None else vision_config
        settings = JudgeSettings.official()
        judge = cls(text, vision, fusion, settings)
        for name in ("encoder.embed_tokens", "decoder.embed_tokens"):
            state[f"text_transformer.{name}.weight"] = shared
        state.setdefault("text_transformer.lm_head.weight", shared)
        load_strict(judge, state)
        return judge.eval()
