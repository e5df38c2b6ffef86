"""Harmful memes detected with reasons: language models argue both sides, a small judge decides.

Names load their module on first use: records and ``compose`` need neither transformers nor scikit-learn.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fusion_core.lazy import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from meme_debate.audit import audit
    from meme_debate.compose import compose, parse
    from meme_debate.datasets import convert
    from meme_debate.debate import Debater
    from meme_debate.detect import Card, detect
    from meme_debate.judge import Judge, JudgeOutput
    from meme_debate.meme import Debate, Meme, load_debates, load_memes
    from meme_debate.metrics import metrics
    from meme_debate.policy import Policy
    from meme_debate.text_judge import TextJudge

__all__ = [
    "Card",
    "Debate",
    "Debater",
    "Judge",
    "JudgeOutput",
    "Meme",
    "Policy",
    "TextJudge",
    "__version__",
    "audit",
    "compose",
    "convert",
    "detect",
    "load_debates",
    "load_memes",
    "metrics",
    "parse",
]

_load, __dir__ = lazy_exports(
    __name__,
    {
        "Card": "detect",
        "Debate": "meme",
        "Debater": "debate",
        "Judge": "judge",
        "JudgeOutput": "judge",
        "Meme": "meme",
        "Policy": "policy",
        "TextJudge": "text_judge",
        "audit": "audit",
        "compose": "compose",
        "convert": "datasets",
        "detect": "detect",
        "load_debates": "meme",
        "load_memes": "meme",
        "metrics": "metrics",
        "parse": "compose",
    },
)


class _Package(ModuleType):
    """Keeps ``metrics``, ``detect`` and ``audit`` functions although submodules have these names."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in __all__ and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    _load(name)
    return globals()[name]
