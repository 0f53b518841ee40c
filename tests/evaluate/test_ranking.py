"""Ranking measures against hand-computed values and plain formulas, and the filtering curve by its counts."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from recipes.arguments import UserError
from recipes.evaluate.ranking import RankingArguments, filtering, measure
from recipes.schemas import PREDICTIONS, load_labels, write

ESCI = load_labels("esci")


def predictions(queries):
    """Queries as (locale, [(label, score)]), the score being the probability of Exact, the rest Irrelevant."""
    rows = []
    for number, (locale, products) in enumerate(queries):
        for label, score in products:
            probabilities = [score, 0.0, 0.0, 1 - score]
            predicted = "Exact" if score >= 0.5 else "Irrelevant"
            rows.append((f"p{len(rows)}", f"q{number}", locale, label, predicted, probabilities))
    return pd.DataFrame(rows, columns=["pair_id", "query", "locale", "label", "predicted_label", "probabilities"])


def run_on(queries, folder, **changed):
    write(predictions(queries), folder / "predictions.parquet", PREDICTIONS)
    result = measure(RankingArguments(predictions=str(folder), output=str(folder / "out"), **changed))
    assert json.loads((folder / "out" / "ranking.json").read_text()) == json.loads(json.dumps(result))
    return result["slices"]


def test_two_queries_by_hand(tmp_path):
    """us: Complement, Exact, Substitute, Exact in this order; jp: Exact first of two."""
    us = [("Complement", 0.9), ("Exact", 0.8), ("Substitute", 0.7), ("Exact", 0.6)]
    jp = [("Exact", 0.9), ("Irrelevant", 0.2)]
    slices = run_on([("us", us), ("jp", jp)], tmp_path, cutoffs=[1, 2, 3])
    log = math.log2
    # Substitute 0.1 and Complement 0.01: swapped, the first place would gain ten times as much.
    dcg = 0.01 / log(2) + 1 / log(3) + 0.1 / log(4) + 1 / log(5)
    ideal = 1 / log(2) + 1 / log(3) + 0.1 / log(4) + 0.01 / log(5)
    assert slices["us"]["ndcg"] == pytest.approx(dcg / ideal, abs=1e-6)
    assert slices["us"]["map"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert slices["us"]["mrr"] == pytest.approx(1 / 2)
    assert {k: values["value"] for k, values in slices["us"]["precision"].items()} == pytest.approx(
        {"1": 0.0, "2": 1 / 2, "3": 1 / 3}
    )
    assert (slices["jp"]["ndcg"], slices["jp"]["map"], slices["jp"]["mrr"]) == (1.0, 1.0, 1.0)
    assert slices["jp"]["precision"] == {
        "1": {"value": 1.0, "queries": 1},
        "2": {"value": 0.5, "queries": 1},
        "3": {"value": None, "queries": 0},  # two products cannot fill three places
    }
    assert slices["overall"]["precision"]["1"] == {"value": 0.5, "queries": 2}
    assert slices["overall"]["mrr"] == pytest.approx(0.75)


def test_the_library_agrees_with_the_formulas(tmp_path):
    """200 rankings of 1 to 7 random labels; every measure is averaged over the queries where it is defined."""
    generator = np.random.default_rng(0)
    orders = [generator.choice(ESCI.names, size=generator.integers(1, 8)).tolist() for _ in range(200)]
    queries = [("us", [(label, 0.9 - place / 10) for place, label in enumerate(labels)]) for labels in orders]
    overall = run_on(queries, tmp_path, cutoffs=[1, 3])["overall"]
    gains = dict(zip(ESCI.names, ESCI.gains))
    ndcg, ap, rr, at_1, at_3 = [], [], [], [], []
    for labels in orders:
        gained = [gains[label] for label in labels]
        discount = [1 / math.log2(place + 2) for place in range(len(labels))]
        if ideal := np.dot(sorted(gained, reverse=True), discount):
            ndcg.append(np.dot(gained, discount) / ideal)
        exact = [label == "Exact" for label in labels]
        if any(exact):
            places = [place for place, hit in enumerate(exact, start=1) if hit]
            ap.append(np.mean([number / place for number, place in enumerate(places, start=1)]))
            rr.append(1 / places[0])
            at_1.append(float(exact[0]))
            if len(labels) >= 3:
                at_3.append(sum(exact[:3]) / 3)
    expected = {"ndcg": ndcg, "map": ap, "mrr": rr}
    for name, values in expected.items():
        assert overall[name] == pytest.approx(np.mean(values), abs=1e-6)
    for k, values in (("1", at_1), ("3", at_3)):
        assert overall["precision"][k]["queries"] == len(values)
        assert overall["precision"][k]["value"] == pytest.approx(np.mean(values))


def test_a_filter_by_hand():
    """Relevant at 0.2, 0.8, 0.9; others at 0.1, 0.2, 0.5: below 0.8 lie one of three and all of three."""
    scores = np.array([0.2, 0.8, 0.9, 0.1, 0.2, 0.5])
    found = filtering(scores, np.array([True] * 3 + [False] * 3))
    rows = [tuple(point.values()) for point in found["curve"]]
    third = 1 / 3
    expected = [
        (0.1, 0, 0, 0),
        (0.2, 1 / 6, 0, third),
        (0.5, 0.5, third, 2 / 3),
        (0.8, 2 / 3, third, 1),
        (0.9, 5 / 6, 2 / 3, 1),
    ]
    assert [pytest.approx(row) for row in expected] == rows
    assert found["at"]["0.02"] == found["curve"][1]  # nothing may be lost: up to 0.2
    assert filtering(scores, np.ones(6, dtype=bool)) == {"curve": None, "at": None}


def test_a_filter_only_rises_and_ends_where_its_shares_say():
    generator = np.random.default_rng(0)
    relevant = generator.uniform(size=3000) < 0.5
    scores = generator.normal(size=3000) + relevant
    found = filtering(scores, relevant)
    assert len(found["curve"]) == 200
    for name in ("filtered", "relevant_lost", "others_filtered"):
        assert (np.diff([point[name] for point in found["curve"]]) >= 0).all()
    for lost, point in found["at"].items():
        below = scores < point["threshold"]
        assert below[relevant].mean() == pytest.approx(point["relevant_lost"])
        assert point["relevant_lost"] <= float(lost)
        following = scores[relevant & ~below].min()
        assert (scores[relevant] <= following).mean() > float(lost)  # one more would be too many


def test_bad_input(tmp_path):
    write(predictions([("us", [("Exact", 0.9)])]), tmp_path / "predictions.parquet", PREDICTIONS)
    with pytest.raises(UserError, match="cutoffs"):
        measure(RankingArguments(str(tmp_path), str(tmp_path), cutoffs=[0]))
    with pytest.raises(UserError, match="Calibrate the student first"):
        measure(RankingArguments(str(tmp_path), str(tmp_path), model=str(tmp_path)))
