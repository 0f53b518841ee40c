"""Measuring a teacher: hand-computed values, counting by brute force, and what one sample does not allow."""

import collections
import hashlib
import itertools
import json
import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from recipes.arguments import UserError
from recipes.schemas import COMPLETIONS, PAIRS, PERSPECTIVES, load_labels, write
from recipes.teacher.evaluate import EvaluateArguments, evaluate
from recipes.teacher.measures import agreement, oracle, pass_at_k, vote
from recipes.teacher.pilot import evaluate_answers
from recipes.teacher.report import table

ESCI = load_labels("esci")
E, S, C, IRRELEVANT, UNREAD = range(5)


# Pure functions


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(right, data):
    k = data.draw(st.integers(1, len(right)))
    subsets = list(itertools.combinations(right, k))
    expected = Fraction(sum(any(subset) for subset in subsets), len(subsets))
    assert pass_at_k(np.array([sum(right)]), len(right), k)[0] == pytest.approx(float(expected), abs=1e-12)


def test_pass_at_k_by_hand():
    # n = 5, c = 2, k = 3: all three are wrong in C(3,3) = 1 of C(5,3) = 10 subsets.
    assert pass_at_k(np.array([2]), 5, 3).tolist() == [0.9]
    # The biased 1 - (1 - c/n)^k would say 0.784.
    assert pass_at_k(np.array([0, 3, 5]), 5, 1).tolist() == pytest.approx([0, 0.6, 1])
    for k in (0, 6):
        with pytest.raises(ValueError, match="expected 1 to 5"):
            pass_at_k(np.array([2]), 5, k)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_oracle_is_the_share_of_choices_with_a_right_sample(right):
    choices = list(itertools.product(*right))
    expected = sum(any(choice) for choice in choices) / len(choices)
    assert oracle([np.array(rows)[:, None] for rows in right])[0] == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.integers(E, UNREAD), min_size=1, max_size=9))
def test_a_vote_elects_the_most_frequent_label_and_the_first_of_tied_ones(votes):
    winners, tied = vote(np.array(votes)[:, None], num_classes=4)
    counts = collections.Counter(label for label in votes if label != UNREAD).most_common()
    # Counter keeps equal counts in the order of first appearance.
    assert winners[0] == (counts[0][0] if counts else UNREAD)
    assert tied[0] == (len(counts) > 1 and counts[0][1] == counts[1][1])


def test_kappa_by_hand():
    # 50 pairs: 20 both E, 15 both S, 5 E/S, 10 S/E: observed 0.7, by chance 0.5·0.6 + 0.5·0.4 = 0.5.
    one = np.repeat([E, S, E, S], [20, 15, 5, 10])
    other = np.repeat([E, S, S, E], [20, 15, 5, 10])
    result = agreement(np.append(one, [UNREAD, E]), np.append(other, [E, UNREAD]), 4)
    assert result == {"pairs": 50, "equal": 0.7, "kappa": pytest.approx(0.4)}
    assert agreement(np.array([E, E]), np.array([E, E]), 4) == {"pairs": 2, "equal": 1.0, "kappa": None}
    assert agreement(np.array([UNREAD]), np.array([E]), 4) == {"pairs": 0, "equal": None, "kappa": None}


# One slice


