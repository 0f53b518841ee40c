"""What the page shows, and that no text of a visitor becomes part of it."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

import views

LABELS = ["Exact", "Substitute", "Complement", "Irrelevant"]
EVIL = [
    "<img src=x onerror=alert(1)>",
    '"><script>alert(1)</script>',
    "' onmouseover='alert(1)",
    "{{constructor}} {{{x}}} ${alert(1)} `",
    "[link](javascript:alert(1)) **bold**",
    "&lt;b&gt; &amp;",
    "</table></section>",
]


class Page(HTMLParser):
    """The text of a page, and the names of its elements and attributes."""

    def __init__(self, html):
        super().__init__()
        self.texts, self.tags, self.values = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.values += attributes

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def shape(self):
        return self.tags, [name for name, _ in self.values]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def result(title="red shoe", rank=1, **more):
    probabilities = {"Exact": 0.7, "Substitute": 0.2, "Complement": 0.06, "Irrelevant": 0.04}
    base = {"rank": rank, "index": 0, "title": title, "label": "Exact", "score": 0.7206, "probabilities": probabilities}
    return {**base, "tier": None, "perspectives": None, **more}


@given(st.text() | st.sampled_from(EVIL))
def test_escaped_text_reads_as_it_was_and_nothing_else(text):
    escaped = views.escape(text)
    page = Page(f"<p>{escaped}</p>")
    assert page.tags == ["p"]
    assert "".join(page.texts).replace("\r", "\n") == text.replace("\r", "\n")
    assert not set("<>\"'{}$`") & set(escaped)


@pytest.mark.parametrize("evil", EVIL)
def test_no_text_of_a_visitor_changes_the_page(evil):
    def page(text):
        results = [result(text, product_id=text), result(text, rank=2, label=LABELS[3])]
        labels = [f"{text}{label}" for label in LABELS]
        renamed = result(label=labels[0], probabilities=dict.fromkeys(labels, 0.25), perspectives={text: 0.5})
        parts = [
            views.error(text),
            views.ranking(text, results, LABELS, 1.0),
            views.pair(renamed, labels, 1.0, None),
            views.model_line(text, LABELS, 1, text, False),
            views.model_line(text, LABELS, 1, text, True),
        ]
        return Page("".join(parts))

    assert page(evil).shape == page("harmless").shape
    assert page(evil).text.count(" ".join(evil.split())) >= 5


def test_a_pair_tells_label_probabilities_tier_latency_and_the_nearest_perspective():
    near = {"business_rule": -0.2, "user_intent": 0.125, "structured_analysis": 0.44}
    text = Page(views.pair(result(tier=2, perspectives=near), LABELS, 12.345, 5)).text
    assert "Exact 70.0%" in text
    assert re.findall(r"(\w+) +(\d+\.\d%)", text.split("Relevance Exact 70.0%")[1])[:4] == [
        ("Exact", "70.0%"),
        ("Substitute", "20.0%"),
        ("Complement", "6.0%"),
        ("Irrelevant", "4.0%"),
    ]
    assert "Expected gain 0.721" in text
    assert "Tier 2 of 0 to 4" in text
    assert "Latency 12.3 ms" in text
    assert "lies closest to structured analysis" in text
    assert "cosine 0.44; user intent 0.12; business rule -0.20" in text
    assert "not why the label was chosen" in text


def test_explanations_stand_under_their_heading_with_verdict_and_similarity():
    found = [
        {"perspective": "business_rule", "rationale": "A case <b> is", "label": "Substitute", "similarity": 0.31},
        {"perspective": "user_intent", "rationale": "She wants shoes.", "label": "Exact", "similarity": 0.52},
    ]
    page = Page(views.pair(result(tier=1, explanations=found), LABELS, 1.0, 5, is_calibrated=True))
    assert "Relevance, calibrated probability Exact 70.0%" in page.text
    shown = page.text.split("Reasoning the model stands close to")[1]
    assert "Not the model's own words" in shown
    assert re.search(r"user intent argues for Exact similarity 0.52 She wants shoes\.", shown)
    assert re.search(r"business rule argues for Substitute similarity 0.31 A case <b> is", shown)
    assert shown.index("user intent") < shown.index("business rule")  # the nearest first
    assert "b" not in page.tags
    assert "stands close to" not in Page(views.pair(result(), LABELS, 1.0, None)).text


def test_a_model_without_tiers_or_perspectives_says_so():
    text = Page(views.pair(result(), LABELS, 1.0, None)).text
    assert "Tier" not in text
    assert "saved without its teacher's perspectives" in text
    table = Page(views.ranking("shoe", [result()], LABELS, 1.0)).text
    assert "Tier" not in table
    assert "1 product for" in table


def test_a_long_ranking_shows_its_head_and_says_so():
    results = [result(f"shoe {rank}", rank) for rank in range(1, views.SHOWN_ROWS + 21)]
    page = Page(views.ranking("shoe", results, LABELS, 140.0))
    assert page.tags.count("tr") == views.SHOWN_ROWS + 1
    assert "The first 50 of 70" in page.text
    assert "70 products" in page.text
    assert "140 ms, 2.0 ms each" in page.text


def test_the_empty_place_is_as_wide_as_the_result():
    assert [label for label in LABELS if label in Page(views.empty_pair(LABELS)).text] == LABELS


def test_a_revision_leads_to_the_card_of_that_revision():
    values = dict(Page(views.model_line("acme/gat@v1", LABELS, 1, "gat", False)).values)
    assert values["href"] == "https://huggingface.co/acme/gat/tree/v1"
