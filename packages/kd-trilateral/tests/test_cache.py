"""The teacher cache: exact, resumable, fingerprinted."""

import json
import time
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kd_trilateral as kdt
from fusion_core.errors import DataError, FusionWarning, InputError, StoreError
from fusion_core.testing import kill_when
from kd_trilateral import cache as cache_module


def problem(rows=50, classes=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    teacher = nn.Linear(4, classes).eval()
    return teacher, (torch.randn(rows, 4, generator=draw), torch.randint(classes, (rows,), generator=draw))


def test_round_trip_and_class_mean(tmp_path):
    teacher, data = problem()
    cache = kdt.TeacherCache.build(teacher, data, tmp_path / "t.kdc")
    wanted = teacher(data[0]).detach()
    index = torch.tensor([49, 0, 7, 7])
    torch.testing.assert_close(cache.logits(index), wanted[index], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(cache.labels(), data[1])
    expected, _ = kdt.class_mean(cache.logits(slice(None)).softmax(-1), data[1], 5)
    torch.testing.assert_close(cache.class_mean(), expected)
    exact = kdt.TeacherCache.build(teacher, data, tmp_path / "e.kdc", dtype="float32")
    torch.testing.assert_close(exact.logits(slice(None)), wanted, rtol=0, atol=0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 40), st.integers(1, 12))
def test_top_k_rows_sum_to_one(tmp_path_factory, seed, classes, k):
    teacher, data = problem(rows=6, classes=classes, seed=seed)
    cache = kdt.TeacherCache.build(teacher, data, tmp_path_factory.mktemp("c") / "t.kdc", top_k=k)
    probs = cache.logits(slice(None)).softmax(-1)
    full = teacher(data[0]).detach().softmax(-1)
    torch.testing.assert_close(probs.sum(-1), torch.ones(6))
    top = full.topk(min(k, classes), -1)
    torch.testing.assert_close(probs.gather(-1, top.indices), top.values, rtol=2e-3, atol=2e-3)
    rest = 1.0 - top.values.sum(-1)
    if k < classes:  # the left-over mass is spread evenly
        others = probs.scatter(-1, top.indices, -1.0)
        for row, mass in zip(others, rest, strict=True):
            spread = row[row >= 0]
            torch.testing.assert_close(
                spread, torch.full_like(spread, float(mass) / len(spread)), rtol=0, atol=2e-3
            )


def test_resumes_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("kd_trilateral.cache._SHARD_ROWS", 8)
    teacher, data = problem()
    seen = []

    class Stops(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = teacher

        def forward(self, x):
            if len(seen) > 3:
                raise KeyboardInterrupt
            seen.append(len(x))
            return self.inner(x)

    stops = Stops().eval()
    with pytest.raises(KeyboardInterrupt):
        kdt.TeacherCache.build(stops, data, tmp_path / "t.kdc")
    with pytest.raises(StoreError, match=r"unfinished \(24 rows so far\)"):
        kdt.TeacherCache.open(tmp_path / "t.kdc")
    before = [p.stat().st_mtime_ns for p in sorted((tmp_path / "t.kdc").glob("shard*"))]
    seen.clear()
    seen.append(-100)  # the second run may go on: 1 probe + 4 shards do not reach the stop
    monkeypatch.setattr(Stops, "forward", lambda self, x: self.inner(x))
    cache = kdt.TeacherCache.build(stops, data, tmp_path / "t.kdc")
    after = [p.stat().st_mtime_ns for p in sorted((tmp_path / "t.kdc").glob("shard*"))]
    assert after[: len(before)] == before
    torch.testing.assert_close(cache.logits(slice(None)), teacher(data[0]).detach(), rtol=1e-3, atol=1e-3)


def build_in_small_shards(place, pause=0.0):
    real = cache_module._shard
    with mock.patch.multiple(
        cache_module, _SHARD_ROWS=4, _shard=lambda *words: (time.sleep(pause), real(*words))[1]
    ):
        torch.manual_seed(0)
        teacher, x = nn.Linear(4, 3).eval(), torch.arange(160.0).reshape(40, 4) / 100
        kdt.TeacherCache.build(teacher, (x, torch.arange(40) % 3), place).verify()


def test_survives_a_kill(tmp_path):
    place = tmp_path / "t.kdc"
    assert kill_when([build_in_small_shards, place, 0.2], place / "shard-00002.safetensors") != 0
    manifest = json.loads((place / "manifest.json").read_text())
    assert not manifest["complete"]
    assert 0 < manifest["rows"] < 40
    build_in_small_shards(place)
    assert len(kdt.TeacherCache.open(place)) == 40


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (
            lambda m: m["fingerprint"].pop("classes"),
            StoreError,
            r"t\.kdc has a damaged manifest: KeyError 'classes'",
        ),
        (
            lambda m: m["fingerprint"].update(views=False),
            StoreError,
            r"t\.kdc: views is False, wanted a whole number from 1",
        ),
        (
            lambda m: m["fingerprint"].update(classes=2**63),
            StoreError,
            r"t\.kdc: classes is 9223372036854775808, wanted a whole number from 1 to 2147483647",
        ),
        (
            lambda m: m["fingerprint"].update(views=2),
            StoreError,
            r"t\.kdc: a row of logits is \(1, 3\), wanted \(views, classes or top_k\)",
        ),
        (
            lambda m: m["fingerprint"].update(rows=float("nan")),
            InputError,
            r"manifest\.json: fingerprint takes what JSON can say",
        ),
        (
            lambda m: m["shards"].pop(0),
            StoreError,
            r"t\.kdc: its shards have \d+ rows, its manifest tells of 40",
        ),
    ],
)
def test_a_damaged_manifest_is_told(tmp_path, change, kind, words):
    build_in_small_shards(tmp_path / "t.kdc")
    path = tmp_path / "t.kdc" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(kind, match=words):
        kdt.TeacherCache.open(tmp_path / "t.kdc")


