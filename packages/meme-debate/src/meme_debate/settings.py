"""What a judge must carry to be used rightly: how inputs are prepared, what the classes mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fusion_core.config import Config
from fusion_core.errors import ConfigError

__all__ = ["ABLATIONS", "Ablation", "JudgeSettings"]

_LONGEST = 1_000_000  # tokens
Ablation = Literal["", "w/o MD", "w/o LLMJ", "w/o SLMJ", "w/o HlD", "w/o HfD", "w/o MF", "w/o UR"]
ABLATIONS: dict[str, str] = {
    "w/o MD": "no debate",
    "w/o LLMJ": "rationales in fixed order",
    "w/o SLMJ": "the LLM's verdict is the prediction",
    "w/o HlD": "only the harmful rationale",
    "w/o HfD": "only the harmless rationale",
    "w/o MF": "no cross-attention, the caption instead of the picture",
    "w/o UR": "only the preferred rationale",
}


@dataclass(frozen=True)
class JudgeSettings(Config):
    """How texts and pictures are prepared, and the meaning of the classes.

    Args:
        max_length: most tokens of a text, the special ones included.
        truncate: ``"balanced"`` keeps meme and caption and shares the rest between the rationales,
            ``"tail"`` cuts the end (the authors').
        normalize: ``"clip"`` = CLIP's own mean and deviation, ``"inception"`` = 0.5 (the authors').
        caption: whether the caption is read.
        image: whether the picture is looked at (a gray one stands in otherwise).
        policy: name of the policy that the labels follow.
        policy_digest: of that policy, where known.
        name: of the judge.
        ablation: the paper's name of what was left out, such as ``"w/o MD"``; empty = nothing.
        labels: names of the classes 0 and 1.

    Raises:
        ConfigError: ``max_length`` is below 16 or above a million.
    """

    max_length: int = 512
    truncate: Literal["balanced", "tail"] = "balanced"
    normalize: Literal["clip", "inception"] = "clip"
    caption: bool = True
    image: bool = True
    policy: str = "harmful"
    policy_digest: str = ""
    name: str = "judge"
    ablation: Ablation = ""
    labels: tuple[str, str] = ("harmless", "harmful")

    def __post_init__(self) -> None:
        if not 16 <= self.max_length <= _LONGEST:
            raise ConfigError(f"max_length is {self.max_length}, wanted 16 to {_LONGEST}")

    @classmethod
    def official(cls) -> JudgeSettings:
        """How the authors' code prepares texts and pictures: the end is cut, pixels are normalized by 0.5."""
        return cls(truncate="tail", normalize="inception")

    def card(self, kind: str, fusion: str | None) -> str:
        """The judge's ``card.md``."""
        facts = {
            "kind": kind,
            "fusion": fusion or "-",
            "policy": f"{self.policy} {self.policy_digest[:12]}".strip(),
            "classes": f"0 = {self.labels[0]}, 1 = {self.labels[1]}",
            "text": f"{self.max_length} tokens, truncate={self.truncate}"
            + ("" if self.caption else ", no caption"),
            "pixels": f"normalize={self.normalize}",
            "ablation": self.ablation or "none",
        }
        lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
        return (
            f"# {self.name}\n\nA judge of memes with a debate, made by meme-debate.\n\n{lines}\n\n"
            "Its score ranks and explains; a person decides. It holds for memes like those it learned from: "
            "other pictures, languages and topics need a new calibration (see `calibration.json`).\n"
        )
