"""What is taken out of a rationale as a verdict, and what stays as an ordinary word."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.rationales.strip import strip_label_names
from recipes.schemas import load_labels

ESCI, ALIEXPRESS = load_labels("esci"), load_labels("aliexpress6")


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        # A sentence that is only a verdict
        ("Both are red. Label: E", "Both are red."),
        ("Both are red. **Label: Exact (E)**", "Both are red."),
        ("Both are red. So it is an Exact match for the query.", "Both are red."),
        ("Both are red. Therefore, the final verdict is S.", "Both are red."),
        ("Substitute. The brand differs.", "The brand differs."),
        ("The brand differs.\nIrrelevant", "The brand differs."),
        ("The brand differs. S.", "The brand differs."),
        ("Exact.", ""),
        ("E", ""),
        # A closing clause
        ("The brand differs, so S.", "The brand differs."),
        ("The brand differs so it is a substitute.", "The brand differs."),
        ("It is a case for it, making it a Complement!", "It is a case for it!"),
        ("Another brand — substitute.", "Another brand."),
        ("It fits, so Exact, so E.", "It fits."),
        # A class name inside a sentence
        ("Rated Irrelevant because it is a lamp.", "Rated a candidate because it is a lamp."),
        ("It is a substitute for the pen.", "It is a candidate for the pen."),
        ("This rules out an exact match, as 13 is not 12.", "This rules out a candidate match, as 13 is not 12."),
        ("The product is irrelevant to the plan.", "The product is a candidate to the plan."),
        ("It earns complement status for once.", "It earns candidate status for once."),
        ("An Exact match, given the brand.", "A candidate match, given the brand."),
        ("There is no substitute for it here.", "There is no candidate for it here."),
        ("The label is S because the brand differs.", "The label is a candidate because the brand differs."),
    ],
)
def test_verdicts_go(text, stripped):
    assert strip_label_names(text, ESCI) == stripped


@pytest.mark.parametrize(
    "text",
    [
        "The exact size and the exact colour are met.",
        "A tone so exact is rare.",
        "Brand and type are exact.",
        "Chrome is irrelevant.",
        "Cases complement pillows.",
        "A substitute teacher would like it.",
        "It needs a C wire, vitamin E and a plug of type C.",
        "Size: S.",
        "Vitamins A, C, E.",
        "I think so. I would buy it.",
        "My verdict: I think it fits.",
        "substitution, exactly, complementary, irrelevance",
        "商品は一致。サイズも同じ。",
        "  leading and   inner white space\n\n is kept ",
    ],
)
def test_ordinary_words_stay(text):
    assert strip_label_names(text, ESCI) == text


def test_the_pairs_own_words_stay_inside_sentences():
    text = "The belt says Exact, and that is its name. So it is Exact."
    assert strip_label_names(text, ESCI, own_words="belt Trim to Exact Fit").startswith("The belt says Exact, and")
    assert strip_label_names(text, ESCI) == "The belt says a candidate, and that is its name."


def test_class_names_of_several_words():
    assert strip_label_names("Right kind, so Strongly Relevant.", ALIEXPRESS) == "Right kind."
    assert strip_label_names("Sony, not LG. It is a Brand Mismatch.", ALIEXPRESS) == "Sony, not LG."
    assert strip_label_names("A brand mismatch of two makers.", ALIEXPRESS) == "A candidate of two makers."
    assert strip_label_names("The brand is right. So E.", ALIEXPRESS) == "The brand is right. So E."


WORDS = ["so", "So", "it is", "a", "an", "the", "label:", "verdict is", "match", "brand", "differs", "because"]
NAMES = ["Exact", "exact", "substitute", "Irrelevant", "E", "S", "I", "(S)"]
MARKS = [",", ".", ";", ". ", "!", "\n", "—", "**", "“", "”", "。"]
pieces = st.sampled_from(WORDS + NAMES + MARKS)


@settings(deadline=None, max_examples=300)
@given(st.lists(pieces, max_size=12).map(" ".join))
def test_idempotent(text):
    once = strip_label_names(text, ESCI)
    assert strip_label_names(once, ESCI) == once
    assert len(once.split()) <= 2 * len(text.split())


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_text_without_names_is_untouched(text):
    if not any(name in text.casefold() for name in ("exact", "substitute", "complement", "irrelevant")) and not (
        set("ESCI") & set(text)
    ):
        assert strip_label_names(text, ESCI) == text


@given(
    name=st.sampled_from([spelling for label in ESCI.labels for spelling in (label.name, label.name.lower())]),
    verdict=st.sampled_from(
        ["So it is {}.", "Therefore {}.", "Label: {}", "The final verdict is {}.", "It is clearly {}.", "Hence, {}!"]
    ),
)
def test_no_name_is_left_of_a_verdict(name, verdict):
    assert strip_label_names(f"The brand differs. {verdict.format(name)}", ESCI) == "The brand differs."
