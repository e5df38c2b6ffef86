"""The demo with the shipped checkpoint, and the words of its claims."""

import json

import pytest

from dbnet_asf.cli import main
from dbnet_asf.demo import BASELINE, OURS
from fusion_core.testing import run_cli


@pytest.mark.slow
def test_quick_demo(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("dbnet_asf.demo", fromlist=["SCENES"]).SCENES, "quick", 3)
    done = run_cli(main, "demo", "--out", tmp_path / "demo", "--json")
    assert done.code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["status"] == "ok"
    assert {row["method"] for row in document["tables"][0]["rows"]} == {BASELINE, OURS}
    assert len(document["claims"]) == 3
    assert document["claims"][0]["shown"] is True
    assert document["claims"][1]["shown"] is None  # needs two networks of equal training
    for figure in document["figures"]:
        assert (tmp_path / "demo" / figure["file"]).is_file()
        assert figure["alt"]
    assert (tmp_path / "demo" / "report.html").is_file()