def test_a_slice_by_hand():
    """Four pairs of two queries; user intent has three samples, structured analysis one, business rule one."""
    gold = np.array([E, E, S, IRRELEVANT])
    answers = {
        "user_intent": np.array([[E, S, S, UNREAD], [E, E, E, UNREAD], [S, S, C, UNREAD]]),
        "structured_analysis": np.array([[S, S, S, E]]),
        "business_rule": np.array([[S, E, C, IRRELEVANT]]),
    }
    result = evaluate_answers(answers, gold, np.array([0, 0, 0, 1]), ESCI, draws=50, seed=0)
    intent, structured, rule = (result["perspectives"][name] for name in PERSPECTIVES)
    # c of 3: 2, 1, 1, 0.
    assert intent["accuracy"]["value"] == pytest.approx((2 + 1 + 1 + 0) / 12)
    assert intent["pass_at_k"]["2"]["value"] == pytest.approx((1 + 2 / 3 + 2 / 3 + 0) / 4)
    assert intent["pass_at_k"]["3"]["value"] == pytest.approx(3 / 4)
    assert intent["unparsed"] == 0.25
    assert (structured["accuracy"]["value"], rule["accuracy"]["value"]) == (0.25, 0.5)
    assert list(structured["pass_at_k"]) == ["1"]
    assert intent["per_class"]["Exact"] == {"pairs": 2, **intent["per_class"]["Exact"], "value": pytest.approx(0.5)}
    assert intent["per_class"]["Irrelevant"]["value"] == 0
    assert intent["per_class"]["Complement"] is None
    # E E S; S E S; S E C; nobody: S, S and S win within user intent (E S S: S; C after S, E: tie, the first, S).
    assert intent["vote"]["accuracy"]["value"] == pytest.approx(2 / 4)
    assert intent["vote"]["ties"] == pytest.approx(1 / 4)
    assert structured["vote"] is None
    together = result["together"]
    # Chance of none right: pair 0 (1/3)·1·1, pair 1 (2/3)·1·0, pair 2 (2/3)·0, pair 3 1·1·0.
    assert together["oracle"]["value"] == pytest.approx((2 / 3 + 1 + 1 + 1) / 4)
    # Votes by pair in order: E S S E S; S S E E S; S S C E C; - E I - -.
    assert together["vote"]["accuracy"]["value"] == pytest.approx(1 / 4)
    assert together["vote"]["ties"] == pytest.approx(2 / 4)
    assert together["best_single"] == "business_rule"
    assert together["conflict"] == 1.0
    assert together["all_agree"] == {"share": 0.0, "accuracy": None}
    assert together["labels_named"] == pytest.approx((2 + 2 + 2 + 2) / 4)
    assert [(d["of"], d["to"]) for d in together["differences"]] == [
        ("oracle", "accuracy business_rule"),
        ("vote", "accuracy business_rule"),
        ("oracle", "pass@3 user_intent"),
    ]
    assert together["differences"][2]["value"] == pytest.approx(together["oracle"]["value"] - 3 / 4)
    assert result["constant_answers"] == [
        {"labels": ["Exact"], "any_right": 0.5},
        {"labels": ["Exact", "Substitute"], "any_right": 0.75},
    ]
    assert result["undefined"] == {
        "pass@3": "needs 3 samples of a perspective; structured_analysis has 1, business_rule has 1",
        "vote within a perspective": "needs two samples of it; structured_analysis, business_rule has one",
    }


def random_slice(seed=0, pairs=60, queries=12, samples=3):
    generator = np.random.default_rng(seed)
    query = np.concatenate([np.arange(queries), generator.integers(queries, size=pairs - queries)])
    gold = generator.integers(0, 4, size=pairs)
    answers = {name: generator.integers(0, 5, size=(samples, pairs)) for name in PERSPECTIVES}
    return answers, gold, query


def test_macro_f1_is_scikit_learns_and_unread_answers_cost_recall():
    answers, gold, query = random_slice()
    result = evaluate_answers(answers, gold, query, ESCI, draws=10, seed=0)
    for name, rows in answers.items():
        expected = [f1_score(gold, run, labels=np.unique(gold), average="macro", zero_division=0) for run in rows]
        assert result["perspectives"][name]["macro_f1"]["value"] == pytest.approx(np.mean(expected))
        assert result["perspectives"][name]["accuracy"]["value"] == pytest.approx((rows == gold).mean())


def test_intervals_are_those_of_drawing_whole_queries():
    answers, gold, query = random_slice()
    result = evaluate_answers(answers, gold, query, ESCI, draws=80, seed=7)
    generator = np.random.default_rng(7)
    rows_of = [np.flatnonzero(query == number) for number in range(12)]
    drawn = [np.concatenate([rows_of[n] for n in taken]) for taken in generator.integers(12, size=(80, 12))]
    intent = answers["user_intent"]
    any_right = 1 - np.prod([1 - (answers[name] == gold).mean(0) for name in PERSPECTIVES], axis=0)
    expected = {
        "accuracy": [(intent == gold).mean(0)[rows].mean() for rows in drawn],
        "macro_f1": [
            np.mean(
                [
                    f1_score(gold[r], run[r], labels=np.unique(gold[r]), average="macro", zero_division=0)
                    for run in intent
                ]
            )
            for r in drawn
        ],
        "oracle": [any_right[rows].mean() for rows in drawn],
    }
    found = {**result["perspectives"]["user_intent"], "oracle": result["together"]["oracle"]}
    for name, values in expected.items():
        assert found[name]["interval"] == pytest.approx(np.quantile(values, [0.025, 0.975]))


