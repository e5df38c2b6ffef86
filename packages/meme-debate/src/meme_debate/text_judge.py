"""The light judge: TF-IDF and logistic regression on the composed text, in seconds on one core."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusion_core.checkpoint import atomic_directory, digest, load_tensors, save_tensors
from fusion_core.errors import LARGEST, CheckpointError, DataError, InputError, check_range, reading
from fusion_core.progress import track
from fusion_core.seeding import rng

from .ablations import judge_text, labels_of, paired
from .calibrate import Calibration, calibrate
from .composing import First
from .meme import Debate, Meme
from .scoring import check_labels
from .settings import JudgeSettings
from .tfidf import WORD, TfIdf

__all__ = ["TextJudge", "folds"]

Floats = NDArray[np.float64]
SCHEMA = "meme-debate.text-judge/1"
CONFIG, WEIGHTS, CALIBRATION, CARD = "config.json", "model.safetensors", "calibration.json", "card.md"


def folds(labels: Sequence[int] | NDArray[Any], count: int = 5, seed: int = 0) -> list[NDArray[np.int64]]:
    """Rows of ``count`` parts of about equal size and share of each class, drawn by the seed.

    Raises:
        DataError: a class has fewer members than parts.
    """
    truth = np.asarray(labels)
    parts: list[list[int]] = [[] for _ in range(count)]
    draws = rng(seed, "folds")
    for value in np.unique(truth):
        rows = draws.permutation(np.flatnonzero(truth == value))
        if len(rows) < count:
            raise DataError(
                f"class {value} has {len(rows)} members, wanted at least {count} for {count} folds"
            )
        for place, row in enumerate(rows):
            parts[place % count].append(int(row))
    return [np.array(sorted(part), np.int64) for part in parts]


class TextJudge:
    """A linear judge of words and word pairs (scikit-learn's regression); it does not see the picture.

    Args:
        c: inverse strength of the regularization.
        min_df: texts that a word or pair must occur in to count.
        ngrams: longest run of words.
        settings: what the judge carries; see :class:`JudgeSettings`.

    Attributes:
        held_out: raw scores (N,) that the folds of :meth:`fit_memes` gave its memes, for plots; not saved.

    Raises:
        InputError: a number out of its range.

    Example:
        >>> judge = TextJudge().fit(["a rude joke", "a nice cat", "rude words", "nice day"], [1, 0, 1, 0])
        >>> bool(judge.predict_proba(["rude"])[0] > 0.5)
        True
    """

    kind: ClassVar[Literal["text"]] = "text"
    fusion: ClassVar[None] = None

    def __init__(
        self,
        c: float = 10.0,
        *,
        min_df: int = 1,
        ngrams: int = 2,
        settings: JudgeSettings | None = None,
    ) -> None:
        self.c = float(check_range("c", c, 0, open=True))
        self.min_df, self.ngrams = (
            int(check_range("min_df", min_df, 1)),
            int(check_range("ngrams", ngrams, 1, 10)),
        )
        self.settings = settings or JudgeSettings(name="text judge", image=False)
        self.calibration = Calibration()
        self.held_out: Floats | None = None
        self.coef: Floats | None = None
        self.intercept = 0.0
        self._tfidf: TfIdf | None = None

    def fit(self, texts: Sequence[str], labels: ArrayLike) -> Self:
        """Learn from texts, such as :func:`meme_debate.compose` makes them.

        Args:
            texts: N texts.
            labels: (N,) 1 = harmful.

        Returns:
            The judge itself.

        Raises:
            DataError: labels that are not 0 or 1, one class only, or texts without a single word.
            ShapeError: another number of labels than texts.
        """
        from sklearn.linear_model import LogisticRegression

        rows = _texts(texts)
        truth = check_labels(labels, len(rows))
        if len(np.unique(truth)) < 2:
            held = f"only class {int(truth[0])}" if len(truth) else "nothing"
            raise DataError(f"labels holds {held}; a judge learns from harmless and harmful memes")
        tfidf = TfIdf(self.ngrams, self.min_df)
        matrix = tfidf.fit_transform(rows)
        model = LogisticRegression(C=self.c, class_weight="balanced", max_iter=1000, solver="lbfgs")
        model.fit(matrix, truth)
        self._tfidf = tfidf
        coef: Any = model.coef_
        intercept: Any = model.intercept_
        self.coef, self.intercept = np.asarray(coef[0], np.float64), float(intercept[0])
        self.calibration, self.held_out = Calibration(), None
        return self

    def predict_proba(self, texts: Sequence[str]) -> Floats:
        """The probability of harmful, uncalibrated, float64 (N,).

        Raises:
            InputError: not fitted yet.
        """
        tfidf, coef = self._learned()
        rows = _texts(texts)
        if not rows:
            return np.zeros(0)
        logits = tfidf.transform(rows) @ coef + self.intercept
        return np.exp(-np.logaddexp(0.0, -logits))

    def texts(
        self, memes: Sequence[Meme], debates: Sequence[Debate | None], *, first: First = "verdict"
    ) -> list[str]:
        """What the judge reads of each meme."""
        how = {"first": first, "caption": self.settings.caption, "ablation": self.settings.ablation}
        return [judge_text(meme, debate, **how) for meme, debate in zip(memes, debates, strict=True)]

    def fit_memes(
        self,
        memes: Sequence[Meme],
        debates: Iterable[Debate] | Mapping[str, Debate] | None = None,
        *,
        calibration: bool = True,
        seed: int = 0,
        progress: bool | None = None,
        **costs: Any,
    ) -> Self:
        """Learn from labeled memes and their debates, and calibrate on five held-out folds.

        Args:
            memes: each with a label.
            debates: by id; memes without one are read without.
            calibration: False, or fewer than 10 memes of a class, leaves the scores as they are.
            seed: of the folds.
            progress: None shows a bar on a terminal.
            **costs: ``miss``, ``alarm``, ``coverage``, ``max_error`` of
                :func:`meme_debate.calibrate.calibrate`.

        Raises:
            DataError: a meme without label, an id twice, a debate of no meme, or one class only.
        """
        rows = list(memes)
        found, truth = paired(rows, debates), check_labels(labels_of(rows))
        texts = self.texts(rows, found)
        self.fit(texts, truth)
        if calibration and min(np.bincount(truth, minlength=2)) >= 10:
            self.held_out = self.cross_scores(texts, truth, seed=seed, progress=progress)
            self.calibration = calibrate(self.held_out, truth, **costs)
        return self

    def cross_scores(
        self,
        texts: Sequence[str],
        labels: ArrayLike,
        *,
        count: int = 5,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Floats:
        """Scores of each text by a judge of the same settings that learned from the other folds."""
        rows = _texts(texts)
        truth = check_labels(labels, len(rows))
        scores = np.zeros(len(rows))
        for part in track(folds(truth, count, seed), "folds", enabled=progress):
            rest = np.setdiff1d(np.arange(len(rows)), part)
            other = TextJudge(self.c, min_df=self.min_df, ngrams=self.ngrams, settings=self.settings)
            other.fit([rows[int(i)] for i in rest], truth[rest])
            scores[part] = other.predict_proba([rows[int(i)] for i in part])
        return scores

    def score_memes(
        self,
        memes: Sequence[Meme],
        debates: Sequence[Debate | None],
        *,
        first: First = "verdict",
        calibrated: bool = True,
    ) -> Floats:
        """Scores (N,) of memes with their debates (None = without)."""
        if not memes:
            return np.zeros(0)
        scores = self.predict_proba(self.texts(memes, debates, first=first))
        return self.calibration.apply(scores) if calibrated else scores

    def _learned(self) -> tuple[TfIdf, Floats]:
        if self._tfidf is None or self.coef is None:
            raise InputError("the judge has learned nothing yet; call fit or fit_memes, or load one")
        return self._tfidf, self.coef

    @property
    def vocabulary(self) -> dict[str, int]:
        """Word or pair -> its column.

        Raises:
            InputError: not fitted yet.
        """
        return dict(self._learned()[0].columns)

    @property
    def idf(self) -> Floats:
        """Weight of each column, (V,).

        Raises:
            InputError: not fitted yet.
        """
        return self._learned()[0].idf

    def digest(self) -> str:
        """Of words, weights and calibration: which judge it was."""
        if self.coef is None:
            return digest(self.kind)
        return digest(
            self.vocabulary,
            self.idf,
            self.coef,
            self.intercept,
            self.settings.to_dict(),
            self.calibration.to_dict(),
        )

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write ``config.json``, ``model.safetensors``, ``calibration.json`` and ``card.md``; no pickle.

        Raises:
            InputError: not fitted yet, or the folder is there and not empty without ``overwrite``.
        """
        import torch

        words = self._learned()[0].terms
        config = {
            "schema": SCHEMA,
            "kind": self.kind,
            "c": self.c,
            "min_df": self.min_df,
            "ngrams": self.ngrams,
            "settings": self.settings.to_dict(),
            "vocabulary": words,
        }
        with atomic_directory(folder, overwrite=overwrite) as place:
            text = json.dumps(config, ensure_ascii=False, allow_nan=False)
            (place / CONFIG).write_text(text + "\n", encoding="utf-8")
            weights = {"idf": self.idf, "coef": self.coef, "intercept": np.array([self.intercept])}
            save_tensors(
                place / WEIGHTS, {k: torch.tensor(v, dtype=torch.float64) for k, v in weights.items()}
            )
            (place / CALIBRATION).write_text(json.dumps(self.calibration.to_dict()), encoding="utf-8")
            (place / CARD).write_text(self.settings.card(self.kind, None), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: missing, damaged or of another kind.
        """
        place = Path(folder)
        with reading(folder, "holds no text judge", CheckpointError):
            config = json.loads((place / CONFIG).read_text("utf-8"))
            if config.get("schema") != SCHEMA:
                raise CheckpointError(f"{folder} has schema {config.get('schema')!r}, wanted {SCHEMA!r}")
            judge = cls(
                config["c"],
                min_df=config["min_df"],
                ngrams=config["ngrams"],
                settings=JudgeSettings.from_dict(config["settings"]),
            )
            words = [str(word) for word in config["vocabulary"]]
        size = (len(words),)
        shapes: dict[str, tuple[int, ...]] = {"idf": size, "coef": size, "intercept": (1,)}
        with reading(place / WEIGHTS, "holds no text judge", CheckpointError):
            arrays = load_tensors(place / WEIGHTS, shapes=shapes)
            for name, array in arrays.items():
                if not array.is_floating_point() or not bool((array.abs() <= LARGEST).all()):
                    raise CheckpointError(f"{name} holds values other than numbers up to {LARGEST:g}")
            idf, judge.coef = (arrays[name].double().numpy() for name in ("idf", "coef"))
            if not (idf >= 1).all():  # log((1 + texts) / (1 + texts with it)) + 1
                raise CheckpointError("idf goes below 1, which is that of a word that all texts have")
            judge.intercept = float(arrays["intercept"][0])
        try:
            judge._tfidf = TfIdf.of(words, idf, judge.ngrams)
        except DataError as error:
            raise CheckpointError(f"{folder} holds no text judge: vocabulary: {error}") from error
        if (place / CALIBRATION).is_file():
            judge.calibration = Calibration.load(place / CALIBRATION)
        return judge

    def word_weights(self, text: str) -> list[tuple[int, int, float]]:
        """How much each word of a text moves the logit: exact for this linear judge.

        Returns:
            (start, end, weight) of each word by character offsets; a pair's weight is shared by its words.
            The weights sum to the logit without its intercept.
        """
        tfidf, coef = self._learned()
        spans = [match.span() for match in WORD.finditer(text)]
        row = tfidf.transform([text])
        counts: dict[int, list[tuple[int, ...]]] = {}
        words = [text[a:b].lower() for a, b in spans]
        for size in range(1, self.ngrams + 1):
            for at in range(len(words) - size + 1):
                column = tfidf.columns.get(" ".join(words[at : at + size]))
                if column is not None:
                    counts.setdefault(column, []).append(tuple(range(at, at + size)))
        weights = np.zeros(len(spans))
        for column, value in zip(row.indices, row.data, strict=True):
            places = counts.get(int(column), [])
            for place in places:
                weights[list(place)] += value * coef[column] / len(places) / len(place)
        return [(a, b, float(w)) for (a, b), w in zip(spans, weights, strict=True)]


def _texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise InputError("texts is one text, wanted a list of texts")
    rows = list(texts)
    for row in rows:
        if not isinstance(row, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"texts holds a {type(row).__name__}, wanted texts")
    return rows
