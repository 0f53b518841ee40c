"""Scaling by its laws, thresholds by hand-computed counts, and the verbs on predictions whose truth is known."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from recipes.arguments import UserError
from recipes.evaluate import drift
from recipes.evaluate.calibrate import CalibrateArguments, calibrate
from recipes.evaluate.drift import DriftArguments, check_drift, stability_index
from recipes.evaluate.metrics import classwise_calibration_error, expected_calibration_error
from recipes.evaluate.scaling import Scaling, fit, held_out_nll, tier_thresholds, tiers, upper_bound
from recipes.record import weights_sha256
from recipes.schemas import PREDICTIONS, load_labels, write
from tests.modeling.test_pipeline import save

ESCI = load_labels("esci")


def draw(rows=3000, seed=0, sharpness=1.0, scales=None, biases=None):
    """Gold classes drawn from true probabilities, and the probabilities that a distorted model would give."""
    generator = np.random.default_rng(seed)
    logits = 1.5 * generator.normal(size=(rows, 4)) + [1.0, 0.5, -0.5, 0.0]
    truth = softmax(logits, axis=1)
    gold = (truth.cumsum(axis=1) < generator.uniform(size=(rows, 1))).sum(axis=1)
    log_truth = np.log(truth)
    if scales is not None:
        log_truth = (log_truth - biases) / scales
    return gold, softmax(sharpness * log_truth, axis=1), truth


def nll(gold, probabilities):
    return -np.log(probabilities[np.arange(len(gold)), gold]).mean()


def test_the_temperature_that_distorted_is_found():
    gold, given_, truth = draw(sharpness=2.5)
    scaling = fit(gold, given_, "temperature")
    assert scaling.temperature == pytest.approx(2.5, rel=0.08)
    np.testing.assert_allclose(Scaling(temperature=2.5).apply(given_), truth, atol=1e-9)
    assert (scaling.apply(given_).argmax(1) == given_.argmax(1)).all()  # one number changes no prediction
    for other in (0.8, 1.25):
        assert nll(gold, scaling.apply(given_)) < nll(gold, Scaling(other * scaling.temperature).apply(given_))
    assert expected_calibration_error(gold, scaling.apply(given_)) < expected_calibration_error(gold, given_) / 3


def test_the_scales_and_biases_that_distorted_are_found():
    scales, biases = np.array([0.5, 1.0, 1.5, 0.8]), np.array([0.3, -0.3, 0.2, -0.2])
    gold, given_, _ = draw(rows=20_000, scales=scales, biases=biases)
    scaling = fit(gold, given_, "vector")
    # `given_` is normalised, which moves all log-probabilities of a row alike, so the map is not undone exactly.
    assert nll(gold, scaling.apply(given_)) < nll(gold, fit(gold, given_, "temperature").apply(given_)) - 0.01
    assert classwise_calibration_error(gold, scaling.apply(given_)) < 0.02 < classwise_calibration_error(gold, given_)
    assert sum(scaling.class_biases) == pytest.approx(0, abs=1e-9)
    fractions = scaling.apply(given_).mean(axis=0)
    np.testing.assert_allclose(fractions, np.bincount(gold) / len(gold), atol=1e-3)  # the biases' stationary point


def test_scaling_is_what_the_configuration_does():
    import torch

    from modeling_lrkd import LRKDConfig

    values = {"temperature": 1.7, "class_scales": [0.5, 1.2, 0.9, 1.0], "class_biases": [0.1, 0.0, -0.3, 0.2]}
    config = LRKDConfig(id2label=ESCI.id2label, **values)
    logits = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.softmax(config.calibrated(logits), dim=1)
    np.testing.assert_allclose(Scaling(**values).apply(torch.softmax(logits, 1).numpy()), expected, atol=1e-12)


def test_what_cannot_be_fitted():
    gold, given_, _ = draw(300)
    with pytest.raises(UserError, match="the same for every row"):
        fit(gold, np.full((300, 4), 0.25), "temperature")
    with pytest.raises(UserError, match="no temperature from"):
        fit(given_.argmax(1), given_, "temperature")  # all right: the sharper the better
    with pytest.raises(UserError, match="class 2 has no row"):
        fit(np.where(gold == 2, 0, gold), given_, "vector")
    with pytest.raises(UserError, match="fewer than two queries"):
        held_out_nll(gold, given_, np.zeros(300, dtype=int), "temperature")


def test_thresholds_by_hand():
    """Ten relevant products at 0.1, 0.2 ... 1.0: 20 % may lie below the first boundary, 50 % below the second."""
    scores = np.array([*np.arange(1, 11) / 10, 0.05, 0.15, 0.95])
    relevant = np.array([True] * 10 + [False] * 3)
    thresholds = tier_thresholds(scores, relevant, [0.2, 0.5], confidence=0)
    assert thresholds == [0.3, 0.6]
    assert tiers(scores, thresholds).tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 2]
    # At confidence 0.95: none of 10 lost shows at most 1 - 0.05^(1/10) = 25.9 %, one lost 39.4 %, two 50.7 %.
    assert tier_thresholds(scores, relevant, [0.26, 0.4], confidence=0.95) == [0.1, 0.2]
    assert upper_bound(0, 10, 0.95) == pytest.approx(1 - 0.05**0.1)


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=200),
    st.floats(0.01, 0.9),
    st.sampled_from([0.0, 0.5, 0.95]),
)
def test_a_threshold_keeps_its_target_and_no_higher_score_does(numbers, target, confidence):
    scores = np.append(np.array(numbers) / 60, [2.0, -1.0])
    relevant = np.append(np.ones(len(numbers), dtype=bool), [False, False])
    try:
        (threshold,) = tier_thresholds(scores, relevant, [target], confidence)
    except UserError:
        assert upper_bound(0, len(numbers), confidence) > target
        return
    kept = scores[relevant]
    assert upper_bound(int((kept < threshold).sum()), len(kept), confidence) <= target
    if len(higher := kept[kept > threshold]):
        assert upper_bound(int((kept < higher.min()).sum()), len(kept), confidence) > target


def test_targets_that_cannot_be_met_say_which_and_how_near():
    scores, relevant = np.arange(100) / 100, np.ones(100, dtype=bool)
    with pytest.raises(UserError, match=r"boundary 1: that at most 1.00%.*with 100 of them: .* the bound is 2.95%"):
        tier_thresholds(scores, relevant, [0.01, 0.5], 0.95)
    with pytest.raises(UserError, match=r"boundaries 1 and 2: the targets 10.00% and 10.40% both give 0.1000.*tier 1"):
        tier_thresholds(scores, relevant, [0.1, 0.104], 0)
    with pytest.raises(UserError, match="no relevant product"):
        tier_thresholds(scores, ~relevant, [0.1], 0)
    with pytest.raises(UserError, match="every product has the same score"):
        tier_thresholds(np.ones(100), relevant, [0.1], 0)


def test_the_index_of_two_tiers_by_hand():
    """(99.5, 1.5) of 101 against (50.5, 50.5) of 101 rows."""
    p, q = np.array([99.5, 1.5]) / 101, np.array([0.5, 0.5])
    expected = float(((p - q) * np.log(p / q)).sum())
    assert stability_index(np.array([99.0, 1.0]), np.array([50.0, 50.0])) == pytest.approx(expected)


# The verbs.


def table(gold, probabilities, prefix):
    names = np.array(ESCI.names)
    return pd.DataFrame(
        {
            "pair_id": [f"{prefix}{row}" for row in range(len(gold))],
            "query": [f"q{row // 4}" for row in range(len(gold))],
            "locale": "us",
            "label": names[gold],
            "predicted_label": names[probabilities.argmax(1)],
            "probabilities": list(probabilities),
        }
    )


@pytest.fixture
def student(tmp_path):
    """A student's folder, and evaluations of it whose true temperature is 2."""
    from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification
    from tests.tiny import tiny_config

    config = LRKDConfig(encoder_config=tiny_config(), reasoning_dim=8, id2label=ESCI.id2label, label_gains=ESCI.gains)
    folder = save(LRKDForSequenceClassification(config), tmp_path / "student")
    for seed, split in enumerate(("validation", "test")):
        gold, given_, _ = draw(2000, seed=seed, sharpness=2.0)
        evaluation(folder, tmp_path / split, table(gold, given_, split))
    return folder


