"""The demo's second process: memes, their debates and the light judges, while the first one loads PyTorch.

Started as ``python -m meme_debate.stand_in_work FOLDER PLAN``. It writes files into the folder and says on
its output, a JSON line each, what is there; a line on its input asks for the linear judge of a seed's
pictures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusion_core.errors import FusionError

from .ablations import judge_text
from .debate import Debater
from .meme import Debate, Meme, load_debates, save_debates
from .stand_in_memes import HELD_OUT, StandIn, debater, make_memes, pixels_of_memes

__all__ = ["SCALES", "Scale", "Worker"]

Floats = NDArray[np.float64]
TEXT_ONLY, LIGHT, VERDICT = "text", "light", "verdict"


class Scale(NamedTuple):
    """How much of everything."""

    train: int
    test: int
    unseen: int
    seeds: int
    steps: int
    lr: float
    fusions: tuple[Any, ...]
    new_memes: bool


SCALES = {
    "quick": Scale(768, 400, 0, 3, 160, 3e-3, ("none", "layerwise"), False),
    "full": Scale(1024, 512, 256, 5, 400, 2e-3, ("none", "final", "layerwise"), True),
}


class Part(NamedTuple):
    """Memes of one part with their debates."""

    items: list[StandIn]
    debates: list[Debate]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) 1 = a jibe."""
        return np.array([each.meme.label for each in self.items], np.int64)


