"""The nine packages have one voice: the same word, letter, default and sentence for the same thing.

A difference that stays has its reason in a table below; one that is gone must leave the table too.
"""

import dataclasses
import importlib
import inspect
import re
import typing
from typing import get_args, get_origin

import pytest
import surface
import torch
from typer.models import OptionInfo
from workspace import SECTIONS, Member, packages

from fusion_core import cli
from fusion_core.config import Config
from fusion_core.report import Report
from fusion_core.results import Result

pytestmark = pytest.mark.slow

every_package = pytest.mark.parametrize("member", packages(), ids=lambda member: member.name)

NO_JSON = {
    "logit-fusion chat": "a conversation",
    "meme-debate serve": "a server",
}
OTHER_WORDS = {
    ("kd-trilateral cache build", "--dtype"): "of what is stored, not of the computation",
    ("kd-trilateral demo", "--seeds"): "its number depends on --full",
    ("logit-fusion *", "--device"): "each member may have its own",
    ("logit-fusion *", "--max-length"): "a text of one token has no likelihood",
    ("mantis-photoz bench", "*"): "to become fusion_core.bench.add_bench",
    ("mantis-photoz estimate", "--num-workers"): "its threads only read",
    ("mantis-photoz train", "--set"): "names settings of its own",
    ("meme-debate bench", "*"): "to become fusion_core.bench.add_bench",
    ("meme-debate judge evaluate", "--seeds"): "counts foldings",
    ("meme-debate judge train", "--set"): "for one kind of judge only",
}
OTHER_DEFAULTS = {
    ("gvdepth predict", "--dtype"): "depth in metres needs more digits than bfloat16 has",
    ("kd-trilateral cache build", "--dtype"): "of what is stored",
    ("kd-trilateral demo", "--seeds"): "its number depends on --full",
    ("logit-fusion *", "--device"): "each member may have its own",
    ("mantis-photoz estimate", "--dtype"): "densities to 1e-6 need more digits than bfloat16 has",
    ("meme-debate judge evaluate", "--seeds"): "counts foldings",
}
BY_VERB = {"--out", "--batch-size", "--num-workers", "--max-length"}
"""Options whose default depends on the work."""
OTHER_LETTERS = {
    ("meme-debate *", "--model"): "the name of a model on a server, not a model",
}
DEFAULTS = {
    "device": {"auto", None, inspect.Parameter.empty},
    "seed": {0, None, inspect.Parameter.empty},
    "progress": {None},
    "resume": {False},
    "overwrite": {False},
    "limit": {None},
    "generator": {None, inspect.Parameter.empty},
}
OTHER_PYTHON = {
    ("adaea", "device"): "load_model and load_official return a module, which is where torch puts modules",
    ("fusechat", "limit"): "align.inspect reads the first 200 dialogues: it is to be quick",
}
NO_MIXIN = {
    "adaea.AdversarialSet": "saves images and their record in formats of its own",
    "gvdepth.Camera": "has the file formats of cameras",
    "kd_trilateral.FitResult": "holds the trained student",
    "mantis_photoz.BinnedPDF": "an array type; qp and PhotoZResult write it",
    "mantis_photoz.PhotoZResult": "saves a table and densities in the formats of the field",
    "mantis_photoz.Survey": "facts about a survey, read and written by catalogues",
    "meme_debate.Card": "one line of JSON Lines",
    "meme_debate.Debate": "one line of JSON Lines",
    "meme_debate.Meme": "one line of JSON Lines",
    "ot_fusion.Aligned": "holds a model; save_pretrained writes it",
    "ot_fusion.Fused": "holds a model; save_pretrained writes it",
}


@pytest.fixture(scope="module")
def listed() -> list[surface.Verb]:
    return [verb for member in packages() for verb in surface.verbs(member)]


def reason(table: dict[tuple[str, str], str], verb: surface.Verb, option: str) -> str | None:
    """Why a difference stays; names in the table may end in a star."""
    name = f"{verb.package} {verb.name}"
    for (where, what), words in table.items():
        if what in (option, "*") and (where == name or (where[-1] == "*" and name.startswith(where[:-1]))):
            return words
    return None


def shared() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Help and letters of the options of ``fusion_core.cli``, by their long name."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for value in vars(cli).values():
        if get_origin(value) is typing.Annotated:
            (option,) = [one for one in get_args(value) if isinstance(one, OptionInfo)]
            words = tuple(word for word in (option.default, *option.param_decls) if isinstance(word, str))
            found[words[0]] = option.help or "", tuple(word for word in words if word[:2] != "--")
    return found


def test_contributing_shows_the_surfaces_as_they_are() -> None:
    page = surface.PAGE.read_text(encoding="utf-8")
    assert surface.replaced(page) == page, "run: uv run python .ci/surface.py --write"


def test_shared_options_have_one_sentence_and_one_set_of_letters(listed: list[surface.Verb]) -> None:
    known = shared()
    assert {"--out", "--device", "--seed", "--set", "--shard"} <= set(known)
    wrong: list[str] = []
    for verb in listed:
        for option in verb.options:
            if option.name not in known or reason(OTHER_WORDS, verb, option.name):
                continue
            text, letters = known[option.name]
            if option.letters != letters or (option.help != text and option.name != "--out"):
                wrong.append(f"{verb.package} {verb.name} {option.name}: {option.letters} {option.help}")
    assert not wrong


