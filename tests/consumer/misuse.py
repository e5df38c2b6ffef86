"""Every line that ends in ``# wrong`` is a mistake that a type checker has to find; nothing here is run."""

from __future__ import annotations

import torch

import logit_fusion
import ot_fusion
from logit_fusion import FusionConfig, fuse_logits
from logit_fusion import fuse_logit  # wrong
from ot_fusion import Plans  # wrong

__all__ = ["Plans", "fuse_logit"]

x = torch.zeros(1, 5)
FusionConfig(strategy="best")  # wrong
fuse_logits(x, x, [x], "pool")  # wrong
fuse_logits(x, x, [x]).log_prob  # wrong
ot_fusion.fuse([], anchors=0)  # wrong
ot_fusion.barycenter()  # wrong
logit_fusion.merge_task_vectors(3, [x])  # wrong
name: int = ot_fusion.FusionConfig().solver  # wrong
