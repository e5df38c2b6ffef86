import json
import os
import sys
import time
from functools import partial
from typing import Annotated

import numpy as np
import pytest
import torch
import typer

from fusion_core import bench, cli
from fusion_core.errors import ConfigError, FusionError, InputError
from fusion_core.testing import run_cli

MODULE = """
import os
import numpy as np

def big():
    return np.ones(8_000_000).sum()

def small():
    return np.ones(1_000_000).sum()

def dies():
    os._exit(3)

def fails():
    raise AttributeError("its own")
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "bench_functions.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import bench_functions

    yield bench_functions
    sys.modules.pop("bench_functions")


def test_paired_alternates_and_gives_the_ratio(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    calls = []

    def ours():
        calls.append("a")
        clock[0] += 1.0

    def reference():
        calls.append("b")
        clock[0] += 3.0

    row = bench.paired("x", ours, reference, repeats=3, warmup=2, target=">= 3", dtype="float32", note="n")
    assert (
        "".join(calls) == "abab" + "ab" + "ab" + "ba" + "ab"
    )  # warm-up, one to find the number of calls, pairs
    assert (row.ours_s, row.reference_s, row.ratio) == (1.0, 3.0, 3.0)
    assert (row.ratio_low, row.ratio_high) == (3.0, 3.0)
    assert row.met is True
    assert (row.repeats, row.reference, row.threads) == (3, "reference", torch.get_num_threads())


def test_paired_interval_covers_noise(monkeypatch):
    clock = [0.0]
    noise = iter(np.random.default_rng(0).uniform(0.5, 1.5, 1000))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def tick():
        clock[0] += next(noise)

    row = bench.paired("x", tick, tick, repeats=25)
    assert row.ratio_low < row.ratio < row.ratio_high
    assert row.ratio_low < 1 < row.ratio_high


def test_short_calls_are_repeated():
    count = [0]

    def tiny():
        count[0] += 1

    row = bench.paired("x", tiny, lambda: time.sleep(0.003), repeats=1)
    assert count[0] > 10
    assert row.ratio > 10


def test_paired_on_each_device(device):
    x = torch.ones(64, 64, device=device)
    row = bench.paired("matmul", lambda: x @ x, lambda: [x @ x for _ in range(20)], repeats=5, device=device)
    assert row.ratio > 2
    assert row.device.startswith(device)


@pytest.mark.parametrize(
    ("ratio", "target", "met"),
    [
        (3, ">= 3", True),
        (2.9, ">=3", False),
        (3, "> 3", False),
        (1, "<= 1.0", True),
        (1, "< 1", False),
        (1, None, None),
    ],
)
def test_targets(ratio, target, met):
    assert bench.check_target(ratio, target) is met


@pytest.mark.parametrize("target", ["3x", "== 3", ">= fast", ""])
def test_bad_targets_are_refused_before_any_work(target):
    with pytest.raises(ConfigError, match="target"):
        bench.paired("x", pytest.fail, pytest.fail, target=target)


def test_bad_repeats():
    with pytest.raises(ConfigError, match="repeats is 0"):
        bench.paired("x", pytest.fail, pytest.fail, repeats=0)


@pytest.mark.skipif(os.name == "nt", reason="no high-water mark")
def test_peak_memory_is_that_of_the_call(functions):
    big = bench.peak_memory("bench_functions:big")
    small = bench.peak_memory(functions.small)
    assert 60e6 < big < 90e6
    assert 6e6 < small < 30e6


@pytest.mark.skipif(os.name == "nt", reason="no high-water mark")
def test_peak_memory_errors(functions):
    with pytest.raises(InputError, match="module:function"):
        bench.peak_memory(lambda: None)
    with pytest.raises(FusionError, match="died"):
        bench.peak_memory(functions.dies)
    with pytest.raises(AttributeError, match="its own"):
        bench.peak_memory(functions.fails)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_memory_on_cuda():
    peak = bench.peak_memory(lambda: torch.ones(1024, 1024, device="cuda").sum(), "cuda")
    assert 4 * 2**20 <= peak < 6 * 2**20


def test_document_and_table(tmp_path, capsys):
    made = bench.Bench("fusion-core")
    made.add(
        bench.paired("time", lambda: None, lambda: sum(range(50)), repeats=2, target=">= 1000000", note="[n]")
    )
    made.add(bench.memory_row("memory", 2**20, 3 * 2**20, target=">= 2", against="naive"))
    made.save(tmp_path / "bench.json")
    document = json.loads((tmp_path / "bench.json").read_text())
    assert list(document) == ["schema", "package", "version", "date", "environment", "rows"]
    assert document["schema"] == "fusion.bench/1"
    assert set(document["rows"][0]) == {
        "name", "device", "threads", "dtype", "ours_s", "reference_s", "reference", "ratio", "ratio_low",
        "ratio_high", "repeats", "ours_peak_bytes", "reference_peak_bytes", "target", "met", "note",
    }  # fmt: skip
    assert [row["met"] for row in document["rows"]] == [False, True]
    assert document["rows"][1]["ratio"] == 3.0
    made.print()
    text = capsys.readouterr().out
    for word in ("missed", "1.0 MiB", "3.0 MiB (naive)", "3.00", "[n]"):
        assert word in text


def test_add_bench_gives_a_verb_with_shared_and_own_options(tmp_path, monkeypatch, capsys):
    (tmp_path / "some_tool").mkdir()
    (tmp_path / "some_tool" / "__init__.py").write_text("")
    (tmp_path / "some_tool" / "bench.py").write_text(
        "import torch\nfrom fusion_core.bench import Bench, memory_row\n"
        "def run(*, repeats, device, size):\n"
        "    made = Bench('fusion-core')\n"
        "    made.add(memory_row(f'{repeats} {device} {size} {torch.get_num_threads()}', 1, 2))\n"
        "    return made\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    app = cli.new_app("some-tool", "Does things.", "1.2.3")
    size = Annotated[int, typer.Option("--size", help="Of the work.")]
    bench.add_bench(app, "some-tool", "Time the work.", size=(size, 3))
    main = partial(cli.run, app)
    before = torch.get_num_threads()
    done = run_cli(main, "bench", "--repeats", 2, "--device", "cpu", "--out", tmp_path / "b.json", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["name"] == "2 cpu 3 1"
    assert json.loads((tmp_path / "b.json").read_text())["rows"] == json.loads(done.stdout)["rows"]
    assert torch.get_num_threads() == before
    text = " ".join(run_cli(main, "bench", "--help").stdout.split())
    assert "Example: some-tool bench --out bench.json" in text
    for option in ("--out", "-o", "--repeats", "--device", "--threads", "--size", "--json"):
        assert option in text
    script = run_cli(partial(cli.run, app, "bench"), "--size", 9, "--device", "cpu", "--json")
    assert json.loads(script.stdout)["rows"][0]["name"] == "5 cpu 9 1"
    assert run_cli(main, "bench", "--device", "cuda:99").code == 2
