import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from recipes.arguments import UserError
from recipes.evaluate.metrics import evaluate_predictions, expected_calibration_error, ranking_by_query, to_arrays
from recipes.schemas import load_labels

ESCI = load_labels("esci")
EXACT, SUBSTITUTE, COMPLEMENT, IRRELEVANT = np.eye(4)


def predictions(rows):
    """One row a tuple (query, label, probabilities); the predicted label is the most probable one."""
    return pd.DataFrame(
        {
            "pair_id": [f"p{index}" for index in range(len(rows))],
            "query": [query for query, _, _ in rows],
            "locale": "us",
            "label": [label for _, label, _ in rows],
            "predicted_label": [ESCI.names[int(np.argmax(p))] for _, _, p in rows],
            "probabilities": [np.asarray(p, dtype=np.float32) for _, _, p in rows],
        }
    )


def random_predictions(seed, rows=60, queries=12):
    generator = np.random.default_rng(seed)
    table = predictions(
        [
            (f"q{generator.integers(queries)}", ESCI.names[generator.integers(4)], generator.dirichlet(np.ones(4)))
            for _ in range(rows)
        ]
    )
    return table.assign(locale=np.where(table["query"] < "q5", "us", "jp"))


def literal_ndcg(gains, scores):
    """Burges' definition with linear gains, spelt out."""
    ranked = [gain for _, gain in sorted(zip(scores, gains, strict=True), reverse=True)]

    def dcg(values):
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(values, start=1))

    return dcg(ranked) / dcg(sorted(gains, reverse=True))