def evaluation(student, folder, predictions):
    write(predictions, folder / "predictions.parquet", PREDICTIONS)
    facts = {"facts": {"weights_sha256": weights_sha256(student)}}
    (folder / "metrics.json").write_text(json.dumps(facts))


def options(student, **changed):
    folder = student.parent
    paths = {"validation": str(folder / "validation"), "test": str(folder / "test"), "output": str(folder / "out")}
    return CalibrateArguments(**{"model": str(student), **paths, **changed})


def test_calibrating_makes_probabilities_true_and_tiers_keep_their_target(student, tmp_path):
    from transformers import AutoConfig

    before = (student / "model.safetensors").read_bytes()
    (student / "bank_lrkd.py").unlink()  # a student of an older checkout
    record = calibrate(options(student))
    assert (student / "model.safetensors").read_bytes() == before
    assert (student / "bank_lrkd.py").is_file()
    for values in record["splits"].values():
        assert values["after"]["ece"] < values["before"]["ece"] / 2
        assert values["after"]["nll"] < values["before"]["nll"]
        assert sum(tier["products"] for tier in values["tiers"]) == pytest.approx(1)
    for boundary in record["splits"]["test"]["boundaries"]:
        assert boundary["interval"][0] <= boundary["target"]
    config = AutoConfig.from_pretrained(student)
    assert config.tier_thresholds == record["tier_thresholds"] == sorted(record["tier_thresholds"])
    assert (config.temperature, config.class_scales) == (record["temperature"], record["class_scales"])
    assert json.loads((student / "calibration.json").read_text()) == record
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 10_000

    from transformers import pipeline

    (product,) = pipeline("lrkd-relevance", model=str(student), device="cpu")({"query": "a", "products": ["b"]})
    assert product["tier"] == tiers(np.array([product["score"]]), record["tier_thresholds"])[0]