def test_laws_of_a_slice():
    answers, gold, query = random_slice(1, samples=5)
    result = evaluate_answers(answers, gold, query, ESCI, draws=10, seed=0)
    for name in PERSPECTIVES:
        passed = [value["value"] for value in result["perspectives"][name]["pass_at_k"].values()]
        assert passed == sorted(passed)
        assert passed[0] == pytest.approx(result["perspectives"][name]["accuracy"]["value"])
        assert passed[-1] == pytest.approx((answers[name] == gold).any(axis=0).mean())
        assert result["together"]["oracle"]["value"] >= passed[0]
    # The order of pairs is of no account.
    order = np.random.default_rng(0).permutation(60)
    shuffled = {name: rows[:, order] for name, rows in answers.items()}
    again = evaluate_answers(shuffled, gold[order], query[order], ESCI, draws=10, seed=0)
    assert json.dumps(again)[:200] == json.dumps(result)[:200]
    # Three times the same perspective is one perspective.
    same = evaluate_answers(
        dict.fromkeys(PERSPECTIVES, answers["user_intent"][:1]), gold, query, ESCI, draws=10, seed=0
    )
    assert [difference["value"] for difference in same["together"]["differences"]] == pytest.approx([0, 0])
    assert {pair["kappa"] for pair in same["together"]["agreement"].values()} == {1.0}


def test_one_query_has_no_intervals():
    answers, gold, query = random_slice()
    result = evaluate_answers(answers, gold, np.zeros_like(query), ESCI, draws=10, seed=0)
    assert result["perspectives"]["user_intent"]["accuracy"]["interval"] is None
    assert result["together"]["differences"][0]["interval"] is None
    assert result["undefined"]["intervals"] == "need two queries; there is one"
    assert "[" not in table({"overall": result, "locales": {}})


def test_one_perspective_alone_claims_nothing_about_several():
    answers, gold, query = random_slice()
    result = evaluate_answers({"unified": answers["user_intent"]}, gold, query, ESCI, draws=10, seed=0)
    assert result["together"] is None
    assert "oracle, vote and agreement" in result["undefined"]
    assert result["perspectives"]["unified"]["vote"]["accuracy"]


# The verb


@pytest.fixture
def files(tmp_path):
    """Six pairs in two locales; three perspectives, two samples; user intent is right but for one unread answer."""
    pairs = pd.DataFrame(
        {
            "pair_id": [f"p{n}" for n in range(6)],
            "query": ["lamp", "lamp", "mug", "taza", "taza", "pen"],
            "product_title": [f"title {n}" for n in range(6)],
            "locale": ["us"] * 3 + ["es"] * 2 + ["us"],
            "label": ["E", "S", "Exact", "C", "I", "E"],
        }
    )
    gold = ["E", "S", "E", "C", "I", "E"]
    rows = [
        {
            "pair_id": f"p{n}",
            "perspective": perspective,
            "sample_index": sample,
            "rationale": "because",
            "predicted_label": gold[n] if perspective == "user_intent" else "Exact",
            "parse_error": None,
        }
        for perspective in PERSPECTIVES
        for n in range(6)
        for sample in range(2)
    ]
    rows[0] |= {"predicted_label": None, "parse_error": "truncated: the reasoning is never closed"}
    completions = pd.DataFrame(rows)
    write(pairs, tmp_path / "pairs" / "test.parquet", PAIRS)
    return tmp_path, completions


def call(folder, completions, **options):
    # In another order than the pairs', as a teacher that works in parallel leaves them.
    write(completions.sample(frac=1, random_state=0), folder / "completions.parquet", COMPLETIONS)
    defaults = {"pairs": str(folder / "pairs"), "completions": [str(folder / "completions.parquet")], "draws": 100}
    return evaluate(EvaluateArguments(**{**defaults, "output": str(folder / "out"), **options}))


