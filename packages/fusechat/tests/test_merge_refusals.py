"""Merging: what is refused, and in which words."""

import pytest
import torch

from fusechat import merge
from fusechat.errors import IncompatibleCheckpoints
from fusion_core.errors import InputError

draws = torch.Generator().manual_seed(0)
BASE = {"model.layers.0.mlp.up_proj.weight": torch.randn(5, 4, generator=draws)}
TARGETS = [{k: v + 0.02 * torch.randn(v.shape, generator=draws) for k, v in BASE.items()} for _ in range(3)]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: merge.linear([]), InputError, "targets is empty"),
        (lambda: merge.linear([TARGETS[0], TARGETS[0]]), InputError, "twice"),
        (lambda: merge.varm([BASE], base=BASE), InputError, "the base object itself"),
        (lambda: merge.varm(TARGETS, base=None), InputError, "give base"),
        (lambda: merge.linear(TARGETS, weights=[1.0]), InputError, "weights has 1 entries"),
        (lambda: merge.linear(TARGETS, weights=[1.0, float("nan"), 1.0]), InputError, "finite"),
        (lambda: merge.sce(TARGETS, base=BASE, tau=0.0), InputError, "tau is 0.0"),
        (lambda: merge.sce(TARGETS, base=BASE, variant="fork"), InputError, "variant is 'fork'"),
        (lambda: merge.ties(TARGETS, base=BASE, density=0.0), InputError, "density is 0.0"),
        (lambda: merge.dare(TARGETS, base=BASE, density=1.5), InputError, "density is 1.5"),
        (lambda: merge.slerp(TARGETS), InputError, "two targets, got 3"),
        (lambda: merge.slerp(TARGETS[:2], t=2.0), InputError, "t is 2.0"),
        (
            lambda: merge.varm(TARGETS, base=BASE, measure="cube").state_dict(),
            InputError,
            "measure is 'cube'",
        ),
        (lambda: merge.linear(TARGETS, chunk=5), InputError, "whole number of 65536"),
        (lambda: merge.linear(TARGETS, base=BASE, embeddings="pad"), InputError, "embeddings is 'pad'"),
        (lambda: merge.linear(["nowhere", BASE]), InputError, "nowhere, which does not exist"),
        (lambda: merge.linear([3, BASE]), InputError, "target 0 is int"),
        (
            lambda: merge.linear([{"a": torch.ones(2)}, BASE]),
            IncompatibleCheckpoints,
            "is missing in target 1",
        ),
        (
            lambda: merge.linear([BASE, {k: v.long() for k, v in BASE.items()}]),
            IncompatibleCheckpoints,
            "torch.int64",
        ),
    ],
)
def test_bad_input(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