def test_drift_is_seen_with_labels_and_without(student, tmp_path, monkeypatch, capsys):
    calibrate(options(student, method="temperature"))
    gold, given_, _ = draw(2000, seed=5, sharpness=2.0)
    same = table(gold, given_, "s")
    write(same, tmp_path / "same.parquet", PREDICTIONS)
    found = check_drift(DriftArguments(str(student), str(tmp_path / "same.parquet")))
    assert (found["holds"], found["decided_by"]) == (True, "labels")
    same.drop(columns="label").to_parquet(tmp_path / "unlabelled.parquet")
    found = check_drift(DriftArguments(str(student), str(tmp_path / "unlabelled.parquet")))
    assert (found["holds"], found["decided_by"]) == (True, "shares")
    assert "boundaries" not in found

    # Another population: half of the sure products are gone.
    sure = given_[:, 0] > 0.8
    keep = ~sure | (np.arange(len(sure)) % 4 == 0)
    same[keep].drop(columns="label").to_parquet(tmp_path / "other.parquet")
    arguments = ["--model", str(student), "--sample", str(tmp_path / "other.parquet")]
    monkeypatch.setattr("sys.argv", ["drift", *arguments])
    with pytest.raises(SystemExit) as stopped:
        drift.main()
    assert stopped.value.code == 1
    assert "do not hold, by shares" in capsys.readouterr().out

    # The same products, but what scores low has become relevant: only labels can tell.
    turned = same.assign(label=np.where(np.arange(len(same)) % 3 == 0, "Exact", same["label"]))
    write(turned, tmp_path / "turned.parquet", PREDICTIONS)
    found = check_drift(DriftArguments(str(student), str(tmp_path / "turned.parquet")))
    assert not found["holds"]
    assert found["psi"] < 0.01
    assert {boundary["verdict"] for boundary in found["boundaries"]} >= {"missed"}


def test_scores_of_the_served_model_are_taken_as_they_are(student, tmp_path):
    record = calibrate(options(student, method="temperature"))
    _, given_, _ = draw(2000, seed=1, sharpness=2.0)  # the test split
    scores = Scaling(record["temperature"]).apply(given_) @ ESCI.gains
    pd.DataFrame({"score": scores}).to_parquet(tmp_path / "scores.parquet")
    found = check_drift(DriftArguments(str(student), str(tmp_path / "scores.parquet")))
    shares = [tier["products"] for tier in record["splits"]["test"]["tiers"]]
    assert found["tiers"]["now"] == pytest.approx(shares)


def test_bad_input(student, tmp_path):
    with pytest.raises(UserError, match="are the same file"):
        calibrate(options(student, test=str(tmp_path / "validation")))
    with pytest.raises(UserError, match="expected ascending shares"):
        calibrate(options(student, relevant_below=[0.1, 0.05]))
    with pytest.raises(UserError, match=r"metrics.json: no such file. Make it"):
        calibrate(options(student, test=str(tmp_path)))
    with pytest.raises(UserError, match=r"boundary 1: that at most 0.01%"):
        calibrate(options(student, relevant_below=[0.0001]))
    gold, given_, _ = draw(2000, seed=3, sharpness=2.0)
    without = np.where(gold == 2, 3, gold)
    evaluation(student, tmp_path / "absent", table(without, given_, "a"))
    with pytest.raises(UserError, match="no pair of class Complement"):
        calibrate(options(student, validation=str(tmp_path / "absent"), method="vector"))
    evaluation(student, tmp_path / "constant", table(gold, np.full((2000, 4), 0.25), "c"))
    with pytest.raises(UserError, match="the same for every row"):
        calibrate(options(student, validation=str(tmp_path / "constant")))
    assert not (student / "calibration.json").exists()  # nothing of these was written
    with pytest.raises(UserError, match="Calibrate the student first"):
        check_drift(DriftArguments(str(student), str(tmp_path / "test" / "predictions.parquet")))
    record = calibrate(options(student, validation=str(tmp_path / "absent")))
    assert (record["method"], record["absent_classes"]) == ("temperature", ["Complement"])
    pd.DataFrame({"pair_id": ["a"] * 60}).to_parquet(tmp_path / "nothing.parquet")
    with pytest.raises(UserError, match="neither column 'score' nor 'probabilities'"):
        check_drift(DriftArguments(str(student), str(tmp_path / "nothing.parquet")))
    pd.DataFrame({"score": [0.5] * 9}).to_parquet(tmp_path / "few.parquet")
    with pytest.raises(UserError, match="9 rows say nothing"):
        check_drift(DriftArguments(str(student), str(tmp_path / "few.parquet")))
    (tmp_path / "test" / "metrics.json").write_text('{"facts": {"weights_sha256": "0"}}')
    with pytest.raises(UserError, match="an evaluation of other weights"):
        calibrate(options(student))
