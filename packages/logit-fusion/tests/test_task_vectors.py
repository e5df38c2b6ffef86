"""Task arithmetic on modules, state dicts and folders."""

import pytest
import torch

from fusion_core.checkpoint import save_tensors
from fusion_core.errors import CheckpointError, InputError
from fusion_core.shards import ShardReader, ShardWriter
from logit_fusion.task_vectors import merge_task_vectors


def test_the_three_kinds_agree(base, experts, tmp_path):
    wanted = {
        name: w + 0.3 * sum(e.state_dict()[name] - w for e in experts.values())
        for name, w in base.state_dict().items()
    }
    module = merge_task_vectors(base, experts)
    state = merge_task_vectors(base.state_dict(), [e.state_dict() for e in experts.values()])
    for name, tensor in wanted.items():
        assert torch.allclose(module.state_dict()[name], tensor, atol=1e-12)
        assert torch.equal(module.state_dict()[name], state[name])
    base.save_pretrained(tmp_path / "base")
    for name, expert in experts.items():
        expert.save_pretrained(tmp_path / name)
    out = merge_task_vectors(
        tmp_path / "base", [tmp_path / name for name in experts], out=tmp_path / "out", shard_bytes=20_000,
        progress=False,
    )  # fmt: skip
    reader = ShardReader(out)
    assert len(list(out.glob("*.safetensors"))) > 1
    for name in reader:
        assert torch.equal(reader.get(name), state[name])
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="float64")
    ids = torch.tensor([[2, 3, 4]])
    assert torch.allclose(loaded(ids).logits, module(ids).logits, atol=1e-9)


def test_limits_and_scales(base, experts):
    first, second = (e.state_dict() for e in experts.values())
    start = base.state_dict()
    same = merge_task_vectors(start, [first, second], lam=0.0)
    assert all(torch.equal(same[name], start[name]) for name in start)
    one = merge_task_vectors(start, {"a": first, "b": second}, lam=[1.0, 0.0])
    assert all(torch.allclose(one[name], first[name], atol=1e-12) for name in start)


def test_half_is_summed_in_float32():
    base = {"w": torch.full((4,), 256.0, dtype=torch.bfloat16)}
    experts = [{"w": torch.full((4,), 258.0, dtype=torch.bfloat16)} for _ in range(8)]
    # 256 + 8 * 0.3 * 2 = 260.8; summed in bfloat16 every step of 0.6 would be lost.
    assert merge_task_vectors(base, experts)["w"][0] == torch.tensor(260.8).bfloat16()
    counts = {"n": torch.tensor([3])}
    assert merge_task_vectors(counts, [{"n": torch.tensor([5])}])["n"].item() == 3


def test_bad_input(base, experts, tmp_path):
    state = {"w": torch.zeros(2)}
    with pytest.raises(InputError, match="experts wants a list"):
        merge_task_vectors(state, [])
    with pytest.raises(InputError, match="wanted one kind"):
        merge_task_vectors(state, [base])
    with pytest.raises(InputError, match="got int, wanted a module"):
        merge_task_vectors(state, [3])
    with pytest.raises(InputError, match="one for each of 1 experts"):
        merge_task_vectors(state, [state], lam=[1.0, 2.0])
    with pytest.raises(InputError, match="lam is nan"):
        merge_task_vectors(state, [state], lam=float("nan"))
    with pytest.raises(InputError, match="out is missing"):
        merge_task_vectors(str(tmp_path), [str(tmp_path)])
    with pytest.raises(InputError, match="out is for folders"):
        merge_task_vectors(state, [state], out=tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"'w' has shape \(2,\) in the base and \(3,\) in expert 0"):
        merge_task_vectors(state, [{"w": torch.zeros(3)}])
    with pytest.raises(CheckpointError, match=r"expert 0 lacks \['w'\] and has \['v'\]"):
        merge_task_vectors(state, [{"v": torch.zeros(2)}])
    with pytest.raises(CheckpointError):
        merge_task_vectors(tmp_path / "none", [tmp_path / "none"], out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.fixture
def small(tmp_path):
    """A base and an expert of four tensors, in files."""
    states = {
        name: {f"w{i}": torch.full((4,), float(i + shift)) for i in range(4)}
        for name, shift in (("base", 0), ("expert", 1))
    }
    for name, state in states.items():
        save_tensors(tmp_path / f"{name}.safetensors", state)
    return tmp_path


def cut_off(place, monkeypatch, after, lam):
    """A merge that ends after some tensors, as by a kill."""
    add, count = ShardWriter.add, []

    def stops(self, key, tensor):
        if len(count) == after:
            raise KeyboardInterrupt
        count.append(key)
        add(self, key, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", stops)
        with pytest.raises(KeyboardInterrupt):
            merge_task_vectors(
                place / "base.safetensors",
                [place / "expert.safetensors"],
                lam,
                out=place / "out",
                shard_bytes=16,
            )


def test_a_merge_that_was_cut_off_takes_nothing_of_another_scale(small, monkeypatch):
    cut_off(small, monkeypatch, 3, 0.25)
    assert not (small / "out").exists()
    assert len(list((small / "out.partial").glob("model-*"))) == 2
    merge_task_vectors(small / "base.safetensors", [small / "expert.safetensors"], 0.75, out=small / "out")
    found = ShardReader(small / "out")
    assert [float(found.get(f"w{i}")[0]) for i in range(4)] == [0.75, 1.75, 2.75, 3.75]
    assert not (small / "out.partial").exists()


def test_a_merge_that_was_cut_off_goes_on(small, monkeypatch):
    cut_off(small, monkeypatch, 3, 0.5)
    read, asked = ShardReader.get, []
    monkeypatch.setattr(
        ShardReader, "get", lambda self, key, *more: asked.append(key) or read(self, key, *more)
    )
    merge_task_vectors(
        small / "base.safetensors", [small / "expert.safetensors"], 0.5, out=small / "out", shard_bytes=16
    )
    assert set(asked) == {"w2", "w3"}
    found = ShardReader(small / "out")
    assert [float(read(found, f"w{i}")[0]) for i in range(4)] == [0.5, 1.5, 2.5, 3.5]


def test_a_merge_does_not_mix_with_what_is_there(small):
    (small / "out").mkdir()
    (small / "out" / "model.safetensors").write_bytes((small / "base.safetensors").read_bytes())
    with pytest.raises(InputError, match="out, which is not empty"):
        merge_task_vectors(small / "base.safetensors", [small / "expert.safetensors"], out=small / "out")
