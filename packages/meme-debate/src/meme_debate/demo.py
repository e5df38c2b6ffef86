"""The demo: stand-in memes, a scripted debater behind a real server, and every judge in one table."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fusion_core.demo import Demo, Method
from fusion_core.errors import require_extra
from fusion_core.lazy import collector_paused

__all__ = ["demo", "method"]

PAPER = (
    "Hongzhan Lin, Ziyang Luo, Wei Gao, Jing Ma, Bo Wang, Ruichao Yang: Towards Explainable Harmful Meme "
    "Detection through Multimodal Debate between Large Language Models, WWW 2024"
)


def demo(out: Path, *, full: bool = False, seed: int = 0) -> Demo:
    """Debates over HTTP, then every judge on held-out stand-in memes.

    Args:
        out: gets the pictures and ``cards.html``.
        full: five seeds with memes of their own, longer training, all fusions, and unseen photographs.
        seed: first of the seeds.

    Raises:
        MissingExtraError: scikit-image or matplotlib is not installed.
    """
    from .stand_in_memes import photographs_folder
    from .stand_in_work import SCALES, Worker

    require_extra("matplotlib", "demo", "meme-debate")
    photographs_folder()
    scale = SCALES["full" if full else "quick"]
    seeds = range(seed, seed + scale.seeds)
    with tempfile.TemporaryDirectory() as place, Worker(Path(place), scale, seeds) as worker:
        with collector_paused():  # meanwhile the worker makes memes and holds debates
            from .experiment import experiment
        return experiment(out, worker)


method = Method(
    name="meme-debate",
    package="meme-debate",
    title="ExplainHM: memes judged with reasons",
    paper=PAPER,
    url="https://arxiv.org/abs/2401.13298",
    summary="Two debaters argue that a meme is harmful and that it is not; a small judge reads both with the "
    "picture, decides, and gives the side it took as its reason.",
    demo=demo,
)
