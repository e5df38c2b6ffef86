import json

import pytest

pytest.importorskip("transformers")  # no dependency of the core

from fusion_core.errors import CheckpointError, reading
from fusion_core.testing.tiny import bpe
from fusion_core.tokenizers import load_tokenizer


@pytest.fixture
def folder(tmp_path):
    bpe(["one two three two"], 300).save_pretrained(tmp_path)
    return tmp_path


def change(path, edit):
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))


def with_id(number):
    return {"</s>": {"id": "</s>", "ids": [number], "tokens": ["</s>"]}}


def template(*special):
    return {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [2], "tokens": [name]} for name in special},
    }


def test_a_whole_tokenizer_is_loaded(folder):
    change(folder / "tokenizer.json", lambda found: found.update(post_processor=template("</s>")))
    assert load_tokenizer(folder, local_files_only=True)("two").input_ids[-1] == 2


@pytest.mark.parametrize(
    ("file", "edit", "words"),
    [
        (
            "tokenizer.json",
            lambda f: f["model"]["vocab"].update({"o": 2**31}),
            "a token the id 2147483648",
        ),
        ("tokenizer_config.json", lambda f: f.update(model_max_length=[[]]), r"model_max_length is \[\[\]\]"),
        ("tokenizer_config.json", lambda f: f.update(unk_token=""), "RecursionError"),
        ("tokenizer.json", lambda f: f.update(post_processor=template("<s>")), "its template holds '</s>'"),
        (
            "tokenizer.json",
            lambda f: f.update(post_processor={"type": "Sequence", "processors": [template()]}),
            "its template holds '</s>'",
        ),
        (
            "tokenizer.json",
            lambda f: f.update(post_processor={**template("</s>"), "single": []}),
            "its template leaves the text out",
        ),
        (
            "tokenizer.json",
            lambda f: f.update(post_processor=template("</s>") | {"special_tokens": with_id(400)}),
            "gives '</s>' the id 400, which no token has",
        ),
        (
            "tokenizer.json",
            lambda f: f.update(post_processor={"type": "RobertaProcessing", "sep": ["</s>", 400]}),
            "gives '</s>' the id 400, which no token has",
        ),
        (
            "tokenizer.json",
            lambda f: f["model"].update(continuing_subword_prefix="##"),
            "which does not start with '##'",
        ),
        ("tokenizer.json", lambda f: f.clear(), ""),
    ],
)
def test_what_would_fail_in_use_is_told(folder, file, edit, words):
    change(folder / file, edit)
    with (
        pytest.raises(CheckpointError, match=f"^{folder} is damaged: .*{words}"),
        reading(folder, "is damaged", CheckpointError),
    ):
        load_tokenizer(folder)
