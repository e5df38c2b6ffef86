"""Commands and readers of kd-trilateral."""

from __future__ import annotations

from pathlib import Path

from faults.cases.common import bench, demo, do
from faults.garbage import Reader
from faults.kill import Command

MAIN = "kd_trilateral.cli:main"
RUN = """
data = "kd_trilateral.tasks:digits_splits"
student = "kd_trilateral.tasks:digits_student"
temperature = 4.0
steps = 20
batch_size = 64
lr = 1e-2
device = "cpu"
"""
CACHE = (
    "cache",
    "build",
    "--teacher",
    "kd_trilateral.tasks:digits_student",
    "--data",
    "kd_trilateral.tasks:digits_splits",
    "--top-k",
    "3",
    "--device",
    "cpu",
    "-q",
    "--out",
)


def inputs(place: Path) -> None:
    """Settings, a finished run and a cache."""
    (place / "run.toml").write_text(RUN)
    (place / "run.json").write_text(
        '{"steps": 5, "lr": 0.01, "geometry": ["sq:st", "sq:sg"], "alpha_range": [0.1, 0.9]}'
    )
    do(MAIN, "train", place / "run.toml", "--out", place / "run", "-q")
    do(MAIN, *CACHE, place / "teacher.kdc")
    (place / "cached.toml").write_text(
        RUN.replace("steps = 20", "steps = 2") + f'teacher = "{place}/teacher.kdc"\n'
    )


COMMANDS = [
    Command(
        name="kd-trilateral train",
        main=MAIN,
        make=inputs,
        again=("--resume",),
        look=("inspect", "run", "--json"),
        grows=True,
        argv=("train", "{in}/run.toml", "--set", "epochs=3", "--set", "steps=0", "--out", "run", "-q"),
    ),
    Command(
        name="kd-trilateral compare",
        main=MAIN,
        make=inputs,
        argv=(
            "compare",
            "{in}/run.toml",
            "--ratios",
            "const:0.5,wls",
            "--seeds",
            "2",
            "--set",
            "steps=4",
            "-q",
            "--out",
            "c",
        ),
    ),
    Command(
        name="kd-trilateral inspect",
        main=MAIN,
        make=inputs,
        argv=("inspect", "{in}/run", "--out", "suspects.csv"),
    ),
    Command(
        name="kd-trilateral plot", main=MAIN, make=inputs, argv=("plot", "{in}/run", "--out", "alpha.png")
    ),
    Command(
        name="kd-trilateral cache build",
        main=MAIN,
        make=inputs,
        argv=(*CACHE, "teacher.kdc"),
        look=("cache", "verify", "teacher.kdc", "--json"),
    ),
    bench("kd-trilateral"),
    demo("kd-trilateral"),
]


def _run(file: str, kind: str) -> Reader:
    return Reader(
        name=f"kd-trilateral inspect {file}",
        main=MAIN,
        make=inputs,
        argv=("inspect", "{in}/run"),
        kind=kind,
        file=f"run/{file}",
        named=("run",),
    )


def _cache(verb: str, file: str, kind: str) -> Reader:
    return Reader(
        name=f"kd-trilateral cache {verb} {file}",
        main=MAIN,
        make=inputs,
        argv=("cache", verb, "{in}/teacher.kdc"),
        kind=kind,
        file=f"teacher.kdc/{file}",
        named=("teacher.kdc",),
    )


READERS = [
    Reader(
        name="kd-trilateral train CONFIG (TOML)",
        main=MAIN,
        make=inputs,
        kind="toml",
        file="run.toml",
        argv=("train", "{in}/run.toml", "--set", "steps=2", "--set", "device=cpu", "--out", "run", "-q"),
    ),
    Reader(
        name="kd-trilateral compare CONFIG (JSON)",
        main=MAIN,
        make=inputs,
        kind="json",
        file="run.json",
        argv=(
            "compare",
            "{in}/run.json",
            "--set",
            "data=kd_trilateral.tasks:digits_splits",
            "--seeds",
            "2",
            "--set",
            "student=kd_trilateral.tasks:digits_student",
            "--ratios",
            "const:0.5",
            "--set",
            "steps=1",
            "-q",
        ),
    ),
    _run("config.json", "json"),
    _run("trace.npz", "arrays"),
    _run("audit.npz", "arrays"),
    _run("metrics.jsonl", "json lines"),
    Reader(
        name="kd-trilateral train --resume optimizer.pt",
        main=MAIN,
        make=inputs,
        kind="pickle",
        file="run/optimizer.pt",
        named=("given/run ",),
        argv=("train", "{in}/run.toml", "--out", "{in}/run", "--resume", "-q"),
    ),
    _cache("info", "manifest.json", "json"),
    _cache("verify", "shard-00000.safetensors", "safetensors"),
    Reader(
        name="kd-trilateral train, teacher from a cache",
        main=MAIN,
        make=inputs,
        kind="json",
        file="teacher.kdc/manifest.json",
        named=("teacher.kdc",),
        argv=("train", "{in}/cached.toml", "--set", "teacher={in}/teacher.kdc", "--out", "run", "-q"),
    ),
]
