"""Spans, time warping, vocabulary maps and projection: laws, published sides, bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat import align
from fusechat.align.cooccurrence import Cooccurrence
from fusechat.align.counting import PairCounts
from fusechat.align.dynamic import warp
from fusechat.align.mapping import exact_table, nearest_table, statistics_table
from fusechat.align.pairs import token_costs
from fusechat.align.projecting import Published, published_rows
from fusechat.align.vocabulary import Vocabulary, decode_each
from fusechat.errors import UnsupportedTokenizer
from fusechat.spans import encode
from fusechat.texts import Text, render
from fusion_core.errors import ConfigError, InputError, NonFiniteError, ShapeError

TEXTS = [
    "the model reads a text and tells what comes next",
    "naïve cafés 日本 \U0001f600 count  bytes\n\nand blanks ",
    " leading blank",
    "x",
]
ends = st.lists(st.integers(0, 3), max_size=30).map(lambda steps: np.cumsum(steps, dtype=np.int64))
tokens = st.lists(st.text("abc ", max_size=3), min_size=1, max_size=7)


def plain(text):
    return Text(text, ((0, len(text)),), whole=True)


@given(ends, ends)
def test_span_laws(first, second):
    pairs, mirror = align.span(first, second), align.span(second, first)
    assert (pairs.pivot.tolist(), pairs.source.tolist()) == (mirror.source.tolist(), mirror.pivot.tolist())
    assert (np.diff(pairs.pivot) > 0).all()
    assert (np.diff(pairs.source) > 0).all()
    assert (first[pairs.pivot] == second[pairs.source]).all()
    assert set(first[pairs.pivot].tolist()) == set(first.tolist()) & set(second.tolist())
    for own, place in ((first, pairs.pivot), (second, pairs.source)):
        assert all(p + 1 == len(own) or own[p + 1] > own[p] for p in place)  # the last of equal ends


@pytest.mark.parametrize("text", TEXTS)
def test_equal_tokenizers_align_as_the_identity(source_tokenizer, text):
    one = encode(source_tokenizer, plain(text))
    pairs = align.span(one.ends, one.ends)
    last = [n for n in range(len(one)) if n + 1 == len(one) or one.ends[n + 1] != one.ends[n]]
    assert pairs.pivot.tolist() == pairs.source.tolist() == last


@pytest.mark.parametrize("text", TEXTS)
def test_aligned_prefixes_are_the_same_text(source_tokenizer, pivot_tokenizer, text):
    source, pivot = encode(source_tokenizer, plain(text)), encode(pivot_tokenizer, plain(text))
    pairs = align.span(pivot.ends, source.ends)
    assert pairs.pivot[0] <= 1  # before the text: bos, or the blank that is added to it
    assert (pairs.pivot[-1], pairs.source[-1]) == (len(pivot) - 1, len(source) - 1)  # eos with eos
    assert source.ends[-1] == len(text) + 1
    for j in pairs.source[:-1]:
        read = source_tokenizer.decode(source.ids[1 : j + 1])
        assert read == text[: source.ends[j]]


def test_split_characters_align_at_their_last_byte(source_tokenizer):
    one = encode(source_tokenizer, plain("a\U0001f600b"))
    assert (np.diff(one.ends) == 0).sum() >= 3  # four bytes of one character
    pairs = align.span([0, 1, 2, 3, 4], one.ends)
    assert source_tokenizer.decode(one.ids[1 : pairs.source[2] + 1]) == "a\U0001f600"


@pytest.mark.parametrize(
    ("value", "words"), [([3, 1], "falls"), ([-1, 2], "negative"), ([[1]], "shape"), ([0.5], "integers")]
)
def test_span_refuses(value, words):
    with pytest.raises(InputError, match=words):
        align.span(value, [0, 1])


def test_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedTokenizer, match=r'use_fast=True.*align="dtw"'):
        encode(Slow(), plain("text"))


def brute(cost):
    rows, columns = cost.shape
    best = {}

    def walk(i, j, total, path):
        if (i, j) == (rows - 1, columns - 1):
            best.setdefault(total, []).append(path)
            return
        for di, dj in ((1, 1), (1, 0), (0, 1)):
            if i + di < rows and j + dj < columns:
                walk(i + di, j + dj, total + cost[i + di, j + dj], [*path, (i + di, j + dj)])

    walk(0, 0, cost[0, 0], [(0, 0)])
    return min(best), best[min(best)]


def plain_dtw(cost, tie):
    """The published recurrence and back-tracking, as they stand."""
    n, m = cost.shape
    table = np.full((n + 1, m + 1), np.inf)
    table[0, 0] = 0
    for i in range(n):
        for j in range(m):
            table[i + 1, j + 1] = cost[i, j] + min(table[i, j + 1], table[i + 1, j], table[i, j])
    i, j, path = n - 1, m - 1, [(n - 1, m - 1)]
    while i or j:
        options = [(table[i, j], i - 1, j - 1), (table[i, j + 1], i - 1, j), (table[i + 1, j], i, j - 1)]
        if tie == "fusechat":
            options[1], options[2] = options[2], options[1]
        if i == 0 or j == 0:
            options = [o for o in options if o[1] >= 0 and o[2] >= 0]
        _, i, j = min(options, key=lambda option: option[0])
        path.append((i, j))
    return path[::-1], table[n, m]


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from(["fusechat", "fusellm"]))
def test_dtw_laws(rows, columns, seed, tie):
    cost = np.random.default_rng(seed).integers(0, 4, (rows, columns))
    expected, paths = brute(cost)
    for compiled in (False, None):
        path, total = warp(cost, tie, compiled=compiled)
        steps = [tuple(step) for step in path.tolist()]
        assert steps[0] == (0, 0)
        assert steps[-1] == (rows - 1, columns - 1)
        assert {tuple(step) for step in np.diff(path, axis=0).tolist()} <= {(0, 1), (1, 0), (1, 1)}
        assert total == expected == sum(cost[step] for step in steps)
        assert steps in paths
        assert (steps, total) == plain_dtw(cost, tie)


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (211, 260)])
@pytest.mark.parametrize("tie", ["fusechat", "fusellm"])
def test_fast_dtw_takes_the_plain_path(size, tie):
    cost = np.random.default_rng(0).integers(0, 5, size)
    wanted, total = plain_dtw(cost, tie)
    for compiled in (False, None):
        path, found = warp(cost, tie, compiled=compiled)
        assert (path.tolist(), found) == ([list(step) for step in wanted], total)


@given(tokens, tokens)
def test_token_costs_are_levenshtein(source, pivot):
    from rapidfuzz.distance import Levenshtein

    wanted = [[Levenshtein.distance(u, v) for v in pivot] for u in source]
    assert token_costs(source, pivot).tolist() == wanted


def test_raw_strings_that_become_empty_keep_their_marks():
    # FuseLLM's rule: where nothing is left after the marks, both are compared with them.
    cost = token_costs(
        ["\u0120", "\u0120a"], ["\u2581", "\u2581a", "b"], source_mark="\u0120", pivot_mark="\u2581"
    )
    assert cost.tolist() == [[0, 1, 1], [1, 0, 1]]


def test_dtw_refuses():
    with pytest.raises(InputError, match="source_tokens is empty"):
        align.dtw([], ["a"])
    with pytest.raises(ConfigError, match="tie is 'left'"):
        align.dtw(["a"], ["a"], tie="left")
    with pytest.raises(ShapeError, match="cost"):
        warp(np.zeros((0, 3)))
    with pytest.raises(NonFiniteError, match="NaN"):
        warp(np.array([[np.nan]]))


def test_maps_of_a_tokenizer_to_itself_are_the_identity(source_tokenizer):
    size = len(source_tokenizer)
    for method in ("em", "mined", "prefix"):
        assert align.vocabulary_map(source_tokenizer, source_tokenizer, method).table.tolist() == list(
            range(size)
        )
    own = Vocabulary.of(source_tokenizer)
    counts = PairCounts(size, size)
    ids = encode(source_tokenizer, plain(TEXTS[0])).ids
    counts.add(ids, ids)
    for choice in ("frequency", "official"):
        assert (statistics_table(counts, own, own, choice)[ids] == ids).all()


def test_ms_takes_the_frequent_and_the_official_the_rare():
    # Row 7: the published distance is multiplied by sigmoid(count), so frequent pairs are penalized.
    source = Vocabulary(["<u>", "abcd"], unk=0)
    pivot = Vocabulary(["<u>", "abxy", "abzw"], unk=0)
    counts = PairCounts(3, 2)
    counts.add([1] * 5 + [2], [1] * 6)
    assert statistics_table(counts, source, pivot, "frequency").tolist() == [0, 1]
    assert statistics_table(counts, source, pivot, "official").tolist() == [0, 2]


def test_mined_is_the_nearest_string_not_the_first():
    # Row 8: the published mode maps all unmatched tokens to the first entry.
    source, pivot = Vocabulary(["hello", "worlds"]), Vocabulary(["zzz", "hallo", "world"])
    assert nearest_table(source, pivot).tolist() == [1, 2]
    near = Cooccurrence({0: {0: 3}}, {1: {2: 1}, 2: {0: 1}})
    assert near.closest(0, np.array([1, 2])) == 2


def test_cooccurrence_decides_between_equally_near_tokens():
    source, pivot = Vocabulary(["x", "y", "cat"]), Vocabulary(["x", "y", "cut", "cot"])
    exact = exact_table(source, pivot)
    neighbours = Cooccurrence.of([[0, 2, 0]], [[1, 2, 1], [0, 3, 0]], exact)
    assert nearest_table(source, pivot).tolist()[2] == 2
    assert nearest_table(source, pivot, neighbours).tolist()[2] == 3


def test_counts_are_sparse_and_count_distinct_or_all():
    # Row 14: no dense matrix; a repeated id at one position counts once only as published.
    counts = PairCounts(200_000, 200_000)
    counts.add([199_999], [199_999])
    assert [part.tolist() for part in counts.nonzero()] == [[199_999], [199_999], [1]]
    pairs = align.dtw(["a", "a"], ["aa"])
    for count, number in (("all", 2), ("distinct", 1)):
        few = PairCounts(2, 2)
        few.add_pairs(pairs, [1], [0, 0], count)
        assert few.nonzero()[2].tolist() == [number]
    with pytest.raises(InputError, match="pivot_ids"):
        few.add([7], [0])
    with pytest.raises(ConfigError, match="count is"):
        few.add_pairs(pairs, [1], [0, 0], "some")


def test_map_is_built_where_none_is_given(source_tokenizer, pivot_tokenizer):
    # Row 17: the published script passed the matrix as the mode without a map file.
    for method in ("ms", "ms-official"):
        for how in ("span", "dtw"):
            made = align.vocabulary_map(source_tokenizer, pivot_tokenizer, method, texts=TEXTS[:1], align=how)
            assert len(made) == len(Vocabulary.of(source_tokenizer))
            assert made.table.max() < made.pivot_size
    with pytest.raises(ConfigError, match="needs texts"):
        align.vocabulary_map(source_tokenizer, pivot_tokenizer, "ms")
    with pytest.raises(ConfigError, match="vocab method is 'soft'"):
        align.vocabulary_map(source_tokenizer, pivot_tokenizer, "soft")
    with pytest.raises(InputError, match="texts is empty"):
        align.vocabulary_map(source_tokenizer, pivot_tokenizer, "ms", texts=[])


@given(st.integers(0, 2**31), st.sampled_from(["sum", "first"]), st.sampled_from([0.5, 1.0, 2.0]))
def test_projected_rows_are_distributions(seed, collide, temperature):
    draw = np.random.default_rng(seed)
    table = draw.integers(-1, 6, 12)
    logits = -np.sort(-draw.normal(size=(5, 4)), axis=1)
    indices = np.stack([draw.permutation(12)[:4] for _ in range(5)])
    made = align.project(logits, indices, table, collide=collide)
    full = made.dense(6, temperature)
    assert (full >= 0).all()
    assert ((full > 0).sum(1) <= 4).all()
    some = (made.ids >= 0).any(1)
    np.testing.assert_allclose(full.sum(1), some.astype(float), atol=1e-12)
    assert (some == (table[indices] >= 0).any(1)).all()


def test_collisions_sum_or_keep_the_first():
    logits, indices, table = [[2.0, 1.0, 0.0]], [[0, 1, 2]], [3, 3, 4]
    powers = np.exp([2.0, 1.0, 0.0])
    both = align.project(logits, indices, table).dense(5)[0]
    np.testing.assert_allclose(both[3:], [powers[:2].sum() / powers.sum(), powers[2] / powers.sum()])
    first = align.project(logits, indices, table, collide="first").dense(5)[0]
    np.testing.assert_allclose(first[3:], powers[[0, 2]] / powers[[0, 2]].sum())


def test_project_refuses():
    with pytest.raises(NonFiniteError, match="row 1"):
        align.project([[1.0], [np.nan]], [[0], [0]], [0])
    with pytest.raises(InputError, match="source tokens"):
        align.project([[1.0]], [[4]], [0])
    with pytest.raises(ShapeError, match="positions, k"):
        align.project([1.0], [0], [0])
    with pytest.raises(ConfigError, match="collide"):
        align.project([[1.0]], [[0]], [0], collide="max")
    assert align.project([[1.0, -np.inf]], [[0, 1]], [0, 1]).ids.tolist() == [[0, -1]]


def test_shared_end_is_not_a_shared_prefix():
    # Row 13: the published test accepts tokens whose texts end apart; spans do not.
    pairs = align.dtw(["ab", "c"], ["a", "b", "c"])
    rows = published_rows(pairs, ["a", "b", "c"], ["ab", "c"], [0, 1], [0, 1], [0, 1, 2], Published())
    assert rows.tolist() == [-1, 0, 1]
    assert align.span([1, 2, 3], [2, 3]).pivot.tolist() == [1, 2]
    assert published_rows(align.dtw([""], ["a"]), ["a"], [""], [0], [0], [0], Published()).tolist() == [0]


MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}\n{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if loop.index0 == 0 and m['role'] != 'user' %}"
    "{{ raise_exception('user first') }}{% endif %}[{{ m['role'] }}] {{ m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}\n{% endfor %}"
)
TALK = [
    {"role": "user", "content": "yes"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": " more "},
]


@pytest.mark.parametrize("template", [None, MARKED, STRICT], ids=["prefix", "generation", "search"])
def test_template_spans(pivot_tokenizer, template):
    made = render(TALK, pivot_tokenizer, template=template)
    learned = [made.text[start:stop] for start, stop in made.spans]
    assert [part.strip() for part in learned] == [
        "yes</s>",
        "more </s>" if template is not STRICT else "more</s>",
    ]
    assert made.spans[0][0] > made.text.index("yes")  # the user's own "yes" comes first


def test_supervised_tokens_are_the_turns(source_tokenizer, pivot_tokenizer):
    made = render(TALK, pivot_tokenizer)
    one = encode(source_tokenizer, made)
    assert source_tokenizer.decode(one.ids[one.supervised]) == "yes</s> more </s>"
    cut = encode(source_tokenizer, made, max_length=5)
    assert len(cut) == 5
    assert not cut.supervised.any()


@pytest.mark.parametrize(
    ("dialogue", "words"),
    [({"x": 1}, "'messages' or 'text'"), ([], "no messages"), ([{"role": "user"}], "message 0"), (7, "int")],
)
def test_render_refuses(pivot_tokenizer, dialogue, words):
    with pytest.raises(InputError, match=words):
        render(dialogue, pivot_tokenizer)


def test_render_needs_a_template(source_tokenizer):
    with pytest.raises(InputError, match="no chat template"):
        render(TALK)
    with pytest.raises(InputError, match="refuses the dialogue"):
        render(TALK[1:], source_tokenizer, template=STRICT)
    assert render({"text": "abc"}) == Text("abc", ((0, 3),), whole=True)
    assert render("").spans == ()


def test_inspect_reports(store, pivot_tokenizer, source_tokenizer, tmp_path):
    for method in ("span", "dtw"):
        report = align.inspect(store, pivot_tokenizer, source_tokenizer=source_tokenizer, method=method)
        line = report.rows[0]
        assert line["dialogues"] == 6
        assert 0 < line["coverage"] <= 1
        assert 0 < line["kept_mass"] <= 1
        assert line["same_end"] == (1.0 if method == "span" else pytest.approx(line["same_end"], abs=1))
        assert method == "span" or line["same_end"] < 1
        report.save(tmp_path / method)
        page = (tmp_path / method / "report.html").read_text()
        assert "border-right:2px" in page
        assert ("#d0404088" in page) == (method == "dtw")
        assert json.loads((tmp_path / method / "report.json").read_text())["rows"]
    with pytest.raises(ConfigError, match="method is 'both'"):
        align.inspect(store, pivot_tokenizer, source_tokenizer=source_tokenizer, method="both")


def test_strings_are_decoded_one_by_one(source_tokenizer):
    ids = encode(source_tokenizer, plain("the model")).ids
    assert "".join(decode_each(source_tokenizer, ids[1:-1])) == "the model"
