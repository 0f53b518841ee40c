"""From completions to labels: every form a model answers in, and nothing that was not said."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.schemas import load_labels
from recipes.teacher.parse import REASONS, Parsed, parse_completion, reason_code
from recipes.teacher.prompts import completion

ESCI, ALIEXPRESS = load_labels("esci"), load_labels("aliexpress6")
WHY = "Another brand; an Exact match it is not."


@pytest.mark.parametrize(
    "text",
    [
        '<think>Another brand; an Exact match it is not.</think>\n\n{"label": "Substitute"}',
        'Another brand; an Exact match it is not.\n</think>\n{"label": "Substitute"}',
        '<think>Another brand; an Exact match it is not.</think>```json\n{"label": "Substitute"}\n```',
        '<think>Another brand; an Exact match it is not.</think>\n```\n{\n  "label": "S"\n}\n``` ',
        '<think>Another brand; an Exact match it is not. {"label": "Substitute"}',
        '<think>Another brand; an Exact match it is not.\n```json\n{"label": "Substitute"}\n```',
        'Another brand; an Exact match it is not.\n{"label": "Substitute"}',
        'Another brand; an Exact match it is not.\n```json\n{"label": "Substitute"}```',
        '{"rationale": "Another brand; an Exact match it is not.", "label": "SUBSTITUTE"}',
        '<THINK>Another brand; an Exact match it is not.</THINK>{"Label": "substitute"}',
        '<thinking>Another brand; an Exact match it is not.</thinking>{"answer": {"label": "Substitute"}}',
        '<think>Another brand; an Exact match it is not.</think>{"confidence": 0.3, "label": ["Substitute"]}',
        "<think>Another brand; an Exact match it is not.</think>{'label': 'Substitute'}",
        '<think>Another brand; an Exact match it is not.</think>{"label": "Substitute",}',
        '<think>Another brand; an Exact match it is not.</think>{"label": "Substitute"',
        '<think>Another brand; an Exact match it is not.</think>{"label": Substitute}',
        '<think>Another brand; an Exact match it is not.</think>｛"label"："Substitute"｝',
        '<think>Another brand; an Exact match it is not.</think>{"label": "Substitute (S)"}',
        '<think>Another brand; an Exact match it is not.</think>{"label": "S - Substitute"}',
        "<think>Another brand; an Exact match it is not.</think>Substitute",
        "<think>Another brand; an Exact match it is not.</think>**Substitute**.",
        "<think>Another brand; an Exact match it is not.</think>**Label:** S",
        "<think>Another brand; an Exact match it is not.</think>The final answer is Substitute. Exact would be wrong.",
        "<think>Another brand; an Exact match it is not.</think>It is not Exact.\n\nSubstitute\n",
        # The field wins over the words around it.
        '<think>Another brand; an Exact match it is not.</think>Exact? No: {"label": "Substitute"} and not Irrelevant.',
        '<think>Another brand; an Exact match it is not.</think>{"query": "Exact {fit}", "label": "Substitute"}',
        '<think>Another brand; an Exact match it is not.</think>{"label": "Substitute"}</think>{"label": "Substitute"}',
    ],
)
def test_what_was_said_is_read(text):
    assert parse_completion(text, ESCI) == Parsed(WHY, "Substitute", None)


@pytest.mark.parametrize(
    ("text", "code", "rationale"),
    [
        ("", "empty", None),
        (" \n\t", "empty", None),
        (None, "empty", None),
        ("<think>", "truncated", None),
        ("<think>The brand differs, so Exact", "truncated", None),
        ("<think>The brand differs. Label: Exact", "truncated", None),
        # An object that is not at the end is a draft.
        ('<think>Perhaps {"label": "Exact"}, but the brand', "truncated", None),
        ("<think>why</think>", "truncated", "why"),
        ('<think>why</think>{"label": "Subst', "truncated", "why"),
        ('<think>why</think>{"label": ', "truncated", "why"),
        ("<think>why</think>It could well be Exact, who knows.", "no_answer", "why"),
        ("<think>why</think>The label is not Exact.", "no_answer", "why"),
        ("<think>Exact. Label: E</think>I cannot tell.", "no_answer", "Exact. Label: E"),
        ("I am sorry, I cannot help with that.", "no_answer", None),
        ('<think>why</think>{"relevant": true}', "no_answer", "why"),
        ('<think>why</think>{"label": "Great"}', "unknown_label", "why"),
        ('<think>why</think>{"label": ""}', "unknown_label", "why"),
        ('<think>why</think>{"label": null}', "unknown_label", "why"),
        ('<think>why</think>{"label": 1}', "unknown_label", "why"),
        ('<think>why</think>{"label": []}', "unknown_label", "why"),
        ('<think>why</think>{"label": "not Exact"}', "unknown_label", "why"),
        ('<think>why</think>{"label": "name of the label"}', "unknown_label", "why"),
        ('<think>why</think>{"label": "Exact or Substitute"}', "contradiction", "why"),
        ('<think>why</think>{"label": "e, s"}', "contradiction", "why"),
        ('<think>why</think>{"label": "Exact|Substitute|Complement|Irrelevant"}', "contradiction", "why"),
        ('<think>why</think>{"label": ["Exact", "Substitute"]}', "contradiction", "why"),
        # json.loads would keep the last of two equal keys.
        ('<think>why</think>{"label": "Exact", "label": "Irrelevant"}', "contradiction", "why"),
        ('<think>why</think>{"label": "Exact"} {"label": "Irrelevant"}', "contradiction", "why"),
        ('<think>why</think>{"label": "Exact", "verdict": "Irrelevant"}', "contradiction", "why"),
        ("<think>why</think>Label: Exact\nLabel: Irrelevant", "contradiction", "why"),
        ("<think>why</think>Label: Exact\n\nIrrelevant", "contradiction", "why"),
        ("<think>why</think>- Exact\n- Substitute", "contradiction", "why"),
    ],
)
def test_what_was_not_said_is_null_with_a_reason(text, code, rationale):
    parsed = parse_completion(text, ESCI)
    assert (parsed.rationale, parsed.predicted_label) == (rationale, None)
    assert reason_code(parsed.parse_error) == code
    assert len(parsed.parse_error) > len(code) + 2


def test_a_label_without_reasoning_is_a_label():
    assert parse_completion('<think>\n\n</think>\n\n{"label": "C"}', ESCI) == Parsed(None, "Complement", None)


@pytest.mark.parametrize(
    ("schema", "text", "label"),
    [
        (ESCI, '{"label": "Sustituto"}', "Substitute"),
        (ESCI, "Etiqueta: complementario", "Complement"),
        (ESCI, "最終ラベル：完全一致", "Exact"),
        (ESCI, "ラベルは「無関係」です。".replace("です", ""), "Irrelevant"),
        (ESCI, '{"label": "代替品"}', "Substitute"),
        (ESCI, "판정: 정확히 일치", "Exact"),
        (ESCI, "Réponse : complémentaire", "Complement"),
        (ESCI, "Resposta: correspondência exata.", "Exact"),
        (ALIEXPRESS, '{"label": "brand_mismatch"}', "Brand Mismatch"),
        (ALIEXPRESS, '{"label": "BRAND-MISMATCH"}', "Brand Mismatch"),
        (ALIEXPRESS, '{"label": "ブランド不一致"}', "Brand Mismatch"),
        (ALIEXPRESS, '{"label": "카테고리 불일치"}', "Category Mismatch"),
        (ALIEXPRESS, "étiquette : mauvais modèle", "Model Mismatch"),
        (ALIEXPRESS, "Veredicto: accesorio incorrecto", "Accessory Mismatch"),
        (ALIEXPRESS, "Veredito: atributo errado", "Attribute Mismatch"),
        (ALIEXPRESS, '{"label": "強く関連"}', "Strongly Relevant"),
    ],
)
def test_labels_in_the_languages_of_the_market(schema, text, label):
    assert parse_completion(f"<think>why</think>{text}", schema) == Parsed("why", label, None)


@pytest.mark.parametrize("schema", [ESCI, ALIEXPRESS], ids=["esci", "aliexpress6"])
def test_no_word_stands_for_two_labels(schema):
    for label in schema.labels:
        assert set(label.translations) == {"en", "es", "pt", "fr", "jp", "ko"}
        for word in [label.name, *label.aliases, *(w for words in label.translations.values() for w in words)]:
            for text in (json.dumps({"label": word}), f"Label: {word}", word):
                assert parse_completion(text, schema).predicted_label == label.name


PIECES = [
    *("<think>", "</think>", "<think", "think>", "{", "}", '"', '"label"', ":", '"Exact"', "Exact", "S", ",", "[", "]"),
    *("```json\n", "```", "\n", "Label: ", "or", "answer is ", '{"label": "Exact"}', '{"label": "Irrelevant"}', "\\"),
    *("判定：", "代替品", "not ", "\ud800", "\x00", '{"label": ["S"', '{"a":' * 3),
]
anything = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))


@given(anything)
def test_any_text_gives_a_label_or_a_reason(text):
    parsed = parse_completion(text, ESCI)
    assert (parsed.predicted_label is None) == (parsed.parse_error is not None)
    assert parsed.predicted_label in {*ESCI.names, None}
    assert parsed.parse_error is None or reason_code(parsed.parse_error) in REASONS
    assert parsed.rationale is None or (parsed.rationale.strip() == parsed.rationale != "")
    if parsed.predicted_label is not None:  # never from nowhere
        label = ESCI.labels[ESCI.label2id[parsed.predicted_label]]
        words = [label.name, *label.aliases, *(w for words in label.translations.values() for w in words)]
        assert any(word.casefold() in text.casefold() for word in words)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.sampled_from(ALIEXPRESS.names))
def test_what_the_prompts_show_is_what_the_parser_reads(rationale, label):
    parsed = parse_completion(completion(rationale, label), ALIEXPRESS)
    assert (parsed.predicted_label, parsed.parse_error) == (label, None)
    assert "think>" in rationale.casefold() or parsed.rationale == (rationale.strip() or None)


@given(st.sampled_from(ESCI.names), st.integers(0, 60))
def test_an_answer_cut_anywhere_is_never_another_answer(label, kept):
    text = completion("Irrelevant? Label: Exact, or S.", label)
    assert parse_completion(text[: len(text) - kept], ESCI).predicted_label in {label, None}


@pytest.mark.parametrize("text", ["{" * 50_000, '{"a":' * 20_000, '<think>{"label": "' * 5_000, "Label: " * 20_000])
def test_a_model_that_repeats_itself_is_read_too(text):
    assert parse_completion(text, ESCI).predicted_label is None
