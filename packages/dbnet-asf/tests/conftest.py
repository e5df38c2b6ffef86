"""The authors' names for our tensors, for goldens and made checkpoints."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

from fusion_core.testing.detfill import parameter

_BACK = [
    (r"^(backbone\.layer\d\.\d+\.conv2)\.offset\.", r"\1_offset."),
    (r"^neck\.lateral\.(\d)\.", lambda m: f"decoder.in{int(m[1]) + 2}."),
    (r"^neck\.smooth\.0\.", "decoder.out2."),
    (r"^neck\.smooth\.(\d)\.", lambda m: f"decoder.out{int(m[1]) + 2}.0."),
    (r"^neck\.asf\.conv\.", "decoder.concat_attention.conv."),
    (r"^neck\.asf\.channel\.0\.", "decoder.concat_attention.enhanced_attention.channel_wise.1."),
    (r"^neck\.asf\.channel\.1\.", "decoder.concat_attention.enhanced_attention.channel_wise.3."),
    (r"^neck\.asf\.spatial\.0\.", "decoder.concat_attention.enhanced_attention.spatial_wise.0."),
    (r"^neck\.asf\.spatial\.1\.", "decoder.concat_attention.enhanced_attention.spatial_wise.2."),
    (r"^neck\.asf\.level\.", "decoder.concat_attention.enhanced_attention.attention_wise.0."),
    (r"^neck\.asf\.", "decoder.concat_attention.enhanced_attention."),
    (r"^head\.prob\.", "decoder.binarize."),
    (r"^head\.thresh\.", "decoder.thresh."),
]


def _official_name(name):
    for pattern, new in _BACK:
        name, found = re.subn(pattern, new, name)
        if found:
            break
    return name


@pytest.fixture(scope="session")
def official_name():
    """Our name -> the authors'."""
    return _official_name


@pytest.fixture(scope="session")
def official_state():
    """A configuration -> the authors' state dict of it, filled as the golden cases say."""

    drawn = cache(lambda name, shape: torch.from_numpy(parameter(name, shape)))  # no test writes into them

    def make(config, prefix=""):
        from dbnet_asf.model.dbnet import DBNet

        with torch.device("meta"):
            shapes = {k: tuple(v.shape) for k, v in DBNet(config).state_dict().items()}
        width = shapes["neck.lateral.3.weight"][1]
        unused = {"fc.weight": (1000, width), "fc.bias": (1000,), "smooth.weight": (256, 2048, 1, 1)}
        names = {_official_name(name): shape for name, shape in shapes.items()}
        names |= {f"backbone.{name}": shape for name, shape in unused.items()}
        return {prefix + name: drawn(name, shape) for name, shape in names.items()}

    return make