def test_the_verb_measures_and_writes(files):
    folder, completions = files
    metrics = call(folder, completions)
    intent = metrics["overall"]["perspectives"]["user_intent"]
    assert intent["samples"] == 2
    assert intent["accuracy"]["value"] == pytest.approx(11 / 12)
    assert intent["unparsed"] == pytest.approx(1 / 12)
    assert metrics["parse_errors"] == {"user_intent": {"truncated": 1}}
    assert metrics["overall"]["perspectives"]["business_rule"]["accuracy"]["value"] == pytest.approx(3 / 6)
    assert metrics["locales"]["es"]["perspectives"]["user_intent"]["accuracy"]["value"] == 1
    assert metrics["locales"]["es"]["pairs"] == 2
    assert metrics["locales"]["us"]["queries"] == 3
    assert metrics["overall"]["together"]["best_single"] == "user_intent"
    assert json.loads((folder / "out" / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert (folder / "out" / "table.md").read_text() == table(metrics)
    assert (folder / "out" / "perspectives.png").stat().st_size > 10_000
    assert metrics["facts"]["completions"].keys() == {str(folder / "completions.parquet")}
    assert metrics["facts"]["adapter_sha256"] is None


def test_the_adapter_that_wrote_the_completions_is_recorded(files):
    """Its card is refused without, or with another's."""
    folder, completions = files
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    metrics = call(folder, completions, adapter=str(folder))
    assert metrics["facts"]["adapter_sha256"] == hashlib.sha256(b"weights").hexdigest()


def test_files_of_other_tools_may_give_no_reasons_and_uneven_samples(files):
    """Of samples, the first of each count."""
    folder, completions = files
    extra = completions.iloc[:1].assign(sample_index=7, predicted_label="I")
    metrics = call(folder, pd.concat([completions, extra]).drop(columns="parse_error"))
    assert metrics["parse_errors"] == {"user_intent": {"no reason given": 1}}
    assert metrics["overall"]["perspectives"]["user_intent"]["samples"] == 2
    assert metrics["overall"]["perspectives"]["user_intent"]["accuracy"]["value"] == pytest.approx(11 / 12)


def test_pairs_without_completions_stop_it_or_are_left_out_aloud(files, capsys):
    folder, completions = files
    partial = completions[~((completions["pair_id"] == "p5") & (completions["perspective"] == "business_rule"))]
    with pytest.raises(UserError, match=r"1 of 6 pairs lack .* 'p5'; pairs by perspective: business_rule 5, str"):
        call(folder, partial)
    assert not (folder / "out").exists()
    metrics = call(folder, partial, missing="drop")
    assert metrics["overall"]["pairs"] == 5
    assert "left out" in capsys.readouterr().out
    none_at_all = completions[(completions["pair_id"] < "p2") & (completions["perspective"] == "user_intent")]
    with pytest.raises(UserError, match=r"4 of 6 pairs lack .* 'p2'; pairs by perspective: user_intent 2"):
        call(folder, none_at_all)
    assert call(folder, none_at_all, missing="drop")["overall"]["pairs"] == 2
    apart = completions[(completions["pair_id"] < "p3") == (completions["perspective"] == "user_intent")]
    with pytest.raises(UserError, match="None is left"):
        call(folder, apart, missing="drop")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"pair_id": "q"}, {}, "no completion has a pair_id of .* such as 'p0'. Were they made from other pairs"),
        ({"predicted_label": "Great"}, {}, "'Great' is not in the schema 'esci'"),
        ({}, {"split": "train"}, "train.parquet: no such file"),
        ({}, {"labels": "aliexpress6"}, "column 'label': label 'E' is not in the schema 'aliexpress6'"),
        ({}, {"draws": 0}, "--draws 0: expected at least 1"),
        ({}, {"adapter": "nowhere"}, "nowhere/adapter_model.safetensors: no such file"),
        ({}, {"pairs": "nowhere"}, "nowhere: no such folder. Expected pairs"),
    ],
)
def test_bad_input_stops_it_before_anything_is_written(files, change, options, message):
    folder, completions = files
    completions = completions.assign(**change).drop_duplicates(["pair_id", "perspective", "sample_index"])
    with pytest.raises(UserError, match=message):
        call(folder, completions, **options)
    assert not (folder / "out").exists()


@pytest.mark.esci
def test_the_pilot_on_real_completions(tmp_path):
    """One sample a perspective: accuracy and oracle as counted on the file itself, and no word of pass@3."""
    folder = Path(os.environ.get("LRKD_ESCI", Path(__file__).parents[2] / ".." / "shared" / "data" / "esci"))
    if not (folder / "completions.parquet").is_file():
        pytest.skip("no real ESCI completions: set LRKD_ESCI to their folder")
    raw = pd.read_parquet(folder / "pairs.parquet").rename(columns={"product_locale": "locale", "esci_label": "label"})
    columns = ["pair_id", "query", "product_title", "locale", "label"]
    write(raw.loc[raw["split"] == "test", columns], tmp_path / "test.parquet", PAIRS)
    metrics = evaluate(
        EvaluateArguments(
            pairs=str(tmp_path),
            completions=[str(folder / "completions.parquet")],
            output=str(tmp_path / "out"),
            draws=200,
        )
    )
    first = pd.read_parquet(folder / "completions.parquet").merge(raw.loc[raw["split"] == "test", ["pair_id", "label"]])
    right = (
        (first["predicted_label"] == first["label"]).groupby([first["pair_id"], first["perspective"]]).any().unstack()
    )
    for name in PERSPECTIVES:
        result = metrics["overall"]["perspectives"][name]
        assert result["accuracy"]["value"] == pytest.approx(right[name].mean())
        assert list(result["pass_at_k"]) == ["1"]
        assert not math.isnan(result["accuracy"]["interval"][0])
    assert metrics["overall"]["together"]["oracle"]["value"] == pytest.approx(right.any(axis=1).mean())
    assert "pass@3" in metrics["overall"]["undefined"]
