"""A tokenizer of whole words, for small judges that are trained from nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from fusion_core.errors import InputError

__all__ = ["vocabulary_tokenizer", "word_tokenizer"]

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def word_tokenizer(texts: Iterable[str], *, min_count: int = 1, max_words: int = 30_000) -> Any:
    """A fast tokenizer of words and marks, each one token; lower case.

    Args:
        texts: what it is made from.
        min_count: rarer words are unknown.
        max_words: most words, the most frequent first.

    Returns:
        ``transformers.PreTrainedTokenizerFast`` with ``<pad>`` = 0, ``</s>`` = 1 (put at the end) and
        ``<unk>`` = 2.

    Raises:
        InputError: no words at all.

    Example:
        >>> word_tokenizer(["a cat, a dog"])("A cat!")["input_ids"]
        [3, 5, 2, 1]
    """
    counts: Counter[str] = Counter()
    splitter = _splitter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(text.lower()))
    words = sorted((w for w, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w))
    if not words:
        raise InputError("texts holds no word that is frequent enough, wanted texts to make tokens of")
    return vocabulary_tokenizer(words[:max_words])


def vocabulary_tokenizer(words: Iterable[str]) -> Any:
    """The tokenizer of :func:`word_tokenizer` for words that are known, the first of them with the number 3.

    Example:
        >>> vocabulary_tokenizer(["a", "cat"])("A cat!")["input_ids"]
        [3, 4, 2, 1]
    """
    from tokenizers import Tokenizer, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([PAD, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )


def _splitter() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
