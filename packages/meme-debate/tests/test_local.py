"""A vision language model of transformers in this process: a tiny one with random weights."""

import json

import pytest
import torch
from debate_stub import jpeg

from fusion_core.errors import CheckpointError, InputError
from meme_debate import Debater, Meme
from meme_debate.backends.local import LocalBackend
from meme_debate.prompts import Call, Prompt

IMAGE, END, SIZE = 3, 2, 16


class Processor:
    """Bytes as tokens, four tokens for a picture; enough of a processor for ``apply_chat_template``."""

    def __init__(self):
        self.chats = []

    def apply_chat_template(self, chat, **options):
        assert options == {
            "add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"
        }  # fmt: skip
        self.chats.append(chat)
        ids, pixels = [], []
        for message in chat:
            for part in message["content"]:
                if part["type"] == "image":
                    image = part["image"].resize((SIZE, SIZE))
                    ids += [IMAGE] * 4
                    pixels.append(
                        torch.tensor(list(image.getdata())).view(SIZE, SIZE, 3).permute(2, 0, 1) / 255
                    )
                else:
                    ids += [4 + byte % 60 for byte in part["text"].encode()][-40:]
        found = {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        }
        if pixels:
            found["pixel_values"] = torch.stack(pixels)
        return found

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(ord("a") + int(i) % 26) for i in ids if int(i) > 3)


def make_llava(end=END):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE,
        patch_size=8, projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=end, pad_token_id=1,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config)


@pytest.fixture(scope="module")
def model():
    return make_llava()


@pytest.fixture
def backend(model):
    return LocalBackend(model, Processor(), device="cpu")


def test_a_debate_by_a_model_in_this_process(backend, tmp_path):
    (tmp_path / "x.jpg").write_bytes(jpeg())
    wanted = [Meme("a", tmp_path / "x.jpg", "what a giant"), Meme("b", None, "words only")]
    debater = Debater(backend, cache=tmp_path / "c.sqlite", structured=False)
    debates = debater.run(wanted, 2, progress=False)
    chats = backend.processor.chats
    assert len(chats) == debates.report.calls
    shown = [chat for chat in chats if chat[1]["content"][0]["type"] == "image"]
    assert {len(chat[1]["content"]) for chat in shown} == {2}
    assert all(part["image"].size == (32, 24) for chat in shown for part in chat[1]["content"][:1])
    assert debates[0].harmful
    assert debates[0].record["model"] == "LlavaForConditionalGeneration"
    assert debates[0].record["usage"]["completion_tokens"] > 0
    again = Debater(backend, cache=tmp_path / "c.sqlite").run(wanted, 1, progress=False)
    assert list(again) == list(debates)
    assert again.report.cached == again.report.calls
    assert json.dumps(again[0].record) == json.dumps(debates[0].record)


def call(text, **more):
    return Call("x", Prompt("system", None, "words\n"), text, **{"max_tokens": 5, **more})


def test_tokens_are_counted_and_cut_is_told(backend):
    reply = backend._generate(call("task"))
    assert reply.prompt_tokens == len("system") + len("words\ntask")
    assert reply.completion_tokens == 5
    assert reply.finish_reason == "length"
    backend.network.generation_config.eos_token_id = [int(i) for i in range(64)]
    try:
        reply = backend._generate(call("task"))
    finally:
        backend.network.generation_config.eos_token_id = END
    assert (reply.completion_tokens, reply.finish_reason) == (1, "stop")


def test_sampling_follows_the_seed_and_leaves_the_global_stream(backend):
    before = torch.random.get_rng_state()
    draws = [
        backend._generate(call("task", temperature=5.0, seed=seed, max_tokens=20)).text for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_refusals_of_the_border(model, tmp_path):
    with pytest.raises(CheckpointError, match="is no image-text-to-text model that transformers loads"):
        Debater(f"transformers:{tmp_path}")
    with pytest.raises(InputError, match="needs processor="):
        LocalBackend(model)
