"""The metric module as a user loads it, against scikit-learn, ir_measures and the project's own metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import ndcg_score

from recipes.evaluate.metrics import evaluate_predictions
from recipes.schemas import load_labels

MODULE = Path(__file__).parents[2] / "hub_cards" / "lrkd_relevance"

STRANGER = """
import json, sys
import evaluate

metric = evaluate.load(sys.argv[1])
found = {"description": metric.description, "inputs": metric.inputs_description, "results": []}
for call in json.loads(sys.stdin.read()):
    try:
        found["results"].append(metric.compute(**call))
    except ValueError as error:
        found["results"].append(str(error))
for start in (0, 30):  # as a loop over batches does
    call = json.loads(sys.argv[2])
    metric.add_batch(**{name: values[start : start + 30] for name, values in call.items()})
found["batches"] = metric.compute(gains=[1.0, 0.1, 0.01, 0.0])
print("FOUND" + json.dumps(found))
"""
TINY = {"predictions": [[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]], "references": [0, 1, 0], "queries": ["cup", "cup", "hat"]}
BAD = [
    ({"predictions": [[0.9, 0.3]], "references": [0], "queries": ["cup"]}, "row 0: .* probabilities that sum to one"),
    ({"predictions": [[0.9, 0.1]], "references": [2], "queries": ["cup"]}, "references: row 0: 2; expected a class"),
    ({"predictions": [[0.9, 0.1]], "references": [-1], "queries": ["cup"]}, "references: row 0: -1"),
    ({**TINY, "gains": [1.0]}, "gains: expected 2 numbers"),
    ({**TINY, "gains": [1.0, -1.0]}, "gains: expected 2 numbers from 0 up"),
    ({**TINY, "predictions": [[1.0], [0.2, 0.8], [0.4, 0.6]]}, r"rows of \[1, 2\] numbers"),
    ({"predictions": [[0.9, 0.1]], "references": [0]}, "queries"),
]


def random_predictions(rows=60, seed=0):
    generator = np.random.default_rng(seed)
    schema = load_labels("esci")
    probabilities = generator.dirichlet(np.ones(4), size=rows)
    gold = generator.integers(4, size=rows)
    return pd.DataFrame(
        {
            "pair_id": [f"p{row}" for row in range(rows)],
            "query": [f"q{number}" for number in generator.integers(12, size=rows)],
            "locale": generator.choice(["us", "es"], size=rows),
            "label": [schema.names[index] for index in gold],
            "predicted_label": [schema.names[index] for index in probabilities.argmax(axis=1)],
            "probabilities": list(probabilities),
        }
    )


def as_call(frame):
    schema = load_labels("esci")
    return {
        "predictions": [row.tolist() for row in frame["probabilities"]],
        "references": [schema.label2id[label] for label in frame["label"]],
        "queries": (frame["locale"] + " " + frame["query"]).tolist(),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a clean process computes."""
    folder = tmp_path_factory.mktemp("metric")
    frame = random_predictions()
    gains = load_labels("esci").gains
    tied = {**as_call(frame), "predictions": [[0.4, 0.3, 0.2, 0.1]] * len(frame)}
    calls = [
        {**TINY, "gains": [1.0, 0.0]},
        TINY,
        {**as_call(frame), "gains": gains},
        {**tied, "gains": gains},
        {**TINY, "references": [1, 1, 1], "gains": [1.0, 0.0]},
        *(call for call, _ in BAD),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, str(MODULE), json.dumps(as_call(frame))],
        input=json.dumps(calls),
        cwd=folder,
        env={**environment, "HF_HOME": str(folder), "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.split("FOUND")[1])


def test_by_hand(found):
    # |1 - 0.9|, |1 - 0.8| and |0 - 0.6| in three bins; F1 is 2/3 for either class; both queries have one right product.
    assert found["results"][0] == pytest.approx(
        {"accuracy": 2 / 3, "macro_f1": 2 / 3, "ece": 0.3, "ndcg": 1.0, "ndcg_queries": 2}
    )
    assert set(found["results"][1]) == {"accuracy", "macro_f1", "ece"}


def test_the_same_values_as_the_projects_own_metrics(found):
    ours = evaluate_predictions(random_predictions(), load_labels("esci"))["overall"]
    assert found["results"][2] == pytest.approx(
        {name: ours[name] for name in ("accuracy", "macro_f1", "ece", "ndcg", "ndcg_queries")}, abs=1e-12
    )
    assert found["batches"] == pytest.approx(found["results"][2], abs=1e-12)


def test_ties_share_their_discounts_as_in_scikit_learn(found):
    frame = random_predictions()
    gains = np.array(load_labels("esci").gains)[as_call(frame)["references"]]
    expected = []
    for _, rows in frame.groupby(["locale", "query"]):
        if len(rows) > 1 and gains[rows.index].max() > 0:
            expected.append(ndcg_score(gains[rows.index][None], np.zeros((1, len(rows)))))
        elif gains[rows.index].max() > 0:
            expected.append(1.0)
    assert found["results"][3]["ndcg_queries"] == len(expected)
    assert found["results"][3]["ndcg"] == pytest.approx(np.mean(expected))


def test_without_a_product_of_positive_gain_ndcg_is_nan(found):
    assert np.isnan(found["results"][4]["ndcg"])
    assert found["results"][4]["ndcg_queries"] == 0


def test_what_cannot_be_measured_is_refused(found):
    import re

    for (_, message), error in zip(BAD, found["results"][5:], strict=True):
        assert isinstance(error, str)
        assert re.search(message, error)


def test_it_documents_its_inputs(found):
    for name in ("predictions", "references", "queries", "gains", "bins", "ndcg_queries"):
        assert f"{name}:" in found["inputs"]
    assert "nDCG" in found["description"]
