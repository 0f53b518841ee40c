"""Escaping, missing facts, and cards made of hostile texts."""

import ast
import html
import re
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_cards.facts import (
    AdapterFacts,
    BaseModel,
    CardError,
    Evaluation,
    Hardware,
    MissingFact,
    Score,
    Slice,
    Statement,
    StudentFacts,
    need,
)
from hub_cards.render import adapter_card, code, escape, fence, python, render, results, student_card, table
from tests.packaging import STATEMENT, snippets

HOSTILE = [
    "<script>alert(1)</script>",
    "[free](javascript:alert(1))",
    "![x](https://evil.example/pixel.png)",
    "| a | b |\n|---|---|",
    "\n# Heading\n- item",
    "1. one",
    "***bold*** _it_ ~~no~~ `code` $x$",
    "&lt;b&gt; &amp;",
    "</details><h1>",
    "```\nend of block\n```python\nimport os",
    'title" ; import os #',
    "https://evil.example www.evil.example",
    "{{ facts }} {% raw %}",
]


def facts(hostile="plain", **changes):
    statement = Statement(
        **{
            **STATEMENT,
            "authors": [hostile],
            "dataset_name": hostile,
            "limits": [hostile],
            "intended_use": hostile,
            "out_of_scope_use": hostile,
            "business_rules": hostile,
            "citation": hostile,
            "example_query": hostile,
            "example_products": [hostile, hostile],
        }
    )
    hardware = Hardware(device=hostile, threads=2, python="3.11", packages={"torch": "2"})
    scores = {"accuracy": Score(0.5, (0.25, 0.75)), "macro_f1": Score(0.25)}
    values = {
        "repo_id": "shop/student",
        "statement": statement,
        "base": BaseModel("org/base", None, 64 * "a"),
        "data_sha256": {hostile: 64 * "b"},
        "settings": {"learning_rate": hostile},
        "code_commit": 40 * "c",
        "hardware": hardware,
        "train_seconds": 10.0,
        "evaluation": Evaluation(
            split="test",
            pairs_sha256=64 * "d",
            date="2026-01-01",
            slices=[Slice("overall", 10, scores), Slice(hostile, 5, scores)],
            conventions={"macro_f1": hostile},
            draws=100,
            seed=0,
            per_class={hostile: {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 10}},
            figures={"figures/confusion.png": "Confusion"},
        ),
        "parameters": 12345,
        "extractor_type": "gat",
        "labels": [hostile, "b"],
        "gains": [1.0, 0.0],
        "train_rows": 100,
        "guided_rows": 50,
        "pairs_per_second": 10.0,
        "scoring": hardware,
        "tasks": ("lrkd-relevance",),
        "has_ranking_view": True,
    }
    return StudentFacts(**{**values, **changes})


def adapter_facts(hostile):
    given = facts(hostile)
    shared = {name: getattr(given, name) for name in AdapterFacts.__dataclass_fields__ if hasattr(given, name)}
    return AdapterFacts(**shared, lora={"rank": 8}, messages=[{"role": "user", "content": hostile}])


