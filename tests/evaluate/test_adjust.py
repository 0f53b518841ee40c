"""Logit adjustment: by hand, as a student of its own, and in comparisons."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from transformers import AutoModelForSequenceClassification

from recipes.arguments import UserError
from recipes.evaluate.adjust import AdjustArguments, adjust, adjust_predictions, log_offsets, log_shares
from recipes.evaluate.compare import CompareArguments, write_comparison
from recipes.evaluate.run import RunArguments, evaluate
from recipes.schemas import PAIRS, PREDICTIONS, RATIONALES, load_labels, read, read_pairs, write
from recipes.student.distill import DistillArguments, distill
from tests.student.conftest import make_options, make_workspace

ESCI = load_labels("esci")


def predictions_of(probabilities, label="Exact"):
    rows = np.asarray(probabilities)
    return pd.DataFrame(
        {
            "pair_id": [f"p{n}" for n in range(len(rows))],
            "query": "q",
            "locale": "us",
            "label": label,
            "predicted_label": [ESCI.names[n] for n in rows.argmax(axis=1)],
            "probabilities": list(rows),
        }
    )


def test_by_hand():
    shares = np.array([0.6, 0.2, 0.1, 0.1])
    adjusted = adjust_predictions(predictions_of([[0.6, 0.3, 0.1, 0.0]]), ESCI, np.log(shares))
    # 0.6/0.6, 0.3/0.2, 0.1/0.1 and 0, over their sum.
    np.testing.assert_allclose(adjusted["probabilities"][0], [1 / 3.5, 1.5 / 3.5, 1 / 3.5, 0], atol=1e-6)
    assert adjusted["predicted_label"].tolist() == ["Substitute"]
    half = adjust_predictions(predictions_of([[0.6, 0.3, 0.1, 0.0]]), ESCI, 0.5 * np.log(shares))
    assert half["predicted_label"].tolist() == ["Exact"]


@given(st.lists(st.floats(0.01, 1), min_size=4, max_size=4), st.lists(st.floats(0.01, 1), min_size=4, max_size=4))
def test_adjusting_there_and_back_changes_nothing(weights, shares):
    before = predictions_of([np.array(weights) / sum(weights)])
    offsets = np.log(shares)
    there = adjust_predictions(before, ESCI, offsets)
    back = adjust_predictions(there, ESCI, -offsets)
    np.testing.assert_allclose(back["probabilities"][0], before["probabilities"][0], atol=1e-9)


def test_with_true_probabilities_it_is_best_for_balanced_accuracy():
    generator = np.random.default_rng(0)
    shares = np.array([0.7, 0.2, 0.06, 0.04])
    gold = generator.choice(4, size=20_000, p=shares)
    signal = generator.normal(size=(20_000, 4)) + 1.5 * np.eye(4)[gold]  # log p(signal | class) = 1.5 · signal + const
    posterior = np.exp(1.5 * signal) * shares
    table = predictions_of(posterior / posterior.sum(axis=1, keepdims=True))
    scores = {}
    for tau in (0, 0.5, 1, 1.5):
        predicted = adjust_predictions(table, ESCI, tau * np.log(shares))["predicted_label"].map(ESCI.label2id)
        scores[tau] = balanced_accuracy_score(gold, predicted), accuracy_score(gold, predicted)
    assert max(scores, key=lambda tau: scores[tau][0]) == 1
    assert max(scores, key=lambda tau: scores[tau][1]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A student of two perspectives, trained on pairs of which half are Exact, and calibrated by hand."""
    folder = make_workspace(tmp_path_factory.mktemp("adjust"))
    train = read_pairs(folder / "pairs", ("train",))["train"]
    write(train[(train["label"] == "Exact") | (train.index % 3 == 0)], folder / "pairs" / "train.parquet", PAIRS)
    rationales = read(folder / "rationales.parquet", RATIONALES)
    rationales["perspective"] = np.where(rationales.index % 2, "user_intent", "business_rule")
    write(rationales, folder / "rationales.parquet", RATIONALES)
    distill(DistillArguments(**make_options(folder)))
    config = folder / "student" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"class_biases": [9.0, 0.0, 0.0, 0.0]}))
    return folder


def evaluated(folder, model, output):
    return evaluate(
        RunArguments(model=str(model), pairs=str(folder / "pairs"), labels="esci", output=str(output), device="cpu")
    )


