"""Harmful memes detected with reasons: language models argue both sides, a small judge decides.

Names load their module on first use: records and ``compose`` need neither transformers nor scikit-learn.
"""

from typing import TYPE_CHECKING

from fusion_core.lazy import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from meme_debate.auditing import audit
    from meme_debate.composing import compose, parse
    from meme_debate.datasets import convert
    from meme_debate.debate import Debater
    from meme_debate.detection import Card, detect
    from meme_debate.judge import Judge, JudgeOutput
    from meme_debate.meme import Debate, Meme, load_debates, load_memes
    from meme_debate.policy import Policy
    from meme_debate.scoring import metrics
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

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Card": "detection",
        "Debate": "meme",
        "Debater": "debate",
        "Judge": "judge",
        "JudgeOutput": "judge",
        "Meme": "meme",
        "Policy": "policy",
        "TextJudge": "text_judge",
        "audit": "auditing",
        "compose": "composing",
        "convert": "datasets",
        "detect": "detection",
        "load_debates": "meme",
        "load_memes": "meme",
        "metrics": "scoring",
        "parse": "composing",
    },
)
