import types

import numpy as np
import pytest
import torch
from torch import nn

from fusion_core.errors import InputError, ShapeError
from fusion_core.modules import load_object, logits_of, untouched


def make():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    module[1].eval()
    module[3].weight.requires_grad_(False)
    module(torch.randn(5, 3)).sum().backward()
    return module


def look(module):
    return (
        [(name, part.training) for name, part in module.named_modules()],
        [(name, p.requires_grad, id(p.grad)) for name, p in module.named_parameters()],
        {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
    )


def unchanged(before, after):
    return before[:2] == after[:2] and all(
        a is b is None or (a is not None and torch.equal(a, b))
        for a, b in zip(before[2].values(), after[2].values(), strict=True)
    )


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("broken", [True, False])
def test_everything_comes_back(frozen, broken):
    module = make()
    before = look(module)
    x = torch.randn(5, 3, requires_grad=True)
    try:
        with untouched(module, module[0], frozen=frozen):
            assert not any(part.training for part in module.modules())
            assert any(p.requires_grad for p in module.parameters()) is not frozen
            module(x).sum().backward()
            assert (module[0].weight.grad is None) is frozen
            if broken:
                raise KeyError("mine")
    except KeyError:
        assert broken
    assert x.grad is not None
    assert unchanged(before, look(module))


def test_modes_stay_without_eval_and_come_back():
    module = make()
    before = look(module)
    with untouched(module, eval=False):
        assert [part.training for part in module.modules()] == [True, True, False, True, True]
        module.eval()
    assert unchanged(before, look(module))


def test_buffers():
    module = nn.BatchNorm1d(2)
    mean = module.running_mean
    for kept in (False, True):
        values = {name: b.clone() for name, b in module.named_buffers()}
        with untouched(module, eval=False, buffers=kept):
            module(torch.randn(8, 2) + 5)
        same = all(torch.equal(b, values[name]) for name, b in module.named_buffers())
        assert same is kept
    with untouched(module, buffers=True):
        module.running_mean = torch.zeros(2)
    assert module.running_mean is mean


def test_rng():
    torch.manual_seed(0)
    with untouched(nn.Linear(1, 1), rng=True):
        first = torch.rand(2), np.random.rand()  # noqa: NPY002
    again = torch.rand(2), np.random.rand()  # noqa: NPY002
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    with untouched(nn.Linear(1, 1)):
        first = torch.rand(2)
    assert not torch.equal(first, torch.rand(2))


def test_only_modules():
    with (
        pytest.raises(InputError, match=r"modules has a function, wanted torch.nn.Module"),
        untouched(make, make()),
    ):
        pass


def test_logits_of():
    x = torch.ones(2)
    for output in (x, types.SimpleNamespace(logits=x), {"logits": x}, (x, None), [x]):
        assert logits_of(output) is x
    for output in (None, {"loss": x}, (None, x), (), types.SimpleNamespace(logits=3), "text"):
        with pytest.raises(
            ShapeError, match=rf"returned a {type(output).__name__} without logits; wanted a tensor"
        ):
            logits_of(output)


def test_load_object_from_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_zoo.py").write_text(
        "import os\nfrom pathlib import Path\nclass Net:\n    size = 3\n_hidden = 1\ndef build(): return 7\n"
    )
    (tmp_path / "my_many.py").write_text("".join(f"name_{number} = {number}\n" for number in range(20)))
    (tmp_path / "my_broken.py").write_text("import no_such_dependency")
    monkeypatch.chdir(tmp_path)
    import sys

    before = list(sys.path)
    assert load_object("my_zoo:build")() == 7
    assert load_object("my_zoo:Net.size") == 3
    assert load_object("os.path:join")("a") == "a"
    with pytest.raises(InputError, match=r"my_zoo has no 'buld'; it has \['build', 'Net'\]$"):
        load_object("my_zoo:buld")
    with pytest.raises(InputError, match=r"it has \['name_17', .*\] and 12 more$"):
        load_object("my_many:name_170")
    with pytest.raises(
        InputError, match=r"no module 'my_zo'; the current directory has \['my_broken', 'my_many', 'my_zoo'\]"
    ):
        load_object("my_zo:build")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        load_object("my_broken:x")
    assert sys.path == before


@pytest.mark.parametrize("path", ["my_zoo", "my_zoo:", ":build", "a/b.py:x", "a:b:c", ""])
def test_load_object_form(path):
    with pytest.raises(InputError, match="names no object, wanted 'module:name'"):
        load_object(path)


def test_load_object_says_what_named_it():
    with pytest.raises(InputError, match=r"^student 'math:nothing': math has no 'nothing'"):
        load_object("math:nothing", "student")
