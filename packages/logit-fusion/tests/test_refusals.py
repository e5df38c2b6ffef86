"""What ``fuse_logits`` and the settings refuse, and how; the settings' round trip; what an import loads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fusion_core.errors import CheckpointError, ConfigError, InputError, ShapeError
from logit_fusion import (
    EmptySupportError,
    FusionConfig,
    NonFiniteLogitsError,
    VocabularyMismatchError,
    fuse_logits,
)
from logit_fusion.config import MemberConfig, ViewConfig
from logit_fusion.corpus import load_tokenizer as corpus_tokenizer
from logit_fusion.member import load_tokenizer

DOUBLE = torch.float64


def drawn(*shape, experts=1, seed=0, dtype=DOUBLE, device="cpu", shift=1.0):
    made = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(*shape, generator=made, dtype=DOUBLE)
    large = 3 * normal()
    base = 0.5 * large + normal()
    found = [large, base, *(base + shift * normal() for _ in range(experts))]
    return [x.to(device, dtype) for x in found]


def fuse(logits, **options):
    return fuse_logits(logits[0], logits[1], logits[2:], **{"compute_dtype": DOUBLE, **options})


def assert_close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_lazy_and_eager_validation(device):
    logits = drawn(3, 8, device=device)
    logits[2][1, 4] = torch.nan
    step = fuse(logits)
    assert step.non_finite.cpu().tolist() == [[False] * 3, [False, False, True], [False] * 3]
    with pytest.raises(NonFiniteLogitsError, match=r"'math' hold NaN or \+inf in row 1"):
        step.check(["large", "base", "math"])
    with pytest.raises(NonFiniteLogitsError, match=r"experts\[0\]"):
        fuse(logits, validate="eager")
    clean = fuse(drawn(3, 8, device=device))
    assert_close(step.log_probs[[0, 2]], clean.log_probs[[0, 2]])
    logits = drawn(2, 3, 8, device=device)
    logits[0][1, 2, 0] = torch.inf
    with pytest.raises(NonFiniteLogitsError, match=r"'large' hold NaN or .inf in row \(1, 2\)"):
        fuse(logits, validate="eager")
    mask = torch.ones(8, dtype=torch.bool, device=device)
    mask[0] = False
    fuse(logits, mask=mask, validate="eager")  # nobody looks at that token


def test_empty_support(device):
    logits = drawn(3, 4, device=device)
    mask = torch.ones(3, 4, dtype=torch.bool, device=device)
    mask[2] = False
    step = fuse(logits, mask=mask)
    assert step.empty.cpu().tolist() == [False, False, True]
    with pytest.raises(EmptySupportError, match="no token is left in row 2"):
        step.check()
    logits[0][0, :2] = logits[1][0, 2:] = -torch.inf
    with pytest.raises(EmptySupportError, match="row 0"):
        fuse(logits, validate="eager")


BAD = [
    ({"strategy": "best"}, InputError, "strategy is 'best', wanted one of"),
    ({"solver": "bisect"}, InputError, "solver is 'bisect'"),
    ({"objective": "kl"}, InputError, "objective is 'kl'"),
    ({"pairing": "both"}, InputError, "pairing is 'both'"),
    ({"outside": "zero"}, InputError, "outside is 'zero'"),
    ({"validate": "never"}, InputError, "validate is 'never'"),
    ({"alpha_range": (1.0, 0.5)}, ConfigError, r"alpha_range is \(1.0, 0.5\), wanted finite"),
    ({"alpha_range": (-1.0, 0.5)}, ConfigError, "alpha_range"),
    ({"alpha_range": (0.0, float("inf"))}, ConfigError, "alpha_range"),
    ({"alpha_range": (0.0, float("nan"))}, ConfigError, "alpha_range"),
    ({"alpha_range": 2.0}, ConfigError, "alpha_range is 2.0"),
    ({"step": 0.0}, ConfigError, "step is 0.0, wanted a number in"),
    ({"step": 2.5}, ConfigError, "step is 2.5"),
    ({"step": 1e-320}, ConfigError, r"step is 1e-320, wanted a number in \[3.05e-05, 2\]: 1 to 65536"),
    ({"kl_temperature": 0.0}, ConfigError, "kl_temperature is 0.0"),
    ({"max_kl": -1.0}, ConfigError, "max_kl is -1.0"),
    ({"alpha": float("nan")}, InputError, "alpha is nan, wanted finite numbers"),
    ({"alpha": [1.0, 2.0, 3.0]}, InputError, "alpha has 3 numbers, wanted 1 or one for each of the 2"),
    ({"alpha": torch.ones(3)}, ShapeError, "alpha has shape"),
    ({"weights": "evidence"}, InputError, "evidence_weights"),
    ({"weights": "best"}, InputError, "weights is 'best'"),
    ({"weights": (1.0,)}, InputError, "weights has 1 numbers, wanted one for each of the 2"),
    ({"weights": (1.0, -1.0)}, InputError, "wanted numbers >= 0"),
    ({"weights": (1.0, float("nan"))}, InputError, "nan"),
    ({"weights": (0.0, 0.0)}, InputError, "positive sum"),
    ({"weights": torch.tensor([1.0, -0.5])}, InputError, "weights holds -0.5"),
    ({"weights": torch.ones(5)}, ShapeError, "weights has shape"),
    ({"weights": lambda f, r: f[..., :1]}, ShapeError, "weights has shape"),
    ({"per_expert_range": [(0, 1), (0, 1)]}, InputError, "per_expert_range needs strategy='single'"),
    ({"strategy": "single", "per_expert_range": [(0, 1)]}, InputError, "has 1 pairs"),
    ({"strategy": "single", "per_expert_range": [(0, 1), (1, 0)]}, InputError, r"per_expert_range\[1\]"),
    ({"mask": torch.ones(20)}, InputError, "mask is torch.float32"),
    ({"mask": torch.ones(21, dtype=torch.bool)}, ShapeError, "mask has shape"),
    ({"active": torch.ones(7, dtype=torch.bool)}, ShapeError, "active has shape"),
    ({"compute_dtype": torch.bfloat16}, InputError, "compute_dtype"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD, ids=[words for *_, words in BAD])
def test_bad_settings(options, error, words):
    with pytest.raises(error, match=words) as caught:
        fuse(drawn(3, 20, experts=2), **options)
    assert isinstance(caught.value, ValueError)


def test_bad_members():
    large, base, expert = drawn(3, 20)
    with pytest.raises(InputError, match="experts is empty"):
        fuse([large, base])
    with pytest.raises(VocabularyMismatchError, match=r"experts\[0\] has 19 logits a row and large has 20"):
        fuse([large, base, expert[:, :19]])
    with pytest.raises(ShapeError, match="base has shape"):
        fuse([large, base[:2], expert])
    with pytest.raises(InputError, match=r"base is torch\.int64"):
        fuse([large, base.long(), expert])
    with pytest.raises(InputError, match="large is list"):
        fuse([[1.0], base, expert])
    with pytest.raises(ShapeError, match="large has shape"):
        fuse([torch.tensor(1.0)] * 3)
    with pytest.raises(ValueError, match="take strategy='pool'"):
        fuse(drawn(1, 5, experts=4), strategy="joint", solver="grid")
    with pytest.raises(InputError, match=r"step 0\.0001 and 2 experts has 400040001"):
        fuse(drawn(1, 5, experts=2), strategy="joint", solver="grid", step=1e-4)


# Settings


def test_settings_round_trip(tmp_path):
    config = FusionConfig(
        strategy="single",
        weights=(1.0, 3.0),
        per_expert_range=((0.0, 1.0), (0.0, 2.0)),
        large=MemberConfig("large"),
        experts={"math": MemberConfig("base", adapter="lora")},
        views={"math": ViewConfig(prefix="Q: ", chat=True)},
    )
    for name in ("fusion.json", "fusion.toml"):
        config.save(tmp_path / name)
        assert FusionConfig.load(tmp_path / name) == config
    logits = drawn(3, 20, experts=2)
    step = fuse_logits(logits[0], logits[1], logits[2:], **config.fuse_arguments())
    assert step.alpha.shape == (3, 2)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"alpha_range": [2.0, 1.0]}, "alpha_range"),
        ({"step": 3.0}, "step is 3.0"),
        ({"strategy": "best"}, "strategy"),
        ({"evidence_decay": 0.0}, "evidence_decay is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan, wanted a number"),
        ({"alpha": (0.5, float("inf"))}, "alpha is inf, wanted a number"),
        ({"min_overlap": 2.0}, "min_overlap"),
        ({"kl_temperature": -1.0}, "kl_temperature"),
        ({"max_kl": -0.5}, "max_kl"),
        ({"stratgy": "pool"}, "did you mean strategy"),
        ({"per_expert_range": [[1.0, 0.0]]}, r"per_expert_range\[0\]"),
    ],
)
def test_bad_config(bad, words):
    with pytest.raises(ConfigError, match=words):
        FusionConfig.from_dict(bad)


def test_import_is_light():
    code = (
        "import sys, torch; from logit_fusion import fuse_logits, FusionConfig; import logit_fusion.evidence;"
        "x = torch.randn(3, 9); fuse_logits(x, x, [x]);"
        "print([m for m in ('transformers', 'accelerate', 'matplotlib', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("file", "text"), [("tokenizer.json", '{"model": 7}'), ("tokenizer_config.json", '{"eos_token": true}')]
)
def test_a_damaged_tokenizer_is_not_none(tmp_path, file, text):
    corpus_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, "small") is not None
    (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError, match=r"member 'small': .* has no tokenizer that can be read"):
        load_tokenizer(tmp_path, "small")