def outline(card):
    """The structure that a reader of markdown sees outside code blocks: headings, HTML tags, links, table shape."""
    body = ModelCard(card).text
    text = re.sub(r"^(`{3,})[^\n`]*\n.*?^\1$", "BLOCK", body, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\\.", "E", text)  # an escaped character is text
    text = re.sub(r"`[^`\n]+`", "CODE", text)  # nothing acts in a code span
    return {
        "headings": re.findall(r"^#+ .*", text, flags=re.MULTILINE)[1:],
        "tags": re.findall(r"<[^>]*>", text),
        "links": len(re.findall(r"\]\(", text)),
        "columns": [line.count("|") for line in text.splitlines() if line.startswith("|")],
        "blocks": text.count("BLOCK"),
        "addresses": len(re.findall(r"https?://|www\.", text)),
        "lines": len([line for line in text.splitlines() if line.strip()]),
    }


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize(("make", "of"), [(student_card, facts), (adapter_card, adapter_facts)])
def test_a_hostile_text_changes_no_structure(make, of, hostile):
    plain, card = make(of("plain")), make(of(hostile))
    assert outline(card) == outline(plain)
    # The code still is the code that was meant, with the text inside its string.
    for code_block, expected in zip(snippets(card), snippets(plain), strict=True):
        parsed, shape = ast.parse(code_block), ast.parse(expected)
        assert [type(node) for node in ast.walk(parsed)] == [type(node) for node in ast.walk(shape)]
    constants = [
        node.value
        for block in snippets(card)
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert hostile in constants


@settings(max_examples=40, deadline=None)
@given(st.text())
def test_escaped_text_is_one_line_without_markup_and_reads_the_same(text):
    escaped = escape(text)
    assert "\n" not in escaped
    assert "<" not in escaped
    shown = html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", escaped))
    assert shown == " ".join(text.split())
    for character in "`*_[]|~$":
        assert not re.search(rf"(?<!\\)(\\\\)*{re.escape(character)}", escaped)
    assert escape(escaped) is escaped


@settings(max_examples=40, deadline=None)
@given(st.text())
def test_a_python_literal_is_the_text_and_closes_no_block(text):
    literal = python(text)
    assert "`" not in literal
    assert "\n" not in literal
    assert ast.literal_eval(literal) == text


@settings(max_examples=40, deadline=None)
@given(st.text())
def test_a_fence_is_longer_than_any_in_its_text(text):
    block = fence(text)
    assert block.splitlines()[0] not in text


def test_code_type_only_for_plain_names():
    assert code("a/b-c_1.0") == "`a/b-c_1.0`"
    assert code("a`b") == r"a\`b"
    assert "|" not in code("a|b").replace(r"\|", "")


def test_tables_and_results_by_hand():
    assert table(["a", "b"], [["x|y", 1]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"
    shown = results(facts().evaluation, "locale").splitlines()
    assert shown[0] == "| locale | pairs | accuracy | macro-F1 |"
    assert shown[2] == "| overall | 10 | 50.0 [25.0, 75.0] | 25.0 |"


def test_a_template_without_its_value_is_an_error():
    import jinja2

    with pytest.raises(jinja2.UndefinedError):
        render("student.md.jinja", facts=facts(), statement=facts().statement)


def test_a_missing_fact_names_itself_its_file_and_its_command():
    record = {"environment": {"cpu": None}}
    for fact in ("environment.cpu", "environment.gpu", "other.deep.er", "environment.cpu.model"):
        with pytest.raises(MissingFact, match=rf"training\.json: lacks '{fact}'.*recipes\.x records it"):
            need(record, fact, "training.json", "recipes.x")
    assert need({"a": {"b": 0}}, "a.b", "f", "c") == 0
    assert issubclass(MissingFact, CardError)


def test_the_card_says_only_what_is_so():
    plain = student_card(facts(extractor_type="none", guided_rows=0, tasks=(), has_ranking_view=False))
    assert "without latent reasoning" in plain
    for word in ("lrkd-relevance", "rank()", "latent_reasoning", "calibration.json", "ONNX"):
        assert word not in plain
    assert "knowledge-distillation" not in ModelCard(plain).data.tags
    assert "balanced error" not in plain
    assert "τ = 0.5). Rare" in student_card(facts(logit_adjustment=0.5))
    full = student_card(facts())
    assert "`rank()`" in full
    assert "trained to match the embedded reasoning" in full


def test_a_student_that_reads_apart_says_that_its_products_can_be_stored():
    assert "read query and product apart" not in student_card(facts())
    assert "Its first 5 layers read query and product apart" in student_card(facts(separate_layers=5))


def test_a_data_set_that_is_not_on_the_hub_has_no_link():
    statement = replace(facts().statement, dataset_id=None, dataset_name="Our shop, 2026")
    data = ModelCard(student_card(facts(statement=statement))).data
    assert data.get("datasets") is None
    assert data.eval_results[0].dataset_type == "our-shop-2026"


def test_facts_are_frozen():
    with pytest.raises(AttributeError):
        facts().parameters = 1


def test_cards_know_nothing_of_the_recipes():
    for path in (Path(__file__).parents[2] / "hub_cards").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("recipes", "modeling_lrkd", "tests") for name in names), path
