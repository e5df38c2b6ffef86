"""TF-IDF by sorted numbers is scikit-learn's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from fusion_core.errors import DataError
from meme_debate.tfidf import TfIdf

words = st.sampled_from(
    ["ab", "AB", "cd", "x", "it's", "na\u00efve", "\u00dcber", "12", "foo_bar", "!", "\n", "e.g."]
)
texts = st.lists(st.lists(words, max_size=12).map(" ".join), min_size=1, max_size=8)


@given(texts, texts, st.integers(1, 4), st.integers(1, 3))
def test_all_numbers_are_scikit_learns(learned, others, ngrams, min_df):
    theirs = TfidfVectorizer(ngram_range=(1, ngrams), min_df=min_df)
    try:
        wanted = theirs.fit_transform(learned)
    except ValueError:
        with pytest.raises(DataError, match="cannot be learned from"):
            TfIdf(ngrams, min_df).fit_transform(learned)
        return
    ours = TfIdf(ngrams, min_df)
    found = ours.fit_transform(learned)
    assert ours.terms == theirs.get_feature_names_out().tolist()
    np.testing.assert_allclose(ours.idf, theirs.idf_, rtol=1e-14)
    np.testing.assert_allclose(found.toarray(), wanted.toarray(), atol=1e-14)
    again = TfIdf.of(ours.terms, ours.idf, ngrams)
    for texts in (learned, [*others, "", "gone"]):
        wanted = theirs.transform(texts).toarray()
        np.testing.assert_allclose(ours.transform(texts).toarray(), wanted, atol=1e-14)
        np.testing.assert_allclose(again.transform(texts).toarray(), wanted, atol=1e-14)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (["ab", "ab"], "twice"),
        (["ab", "ab cd"], "'cd' is part of a run"),
        (["cd", "ab cd"], "'ab' is part of a run"),
        (["ab", "ab ab", "ab ab ab"], "more than 2 words"),
    ],
)
def test_columns_that_cannot_be_are_refused(terms, message):
    with pytest.raises(DataError, match=message):
        TfIdf.of(terms, np.ones(len(terms)))
