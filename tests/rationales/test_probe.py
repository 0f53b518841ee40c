"""recipes.rationales.probe: what a probe finds where it is known what there is to find."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score

from recipes.arguments import UserError
from recipes.rationales.probe import ProbeArguments, probe
from recipes.rationales.probing import check_folds, probe_predictions, score
from recipes.schemas import RATIONALES, write
from tests.tiny import save_tiny_embedder

LABELS = ("Exact", "Substitute", "Irrelevant")


def random_labels(rows=240, seed=0):
    return np.random.default_rng(seed).choice(LABELS, p=[0.6, 0.3, 0.1], size=rows)


def test_it_reads_what_is_there_and_nothing_where_there_is_nothing():
    labels, groups = random_labels(), np.arange(240) // 4
    generator = np.random.default_rng(1)
    means = dict(zip(LABELS, generator.standard_normal((3, 8))))
    told = np.stack([means[label] for label in labels]) + 0.3 * generator.standard_normal((240, 8))
    assert accuracy_score(labels, probe_predictions(told, labels, groups, 5, 0.01, False)) > 0.95
    noise = generator.standard_normal((240, 8))
    assert abs(accuracy_score(labels, probe_predictions(noise, labels, groups, 5, 0.01, False)) - 0.6) < 0.06
    # Weighed alike, the frequent class is no refuge.
    balanced = probe_predictions(noise, labels, groups, 5, 0.01, True)
    assert set(balanced) == set(LABELS)
    assert accuracy_score(labels, balanced) < 0.5


def test_a_query_is_never_on_both_sides():
    """Features that name the query alone: seen queries would be read without a mistake, unseen ones cannot be."""
    groups = np.arange(200) // 10
    labels = np.array(["a", "b"] * 10)[groups]
    features = np.eye(20)[groups]
    assert accuracy_score(labels, probe_predictions(features, labels, groups, 5, 1.0, False)) < 0.7


def test_scores_are_scikit_learns_and_differences_are_paired():
    labels, groups = random_labels(), np.arange(240) // 4
    generator = np.random.default_rng(2)
    good = np.where(generator.random(240) < 0.8, labels, "Exact")
    scores = score(labels, groups, {"majority": np.full(240, "Exact"), "good": good, "same": good.copy()}, draws=300)
    assert scores["good"]["accuracy"]["value"] == pytest.approx(accuracy_score(labels, good))
    assert scores["good"]["macro_f1"]["value"] == pytest.approx(f1_score(labels, good, average="macro"))
    for metric in ("accuracy", "macro_f1"):
        low, high = scores["good"][metric]["interval"]
        assert low < scores["good"][metric]["value"] < high
        assert scores["good"][metric]["difference_interval"][0] > 0  # clearly more than the majority class
        assert scores["same"][metric] == scores["good"][metric]
        assert scores["majority"][metric]["difference"] == 0


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        (["a"] * 10, range(10), "every row is 'a'; a probe needs two classes"),
        (["a", "b"] * 2, range(4), "4 queries cannot be cut into 5 folds"),
        (["a"] * 9 + ["b"] * 9, [*range(9), *[9] * 9], "leave one class, 'a', to learn from"),
    ],
)
def test_what_cannot_be_cross_validated(labels, groups, message):
    with pytest.raises(UserError, match=f"mine: .*{message}"):
        check_folds(np.array(labels), np.array(groups), 5, "mine")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(save_tiny_embedder(tmp_path_factory.mktemp("embedder") / "encoder"))


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """60 pairs of 30 queries, two rationales each, whose mean tells the verdict; the verdict is right on two thirds."""
    folder = tmp_path_factory.mktemp("probe")
    number = np.arange(60)
    verdicts = np.array([LABELS[n % 3] for n in number])
    labels = np.where(number % 9 < 6, verdicts, np.roll(verdicts, 1))
    means = dict(zip(LABELS, np.eye(3, 4)))
    generator = np.random.default_rng(0)
    rows = []
    for perspective, shift in (("user_intent", 1), ("business_rule", -1)):
        noise = 0.05 * generator.standard_normal((60, 4))
        vectors = np.stack([means[verdict] for verdict in verdicts]) + noise + shift  # the shift averages out
        rows.append(
            pd.DataFrame(
                {
                    "pair_id": [f"p{n}" for n in number],
                    "query": [f"Query {n // 2}" for n in number],
                    "product_title": [f"title {n}" for n in number],
                    "locale": "us",
                    "label": labels,
                    "perspective": perspective,
                    "rationale": "because",
                    "predicted_label": verdicts,
                    "cot_embedding": list(vectors.astype("float32")),
                    "target_fitted": number // 2 < 15,
                }
            )
        )
    rows = pd.concat(rows, ignore_index=True)
    write(rows, folder / "fitted.parquet", RATIONALES)
    write(rows.drop(columns="target_fitted"), folder / "plain.parquet", RATIONALES)
    consistent = rows[rows["label"] == rows["predicted_label"]].drop(columns="target_fitted")
    write(consistent, folder / "consistent.parquet", RATIONALES)
    return folder


def test_one_table_of_several_files(targets, encoder, tmp_path):
    files = [f"{name}={targets / name}.parquet" for name in ("plain", "fitted", "consistent")]
    arguments = ProbeArguments(files, encoder, str(tmp_path / "probe"), draws=200, strength=1.0)
    content = probe(arguments)
    assert content == json.loads((tmp_path / "probe" / "probe.json").read_text())
    results = content["targets"]
    assert list(results) == ["plain", "fitted", "consistent", "fitted (unseen)"]
    assert [result["pairs"] for result in results.values()] == [60, 60, 42, 30]
    assert results["plain"]["verdict"]["target"]["accuracy"]["value"] == 1.0
    gold = results["plain"]["gold"]
    assert 0.5 < gold["target"]["accuracy"]["value"] < 0.8  # it carries the verdict, not the label
    assert gold["target"]["accuracy"]["difference"] == pytest.approx(
        gold["target"]["accuracy"]["value"] - gold["query and title"]["accuracy"]["value"]
    )
    assert results["plain"]["gold"] == results["fitted"]["gold"]
    assert results["plain"]["variance_between"]["verdict"] > 0.95 > results["plain"]["variance_between"]["gold"]
    assert "verdict" not in results["consistent"]  # where it is the gold label
    table = (tmp_path / "probe" / "table.md").read_text()
    assert table.count("| plain | 60 |") == 2
    assert table.count("| consistent | 42 |") == 1
    assert (tmp_path / "probe" / "probe.png").stat().st_size > 10_000
    assert not (tmp_path / "probe" / "work").exists()
    common = probe(ProbeArguments(files, encoder, str(tmp_path / "common"), draws=10, common=True))["targets"]
    assert [common[name]["pairs"] for name in ("plain", "fitted", "consistent")] == [42] * 3


def test_what_was_predicted_before_a_kill_is_not_predicted_again(targets, encoder, tmp_path, monkeypatch):
    files = [f"plain={targets}/plain.parquet", f"consistent={targets}/consistent.parquet"]
    arguments = ProbeArguments(files, encoder, str(tmp_path / "probe"), draws=10)
    left = []

    def fails_in_the_end(*given):
        left.append(probe_predictions(*given))
        if len(left) == 10:
            raise KeyboardInterrupt
        return left[-1]

    monkeypatch.setattr("recipes.rationales.probing.probe_predictions", fails_in_the_end)
    with pytest.raises(KeyboardInterrupt):
        probe(arguments)
    again = []
    monkeypatch.setattr(
        "recipes.rationales.probing.probe_predictions", lambda *given: again.append(1) or probe_predictions(*given)
    )
    content = probe(arguments)
    assert len(again) == 3  # of 12
    assert content["targets"] == probe(ProbeArguments(files, encoder, str(tmp_path / "b"), draws=10))["targets"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["plain.parquet"], "expected NAME=PATH, got 'plain.parquet'"),
        (["a={0}/plain.parquet", "a={0}/fitted.parquet"], "a is given twice"),
        (["a={0}/nothing.parquet"], "no such file"),
        (["a={0}/bare.parquet"], "no column 'cot_embedding'; run recipes.rationales.embed"),
        (["a={0}/one_class.parquet"], "a, gold: every row is 'Exact'"),
        (["a={0}/few.parquet"], "a, gold: 4 queries cannot be cut into 5 folds"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(targets, encoder, tmp_path, given, message):
    rows = pd.read_parquet(targets / "consistent.parquet")
    write(rows.drop(columns="cot_embedding"), tmp_path / "bare.parquet", RATIONALES)
    write(rows[rows["label"] == "Exact"], tmp_path / "one_class.parquet", RATIONALES)
    write(rows[rows["query"].isin(rows["query"].unique()[:4])], tmp_path / "few.parquet", RATIONALES)
    for name in ("plain", "fitted"):
        (tmp_path / f"{name}.parquet").symlink_to(targets / f"{name}.parquet")
    with pytest.raises(UserError, match=message):
        probe(ProbeArguments([one.format(tmp_path) for one in given], encoder, str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