def test_shared_options_have_one_default(listed: list[surface.Verb]) -> None:
    usual = {
        "--device": "auto", "--dtype": "auto", "--seed": "0", "--json": "False", "--quiet": "False",
        "--limit": "", "--shard": "", "--set": "", "--resume": "False", "--overwrite": "False",
        "--shard-gb": "5.0", "--seeds": "5", "--repeats": "5", "--threads": "1", "--only": "",
        "--memory/--no-memory": "True",
    }  # fmt: skip
    assert set(usual) == set(shared()) - BY_VERB
    wrong = [
        f"{verb.package} {verb.name} {option.name} {option.default!r}"
        for verb in listed
        for option in verb.options
        if usual.get(option.name, option.default) != option.default
        and not reason(OTHER_DEFAULTS, verb, option.name)
    ]
    assert not wrong


def test_a_letter_means_one_option_and_an_option_has_one_letter(listed: list[surface.Verb]) -> None:
    letters: dict[str, set[tuple[str, ...]]] = {}
    for verb in listed:
        for option in verb.options:
            if not reason(OTHER_LETTERS, verb, option.name):
                letters.setdefault(option.name, set()).add(option.letters)
    assert not {name: found for name, found in letters.items() if len(found) > 1}


def test_every_verb_shows_how_it_is_called(listed: list[surface.Verb]) -> None:
    without = [
        f"{verb.package} {verb.name}"
        for verb in listed
        if f"Example: {verb.package} {verb.name}" not in " ".join(verb.help.split())
    ]
    assert not without


def test_results_go_where_out_says(listed: list[surface.Verb]) -> None:
    for verb in listed:
        names = {option.name for option in verb.options}
        assert not names & {"OUT", "OUTPUT", "--output", "--save", "--output-dir"}, verb
        if names & {"--resume", "--overwrite", "--full"}:
            assert "--out" in names, verb


def test_every_verb_has_json(listed: list[surface.Verb]) -> None:
    without = {
        f"{verb.package} {verb.name}"
        for verb in listed
        if "--json" not in {option.name for option in verb.options}
    }
    assert without == set(NO_JSON)


def test_demo_and_bench_are_everywhere(listed: list[surface.Verb]) -> None:
    for member in packages():
        names = {verb.name for verb in listed if verb.package == member.name}
        assert {"demo", "bench"} <= names


@every_package
def test_words_of_the_apis_have_one_default(member: Member) -> None:
    wrong = [
        f"{name}({one.name}={one.default!r})"
        for name, function in surface.callables(member)
        for one in surface.parameters(function)
        if one.name in DEFAULTS
        and not any(one.default is value or one.default == value for value in DEFAULTS[one.name])
        and (member.name, one.name) not in OTHER_PYTHON
        and one.default is not inspect.Parameter.empty
    ]
    assert not wrong


@every_package
def test_no_word_that_was_replaced_comes_back(member: Member) -> None:
    old = {
        "bs",
        "batchsize",
        "output_dir",
        "out_dir",
        "verbose",
        "n_jobs",
        "workers",
        "random_state",
    }
    old |= {"rng_seed", "max_gradient_norm", "clip_grad", "torch_dtype", "is_resume"}
    found = [
        f"{name}({one.name})"
        for name, function in surface.callables(member)
        for one in surface.parameters(function)
        if one.name in old
    ]
    assert not found


def tensors_only(found: type) -> bool:
    """Whether every field is a tensor, as in the outputs of a hot loop."""
    return all("Tensor" in str(field.type) for field in dataclasses.fields(found))


@every_package
def test_public_results_have_the_manners_of_the_core(member: Member) -> None:
    module = importlib.import_module(member.module)
    for name in module.__all__:
        found = getattr(module, name)
        if not inspect.isclass(found) or not hasattr(
            found, "to_dict" if name[-6:] == "Report" else "__name__"
        ):
            continue
        if name.endswith("Report"):
            assert issubclass(found, Report), name
        saves = callable(getattr(found, "save", None)) or callable(getattr(found, "to_dict", None))
        if dataclasses.is_dataclass(found) and saves and not issubclass(found, torch.nn.Module):
            kinds = (Result, Report, Config)
            assert issubclass(found, kinds) or f"{member.module}.{name}" in NO_MIXIN or tensors_only(found), (
                name
            )
        if callable(getattr(found, "plot", None)):
            (axes,) = [one for one in surface.parameters(found.plot) if one.name == "ax"]
            assert axes.default is None, name


def test_reasons_are_still_needed() -> None:
    for name in NO_MIXIN:
        module, _, word = name.partition(".")
        assert not issubclass(getattr(importlib.import_module(module), word), Result), name


@every_package
def test_readmes_have_one_plan(member: Member) -> None:
    text = (member.directory / "README.md").read_text(encoding="utf-8")
    headings = [line.lower() for line in re.findall(r"^## (.+)$", text, re.MULTILINE)]
    places = [next(i for i, heading in enumerate(headings) if section in heading) for section in SECTIONS]
    assert places == sorted(places)
    install = text[text.lower().index("\n## install") : text.lower().index("\n## quickstart")]
    assert f"pip install {member.name}" in install or f"packages/{member.name}" in install