class Worker:
    """The second process, from the first one's side; a context manager.

    Args:
        folder: gets the pictures and files; must outlive the worker.
        scale: how much of everything.
        seeds: of memes and debates.

    Raises:
        FusionError: it ended before its work was done; what it said last is in the message.
    """

    def __init__(self, folder: Path, scale: Scale, seeds: Sequence[int]) -> None:
        self.folder, self.scale, self.seeds = folder, scale, list(seeds)
        self._said: list[dict[str, Any]] = []
        self._process: Any = None

    def __enter__(self) -> Worker:
        """Start the process."""
        plan = json.dumps({"scale": self.scale, "seeds": self.seeds})
        command = [sys.executable, "-m", __name__, str(self.folder), plan]
        self._errors = (self.folder / "worker.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it; what nobody waited for is not needed."""
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _wait(self, what: str, seed: int) -> dict[str, Any]:
        wanted = (what, seed)
        while True:
            for said in self._said:
                if (said["what"], said["seed"]) == wanted:
                    return said
            line = self._process.stdout.readline()
            if not line:
                self._errors.seek(0)
                told = self._errors.read().strip().splitlines()
                raise FusionError(
                    f"the demo's second process ended: {told[-1] if told else 'it said nothing'}"
                )
            self._said.append(json.loads(line))

    def memes_seed(self, seed: int) -> int:
        """The seed whose memes a seed has."""
        return seed if self.scale.new_memes else self.seeds[0]

    def parts(self, seed: int) -> dict[str, Part]:
        """Memes and debates of a seed by part, once they are there."""
        self._wait("debates", seed)
        return read_parts(self.folder, self.memes_seed(seed), seed)

    def pixels(self, seed: int) -> dict[str, NDArray[np.float32]]:
        """The pictures of a seed's memes by part, (N, 3, S, S), none withheld."""
        self._wait("debates", seed)
        with np.load(self.folder / f"pixels-{self.memes_seed(seed)}.npz") as found:
            return dict(found)

    def report(self, seed: int, *, again: bool = False) -> dict[str, Any]:
        """What the debates of a seed took, or (of the first seed) a second run over the cache."""
        return self._wait("again" if again else "debates", seed)["report"]

    def light(self, seed: int) -> dict[str, dict[str, Floats]]:
        """Scores of the judges of words, and the verdicts, by row and part."""
        return _read_scores(self.folder / self._wait("light", seed)["file"])

    def ask_pictures(self, seed: int, states: Mapping[str, NDArray[np.float32]]) -> None:
        """Ask for the linear judge of pictures.

        Args:
            seed: whose labels it learns.
            states: (N, D) of each part's pictures.
        """
        arrays: Any = dict(states)
        np.savez(self.folder / f"states-{seed}.npz", **arrays)
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()

    def pictures(self, seed: int) -> dict[str, Floats]:
        """Scores of the linear judge of pictures by part."""
        return _read_scores(self.folder / self._wait("pictures", seed)["file"])["pictures"]


def _read_scores(path: Path) -> dict[str, dict[str, Floats]]:
    document = json.loads(path.read_text("utf-8"))
    return {
        row: {part: np.array(values) for part, values in parts.items()} for row, parts in document.items()
    }


def _write_scores(path: Path, rows: Mapping[str, Mapping[str, Floats]]) -> str:
    document = {row: {part: list(map(float, v)) for part, v in parts.items()} for row, parts in rows.items()}
    path.write_text(json.dumps(document), encoding="utf-8")
    return path.name


def write_items(folder: Path, seed: int, parts: Mapping[str, Sequence[StandIn]]) -> None:
    """Write what is known of the memes of a seed."""
    document = {
        name: [
            [m.id, str(m.image), m.text, m.label, m.split, each.thing, each.hidden, each.digest]
            for each in part
            for m in [each.meme]
        ]
        for name, part in parts.items()
    }
    (folder / f"memes-{seed}.json").write_text(json.dumps(document), encoding="utf-8")


def read_items(folder: Path, seed: int) -> dict[str, list[StandIn]]:
    """What :func:`write_items` wrote."""
    document = json.loads((folder / f"memes-{seed}.json").read_text("utf-8"))
    return {
        name: [
            StandIn(
                Meme(name_, Path(image), text, "", label, split=split, group=thing, source="stand-in"),
                thing, hidden, digest,
            )
            for name_, image, text, label, split, thing, hidden, digest in part
        ]
        for name, part in document.items()
    }  # fmt: skip


def read_parts(folder: Path, memes: int, seed: int) -> dict[str, Part]:
    """Memes and debates by part, as they are in the folder.

    Args:
        folder: the worker's.
        memes: the seed of the memes.
        seed: that of the debates.
    """
    by_id = {debate.id: debate for debate in load_debates(folder / f"debates-{seed}.jsonl")}
    return {
        name: Part(part, [by_id[each.meme.id] for each in part])
        for name, part in read_items(folder, memes).items()
    }


def make_parts(folder: Path, scale: Scale, seed: int) -> dict[str, list[StandIn]]:
    """The memes of a seed by part."""
    place = folder / f"{seed}"
    counts = {"train": scale.train, "test": scale.test}
    found = {name: make_memes(place, count, seed=seed, split=name) for name, count in counts.items()}
    if scale.unseen:
        found["unseen"] = make_memes(place, scale.unseen, seed=seed, split="unseen", things=HELD_OUT)
    return found


def hold(folder: Path, url: str, parts: Mapping[str, Sequence[StandIn]], seed: int) -> Any:
    """Debates over HTTP by the real client, with a cache."""
    who = Debater(url, f"stand-in-{seed}", cache=folder / f"debates-{seed}.sqlite", swap=False)
    return who.run([each.meme for part in parts.values() for each in part], 32, progress=False)


def scored(parts: Mapping[str, Part], *, debated: bool) -> dict[str, Floats]:
    """Scores of a light judge by part, which learns from the part ``train``."""
    from .text_judge import TextJudge

    texts = {
        name: [
            judge_text(each.judged, said if debated else None)
            for each, said in zip(part.items, part.debates, strict=True)
        ]
        for name, part in parts.items()
    }
    judge = TextJudge(min_df=2).fit(texts["train"], parts["train"].labels)
    return {name: judge.predict_proba(texts[name]) for name in parts if name != "train"}


def verdicts(parts: Mapping[str, Part]) -> dict[str, Floats]:
    """The debating model's verdicts by part; 0.5 where it has none."""
    return {
        name: np.array([0.5 if said.verdict is None else said.verdict for said in part.debates], np.float64)
        for name, part in parts.items()
        if name != "train"
    }


def picture_rows(states: Mapping[str, Any], labels: NDArray[np.int64]) -> dict[str, Floats]:
    """Scores of a linear judge of the tower's states (N, D), which learns from the part ``train``."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    model.fit(states["train"], labels)
    return {name: model.predict_proba(states[name])[:, 1] for name in states if name != "train"}


def work(folder: Path, scale: Scale, seeds: Sequence[int], asked: Iterator[str]) -> Iterator[dict[str, Any]]:
    """All the work, told piece by piece.

    Args:
        folder: for the files.
        scale: how much of everything.
        seeds: of memes and debates.
        asked: seeds whose states of pictures are in the folder; read when the rest is done.
    """
    groups = [[seed] for seed in seeds] if scale.new_memes else [list(seeds)]
    labels: dict[int, NDArray[np.int64]] = {}
    for group in groups:
        parts = make_parts(folder, scale, group[0])
        write_items(folder, group[0], parts)
        seen: Any = {name: pixels_of_memes(part) for name, part in parts.items()}
        np.savez(folder / f"pixels-{group[0]}.npz", **seen)
        held: dict[int, dict[str, Part]] = {}
        with debater([each for part in parts.values() for each in part], folder) as url:
            for seed in group:
                debates = hold(folder, url, parts, seed)
                save_debates(folder / f"debates-{seed}.jsonl", debates)
                yield {"what": "debates", "seed": seed, "report": debates.report.to_dict()}
                by_id = {debate.id: debate for debate in debates}
                held[seed] = {
                    name: Part(list(part), [by_id[each.meme.id] for each in part])
                    for name, part in parts.items()
                }
            if group[0] == seeds[0]:
                again = hold(folder, url, parts, group[0]).report
                yield {"what": "again", "seed": group[0], "report": again.to_dict()}
        words = scored(held[group[0]], debated=False)  # which have no debate in them, so all seeds share them
        for seed, made in held.items():
            labels[seed] = made["train"].labels
            rows = {TEXT_ONLY: words, LIGHT: scored(made, debated=True), VERDICT: verdicts(made)}
            file = _write_scores(folder / f"light-{seed}.json", rows)
            yield {"what": "light", "seed": seed, "file": file}
    for line in asked:
        seed = int(line)
        with np.load(folder / f"states-{seed}.npz") as states:
            rows = {"pictures": picture_rows(dict(states), labels[seed])}
        file = _write_scores(folder / f"pictures-{seed}.json", rows)
        yield {"what": "pictures", "seed": seed, "file": file}


def main() -> None:
    """Work until the input ends."""
    plan = json.loads(sys.argv[2])
    try:
        for said in work(Path(sys.argv[1]), Scale(*plan["scale"]), plan["seeds"], iter(sys.stdin)):
            sys.stdout.write(json.dumps(said) + "\n")
            sys.stdout.flush()
    except FusionError as error:  # the first process repeats the line
        sys.stderr.write(f"{error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