def test_classification_by_hand():
    table = predictions(
        [
            ("a", "Exact", [0.7, 0.1, 0.1, 0.1]),
            ("a", "Exact", [0.4, 0.6, 0.0, 0.0]),
            ("b", "Substitute", [0.2, 0.8, 0.0, 0.0]),
            ("b", "Irrelevant", [0.5, 0.0, 0.0, 0.5]),
        ]
    )
    overall = evaluate_predictions(table, ESCI)["overall"]
    assert overall["confusion_matrix"] == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert overall["accuracy"] == 2 / 4
    assert overall["per_class"]["Exact"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert overall["per_class"]["Substitute"]["f1"] == pytest.approx(2 / 3)
    # Complement has no gold row: the mean is over the other three.
    assert overall["macro_f1_classes"] == ["Exact", "Substitute", "Irrelevant"]
    assert overall["macro_f1"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert overall["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.4) + math.log(0.8) + math.log(0.5)) / 4)
    assert overall["brier"] == pytest.approx((0.12 + 0.72 + 0.08 + 0.5) / 4)
    # Exact at 0.7 and 0.4 against 0.2 and 0.5: three of the four comparisons are won.
    assert overall["roc_auc"] == pytest.approx(3 / 4)
    # Four bins, one row each: |1-0.7|, |0-0.6|, |1-0.8|, |0-0.5|.
    assert overall["ece"] == pytest.approx((0.3 + 0.6 + 0.2 + 0.5) / 4)


def test_a_class_predicted_but_absent_from_gold_costs_recall_only():
    table = predictions([("a", "Exact", EXACT), ("b", "Exact", COMPLEMENT)])
    overall = evaluate_predictions(table, ESCI)["overall"]
    assert overall["macro_f1"] == pytest.approx(2 / 3)  # precision 1, recall 1/2, the only class in gold


def test_calibration_error_is_zero_when_confidence_is_accuracy():
    probabilities = np.array([[0.75, 0.25]] * 4)
    assert expected_calibration_error(np.array([0, 0, 0, 1]), probabilities) == pytest.approx(0)


def test_bins_are_closed_on_the_right():
    # 0.6 is the edge between bins 9 and 10 of 15: it shares bin 9 with 0.59, not bin 10 with 0.61.
    below, edge, above = [0.59, 0.41], [0.6, 0.4], [0.61, 0.39]
    assert expected_calibration_error(np.array([0, 1]), np.array([below, edge])) == pytest.approx(0.19 / 2)
    assert expected_calibration_error(np.array([1, 0]), np.array([edge, above])) == pytest.approx((0.6 + 0.39) / 2)


def test_perfect_order_has_ndcg_one_and_perfect_predictions_are_perfect():
    table = predictions(
        [("a", label, np.eye(4)[ESCI.label2id[label]]) for label in ("Irrelevant", "Complement", "Exact", "Substitute")]
    )
    overall = evaluate_predictions(table, ESCI)["overall"]
    for metric in ("accuracy", "macro_f1", "ndcg", "ndcg_contested", "map", "mrr", "roc_auc"):
        assert overall[metric] == pytest.approx(1), metric
    for metric in ("nll", "brier", "ece"):
        assert overall[metric] == pytest.approx(0, abs=1e-6), metric


def test_gains_of_substitute_and_complement_are_not_swapped():
    # The Complement is ranked above the Substitute: DCG 0.01 + 0.1/log2(3), ideal 0.1 + 0.01/log2(3).
    table = predictions([("a", "Substitute", [0.1, 0.2, 0.3, 0.4]), ("a", "Complement", [0.4, 0.3, 0.2, 0.1])])
    expected = (0.01 + 0.1 / math.log2(3)) / (0.1 + 0.01 / math.log2(3))
    assert evaluate_predictions(table, ESCI)["overall"]["ndcg"] == pytest.approx(expected)
    assert expected < 0.7  # with swapped gains this order would be ideal
    # The score too: certain Substitutes rank above certain Complements.
    table = predictions([("a", "Exact", SUBSTITUTE), ("a", "Irrelevant", COMPLEMENT)])
    assert evaluate_predictions(table, ESCI)["overall"]["ndcg"] == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_ndcg_agrees_with_its_definition_and_with_scikit_learn(seed):
    table = random_predictions(seed)
    gold, _, probabilities = to_arrays(table, ESCI)
    by_query = ranking_by_query(table, ESCI).set_index(["locale", "query"])["ndcg"]
    for key, rows in table.groupby(["locale", "query"]).indices.items():
        gains = np.array(ESCI.gains)[gold[rows]]
        scores = probabilities[rows] @ np.array(ESCI.gains)
        if gains.max() == 0:
            assert math.isnan(by_query[key])
            continue
        assert by_query[key] == pytest.approx(literal_ndcg(gains, scores))
        if len(rows) > 1:
            assert by_query[key] == pytest.approx(ndcg_score([gains], [scores]))


def test_ranking_by_hand_and_queries_that_are_left_out():
    table = predictions(
        [
            ("a", "Substitute", [0.9, 0.1, 0.0, 0.0]),
            ("a", "Exact", [0.5, 0.5, 0.0, 0.0]),
            ("a", "Irrelevant", [0.2, 0.0, 0.0, 0.8]),
            ("a", "Exact", [0.1, 0.0, 0.0, 0.9]),
            ("b", "Substitute", EXACT),  # one product: nDCG 1, no relevant one
            ("c", "Irrelevant", EXACT),  # no gain at all
        ]
    )
    overall = evaluate_predictions(table, ESCI)["overall"]
    first = literal_ndcg([0.1, 1, 0, 1], [4, 3, 2, 1])
    assert overall["ndcg"] == pytest.approx((first + 1) / 2)
    assert (overall["ndcg_queries"], overall["ndcg_queries_several_products"], overall["queries"]) == (2, 1, 3)
    assert overall["ndcg_contested"] == pytest.approx(first)
    assert overall["map"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert overall["mrr"] == pytest.approx(1 / 2)
    assert overall["map_queries"] == 1


def test_the_same_words_in_two_locales_are_two_queries():
    table = predictions([("a", "Exact", EXACT), ("a", "Irrelevant", IRRELEVANT)]).assign(locale=["us", "es"])
    result = evaluate_predictions(table, ESCI)
    assert result["overall"]["queries"] == 2
    assert result["overall"]["ndcg_contested"] is None
    assert "gains" in result["overall"]["undefined"]["ndcg_contested"]


def test_undefined_metrics_are_null_with_a_reason():
    result = evaluate_predictions(predictions([("a", "Irrelevant", EXACT), ("b", "Irrelevant", EXACT)]), ESCI)
    undefined = result["overall"]["undefined"]
    assert set(undefined) == {"roc_auc", "ndcg", "ndcg_contested", "map", "mrr"}
    assert all(result["overall"][metric] is None and reason for metric, reason in undefined.items())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_order_of_rows_changes_nothing(seed):
    table = random_predictions(seed)
    # Every score twice, so that ties are tested.
    labels = table["label"].sample(frac=1, random_state=seed).to_numpy()
    table = pd.concat([table, table.assign(pair_id="twin-" + table["pair_id"], label=labels)], ignore_index=True)

    def flat(value, path=""):
        if isinstance(value, dict):
            return {k: v for key, item in value.items() for k, v in flat(item, f"{path}/{key}").items()}
        return {path: value}

    expected = flat(evaluate_predictions(table, ESCI))
    shuffled = flat(evaluate_predictions(table.sample(frac=1, random_state=seed + 1), ESCI))
    for path, value in expected.items():
        assert shuffled[path] == (pytest.approx(value, abs=1e-12) if isinstance(value, float) else value), path


def test_slices_are_the_metrics_of_their_rows():
    table = random_predictions(3)
    result = evaluate_predictions(table, ESCI)
    for locale in ("us", "jp"):
        alone = evaluate_predictions(table[table["locale"] == locale], ESCI)
        assert result["locales"][locale] == alone["overall"]


def test_ties_are_not_broken_by_the_numbering_of_pairs():
    # A model without an opinion, and the relevant product always numbered last (or first): about chance, not 1 or 0.
    for labels in (["Irrelevant", "Exact"], ["Exact", "Irrelevant"]):
        rows = [(f"q{query}", label, EXACT) for query in range(200) for label in labels]
        table = predictions(rows).assign(pair_id=[f"{index:05d}" for index in range(400)])
        assert evaluate_predictions(table, ESCI)["overall"]["mrr"] == pytest.approx(0.75, abs=0.06)


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        ([2.0, -1.0, 0.5, 0.1], "row 1 .*'p1'.*sums to 1.6.*softmax"),
        ([1.2, -0.2, 0.0, 0.0], "row 1 .*from 0 to 1"),
        ([0.2, 0.2, 0.2, 0.2], "row 1 .*sums to 0.8"),
    ],
)
def test_numbers_that_are_not_probabilities(probabilities, message):
    table = predictions([("a", "Exact", EXACT), ("a", "Exact", probabilities)])
    with pytest.raises(UserError, match=message):
        evaluate_predictions(table, ESCI)


def test_probabilities_of_another_schema():
    table = predictions([("a", "Exact", EXACT)]).assign(probabilities=[np.full(6, 1 / 6)])
    with pytest.raises(UserError, match=r"6 numbers a row; expected 4.*Exact, Substitute"):
        evaluate_predictions(table, ESCI)


def test_labels_outside_the_schema_and_empty_tables():
    table = predictions([("a", "Exact", EXACT)])
    with pytest.raises(UserError, match=r"row 0.*'Brand Mismatch'"):
        evaluate_predictions(table.assign(predicted_label="Brand Mismatch"), ESCI)
    with pytest.raises(UserError, match="no rows"):
        evaluate_predictions(table.iloc[:0], ESCI)
