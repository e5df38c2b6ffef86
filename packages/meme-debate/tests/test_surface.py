"""The public names, whatever was imported before."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from judges import make_memes

import meme_debate


def test_no_submodule_has_the_name_of_a_public_function():
    names = {info.name for info in pkgutil.iter_modules(meme_debate.__path__)}
    assert len(names) > 30
    assert not names & set(meme_debate.__all__)


def test_public_functions_are_functions_after_every_import():
    for info in pkgutil.walk_packages(meme_debate.__path__, "meme_debate."):
        importlib.import_module(info.name)
    for name in meme_debate.__all__:
        assert not isinstance(getattr(meme_debate, name), ModuleType), name
    memes, debates = make_memes(20)
    judge = meme_debate.TextJudge().fit_memes(memes, debates)
    assert meme_debate.metrics([0.9, 0.2], [1, 0])["accuracy"] == 1.0
    assert meme_debate.parse(meme_debate.compose(memes[0], debates[0]), memes[0].id)[1] == debates[0]
    assert len(list(meme_debate.detect(memes, debates, judge))) == 20
    assert meme_debate.audit(memes, debates, judge).rows
