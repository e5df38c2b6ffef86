"""Task arithmetic on modules, state dicts and folders."""

import pytest
import torch

from fusion_core.errors import CheckpointError, InputError
from fusion_core.shards import ShardReader
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