def test_the_adjusted_student_decides_as_its_adjusted_predictions(trained, tmp_path):
    student, pairs = trained / "student", str(trained / "pairs")
    record = adjust(AdjustArguments(model=str(student), pairs=pairs, labels="esci", output=str(tmp_path / "adjusted")))
    evaluated(trained, student, tmp_path / "before")
    evaluated(trained, tmp_path / "adjusted", tmp_path / "after")
    before, after = (read(tmp_path / name / "predictions.parquet", PREDICTIONS) for name in ("before", "after"))
    counts = read_pairs(pairs, ("train",))["train"]["label"].value_counts()
    shares = np.array([counts[name] for name in ESCI.names]) / counts.sum()
    assert shares.max() > 2 * shares.min()
    expected = adjust_predictions(before, ESCI, np.log(shares))
    np.testing.assert_allclose(np.stack(after["probabilities"]), np.stack(expected["probabilities"]), atol=1e-5)
    assert not np.allclose(np.stack(after["probabilities"]), np.stack(before["probabilities"]), atol=0.01)
    assert list(record["logit_adjustment"]["taken_off_logits"].values()) == pytest.approx(np.log(shares), abs=1e-6)

    # It loads as any student, nothing else is another, and what was fitted to the old logits is gone.
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adjusted", trust_remote_code=True)
    assert model.config.class_biases is None
    weights, old = (load_file(folder / "model.safetensors") for folder in (tmp_path / "adjusted", student))
    assert [name for name in weights if not np.array_equal(weights[name], old[name])] == ["classifier.bias"]
    means = [load_file(folder / "perspectives.safetensors") for folder in (tmp_path / "adjusted", student)]
    assert means[0].keys() == means[1].keys() == {"business_rule", "user_intent"}


def test_comparisons_decide_adjusted(trained, tmp_path):
    pairs = str(trained / "pairs")
    adjusted = str(tmp_path / "adjusted")
    adjust(AdjustArguments(model=str(trained / "student"), pairs=pairs, labels="esci", output=adjusted, tau=0.7))
    evaluated(trained, trained / "student", tmp_path / "before")
    evaluated(trained, adjusted, tmp_path / "after")
    runs = {name: [f"{name}={tmp_path / name}", f"again={tmp_path / name}"] for name in ("before", "after")}
    settings = {"output": str(tmp_path / "comparison"), "draws": 100}
    found = write_comparison(
        CompareArguments(baseline="before", runs=runs["before"], logit_adjustment=0.7, pairs=pairs, **settings)
    )
    expected = write_comparison(CompareArguments(baseline="after", runs=runs["after"], **settings))
    one, other = (table["slices"]["overall"]["systems"]["again"]["metrics"] for table in (found, expected))
    assert one["accuracy"] == other["accuracy"]
    assert one["macro_f1"] == other["macro_f1"]
    with pytest.raises(UserError, match=r"--logit_adjustment 0\.7 and --pairs None: give both, or neither"):
        write_comparison(CompareArguments(baseline="before", runs=runs["before"], logit_adjustment=0.7, **settings))


def test_what_are_no_probabilities_is_said_and_not_adjusted():
    offsets = np.log([0.6, 0.2, 0.1, 0.1])
    with pytest.raises(UserError, match=r"a\.parquet: row 0 .*expected numbers from 0 to 1 that sum to one"):
        adjust_predictions(predictions_of([[2.0, -1.0, 0.5, 0.1]]), ESCI, offsets, "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: column 'probabilities' has 2 numbers a row; expected 4"):
        adjust_predictions(predictions_of([[0.5, 0.5]]), ESCI, offsets, "a.parquet")


def test_shares_of_aliases(trained, tmp_path):
    train = read_pairs(trained / "pairs", ("train",))["train"]
    write(train.assign(label=train["label"].str[0]), tmp_path / "train.parquet", PAIRS)
    assert log_shares(tmp_path, ESCI).tolist() == log_shares(trained / "pairs", ESCI).tolist()


def test_bad_input(trained, tmp_path):
    good = {"model": str(trained / "student"), "pairs": str(trained / "pairs"), "labels": "esci"}
    with pytest.raises(UserError, match=r"τ -1\.0: expected 0 or more"):
        adjust(AdjustArguments(**good, output=str(tmp_path / "a"), tau=-1.0))
    with pytest.raises(UserError, match=r"no training\.json there"):
        adjust(AdjustArguments(**{**good, "model": str(trained)}, output=str(tmp_path / "a")))
    with pytest.raises(UserError, match="is there already"):
        adjust(AdjustArguments(**good, output=str(trained / "student")))
    train = read_pairs(trained / "pairs", ("train",))["train"]
    write(train[train["label"] != "Complement"], tmp_path / "few" / "train.parquet", PAIRS)
    with pytest.raises(UserError, match=r"few.train\.parquet: no pair of class 'Complement'"):
        log_offsets(1.0, tmp_path / "few", ESCI)
    with pytest.raises(UserError, match=r"label 'Exact' is not in the schema|its classes are not those of"):
        adjust(AdjustArguments(**{**good, "labels": "aliexpress6"}, output=str(tmp_path / "a")))
    assert not (tmp_path / "a").exists()
