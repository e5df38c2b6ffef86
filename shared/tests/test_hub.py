"""Models as folders, and words where there is none."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from fusion_core import hub
from fusion_core.checkpoint import load_tensors, save_tensors
from fusion_core.errors import CheckpointError


class Net(nn.Module, PyTorchModelHubMixin):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def _save_pretrained(self, save_directory):
        save_tensors(Path(save_directory) / hub.WEIGHTS, self.state_dict())


def test_a_folder_has_weights_and_a_card_that_is_kept(tmp_path):
    net = Net()
    assert hub.save_model(net, tmp_path / "net", {}) is None
    found = load_tensors(hub.model_file(tmp_path / "net", hub.WEIGHTS))
    torch.testing.assert_close(found["layer.weight"], net.layer.weight.detach())
    card = tmp_path / "net" / "README.md"
    card.write_text("mine")
    hub.save_model(net, tmp_path / "net", {})
    assert card.read_text() == "mine"


def test_the_hub_is_named_after_the_folder(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(Net, "push_to_hub", lambda self, **words: asked.update(words) or "address")
    options = {"push_to_hub": True, "private": True, "config": {}}
    assert hub.save_model(Net(), tmp_path / "net", options) == "address"
    assert asked == {"repo_id": "net", "private": True}
    assert options == {"push_to_hub": True, "private": True, "config": {}}


@pytest.mark.parametrize("name", ["nobody/nothing", "not a name"])
def test_what_is_nowhere_is_told(name):
    with pytest.raises(CheckpointError, match=r"neither a folder with config.json and model.safetensors"):
        hub.model_file(name, hub.CONFIG, local_files_only=True)