def test_another_teacher_or_data_is_refused_by_name(tmp_path):
    teacher, data = problem()
    kdt.TeacherCache.build(teacher, data, tmp_path / "t.kdc")
    other = nn.Linear(4, 5).eval()
    with pytest.raises(StoreError, match="teacher"):
        kdt.TeacherCache.build(other, data, tmp_path / "t.kdc")
    with pytest.raises(StoreError, match="teacher"):
        kdt.TeacherCache.open(tmp_path / "t.kdc", teacher=other)
    with pytest.raises(StoreError, match="data"):
        kdt.TeacherCache.open(tmp_path / "t.kdc", data=(data[0] + 1, data[1]))
    assert len(kdt.TeacherCache.open(tmp_path / "t.kdc", teacher=teacher, data=data)) == 50


def test_verify_names_the_damaged_shard(tmp_path):
    teacher, data = problem()
    cache = kdt.TeacherCache.build(teacher, data, tmp_path / "t.kdc")
    cache.verify()
    shard = tmp_path / "t.kdc" / "shard-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 255
    shard.write_bytes(bytes(raw))
    with pytest.raises(StoreError, match=r"shard-00000"):
        kdt.TeacherCache.open(tmp_path / "t.kdc").verify()


def test_non_finite_teacher_names_its_rows(tmp_path):
    _, data = problem()

    class Broken(nn.Module):
        def forward(self, x):
            return torch.where(x[:, :1] == data[0][7, 0], torch.nan, x[:, :3])

    with pytest.raises(DataError, match=r"not finite in float16 in rows \[7\]"):
        kdt.TeacherCache.build(Broken().eval(), data, tmp_path / "t.kdc")
    assert not list((tmp_path / "t.kdc").glob("shard*"))


class Augmented(torch.utils.data.Dataset):
    """Random unless a view is fixed."""

    random = True
    fingerprint = "augmented"

    def __init__(self, data, shift=None):
        self.data, self.shift = data, shift

    def view(self, v):
        return Augmented(self.data, float(v))

    def __len__(self):
        return len(self.data[1])

    def __getitem__(self, i):
        return self.data[0][i] + (torch.rand(()) if self.shift is None else self.shift), self.data[1][i]


def test_random_data_need_views(tmp_path):
    teacher, data = problem()
    with pytest.raises(DataError, match=r"random.*view\(v\).*views=V"):
        kdt.TeacherCache.build(teacher, Augmented(data), tmp_path / "t.kdc")
    cache = kdt.TeacherCache.build(teacher, Augmented(data), tmp_path / "t.kdc", views=3)
    for v in range(3):
        wanted = teacher(data[0] + v).detach()
        torch.testing.assert_close(cache.logits(slice(None), view=v), wanted, rtol=1e-3, atol=2e-3)
    with pytest.raises(DataError, match="no view"):
        kdt.TeacherCache.build(teacher, data, tmp_path / "u.kdc", views=2)


def test_teacher_comes_back_untouched_and_training_mode_is_warned_of(tmp_path):
    teacher = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    _, data = problem(classes=3)
    with pytest.warns(FusionWarning, match="training mode"):
        cache = kdt.TeacherCache.build(teacher, data, tmp_path / "t.kdc")
    assert teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    wanted = teacher.eval()(data[0]).detach()
    torch.testing.assert_close(cache.logits(slice(None)), wanted, rtol=2e-3, atol=2e-3)


def test_binary_single_logit_becomes_a_pair(tmp_path):
    teacher, data = nn.Linear(4, 1).eval(), problem(classes=2)[1]
    cache = kdt.TeacherCache.build(teacher, data, tmp_path / "t.kdc", task="binary", dtype="float32")
    u = teacher(data[0]).detach()[:, 0]
    np.testing.assert_array_equal(cache.logits(slice(None)).numpy(), torch.stack([u * 0, u], -1).numpy())
