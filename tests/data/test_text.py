"""The normalisation that decides whether two texts are the same."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.data.text import normalise

texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


@settings(deadline=None)
@given(texts)
def test_idempotent(text):
    assert normalise(normalise(text)) == normalise(text)


@settings(deadline=None)
@given(texts)
def test_white_space_and_case_do_not_matter(text):
    assert normalise(f" \t{text}\u3000\n") == normalise(text)
    assert normalise(text.casefold()) == normalise(text)


@settings(deadline=None)
@given(texts, texts)
def test_joining_with_punctuation_is_joining_with_a_space(left, right):
    if normalise(f"{left} {right}").strip() and any(c.isalnum() for c in normalise(left + right)):
        assert normalise(f"{left},{right}") == normalise(f"{left} {right}")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ｉＰｈｏｎｅ　１３", "iphone 13"),
        ("STRASSE", "straße"),
        ("cafe\u0301", "café"),
        ("wi-fi", "Wi Fi"),
        ("¿qué?", "QUÉ"),
        ("zero\u200bwidth", "zerowidth"),
        ("\ufeffbom", "BOM"),
        ("タオル（２枚）", "タオル 2枚"),
    ],
)
def test_the_same(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(("one", "other"), [("c++", "c"), ("gift 🎁", "gift"), ("año", "ano"), ("1.5 l", "15 l")])
def test_not_the_same(one, other):
    assert normalise(one) != normalise(other)


def test_empty_means_blank():
    assert normalise(" \n\u3000\u200b\ufeff\xa0") == ""
    assert normalise("...") == "..."
