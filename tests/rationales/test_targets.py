"""recipes.rationales.targets: what the residual and the tuned target are, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from recipes.arguments import UserError
from recipes.rationales.embed import EmbedArguments, embed
from recipes.rationales.targets import TargetsArguments, make_targets
from recipes.rationales.topic import query_groups, residual
from recipes.schemas import PAIRS, RATIONALES, read, write
from tests.tiny import save_tiny_embedder

VERDICTS = ("Exact", "Irrelevant")
WORDS = {"Exact": "fits", "Irrelevant": "no match at all"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_tiny_embedder(tmp_path_factory.mktemp("embedder") / "encoder")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, encoder):
    """48 pairs of 24 queries, 40 of them for training, each with two rationales and their embeddings."""
    folder = tmp_path_factory.mktemp("targets")
    number = np.arange(48)
    pairs = pd.DataFrame(
        {
            "pair_id": [f"p{n}" for n in number],
            "query": [f"query {n // 2}" for n in number],
            "product_title": [f"title {n * 7}" for n in number],
            "locale": "us",
            "label": [VERDICTS[n % 2] for n in number],
        }
    )
    write(pairs[:40], folder / "pairs" / "train.parquet", PAIRS)
    rationales = pd.concat(
        [
            pairs.assign(
                perspective=perspective,
                predicted_label=pairs["label"],
                rationale=[f"{row.product_title} {WORDS[row.label]} {perspective[:4]}" for row in pairs.itertuples()],
            )
            for perspective in ("user_intent", "business_rule")
        ],
        ignore_index=True,
    )
    write(rationales, folder / "rationales.parquet", RATIONALES)
    embed(EmbedArguments(str(folder / "rationales.parquet"), str(encoder), str(folder / "embedded.parquet")))
    return folder


def options(workspace, encoder, output, target="residual", **others):
    return TargetsArguments(
        **{
            "rationales": str(workspace / "embedded.parquet"),
            "pairs": str(workspace / "pairs"),
            "target": target,
            "encoder": str(encoder),
            "output": str(output),
            "steps": 3,
            "batch_size": 8,
            **others,
        }
    )


def vectors_of(path):
    return np.stack(read(path, RATIONALES)["cot_embedding"])


# The residual


def test_what_the_topic_explains_is_gone_and_what_it_does_not_stays():
    generator = np.random.default_rng(0)
    topics, noise = generator.standard_normal((400, 6)), 0.1 * generator.standard_normal((400, 5))
    explained = topics @ generator.standard_normal((6, 5)) + 3.0
    rest, found = residual(topics, explained + noise, np.arange(400) // 4, np.ones(400, dtype=bool))
    assert rest.dtype == np.float32
    assert np.abs(np.corrcoef(np.c_[topics, rest].T)[:6, 6:]).max() < 0.01  # uncorrelated with every topic number
    np.testing.assert_allclose(rest.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(rest, noise, atol=0.1)
    assert np.square(rest - noise).mean() < 0.05 * np.square(noise).mean()
    assert found["explained"] > 0.99
    assert found["alpha"] == 0.1


def test_ridge_by_hand():
    """One feature, centred, of squares 2: W = Σ t e / (Σ t² + α) = 4 / (2 + α), whatever α was chosen."""
    topics = np.tile([[-1.0], [1.0]], (5, 1))
    rest, found = residual(topics, 2 * topics + 7, np.arange(10) // 2, np.ones(10, dtype=bool))
    slope = 20 / (10 + found["alpha"])
    np.testing.assert_allclose(rest, 2 * topics - slope * topics, rtol=1e-5)


def test_only_the_fitted_rows_are_fitted_on():
    generator = np.random.default_rng(1)
    topics, embeddings = generator.standard_normal((60, 3)), generator.standard_normal((60, 4))
    fitted, groups = np.arange(60) < 40, np.arange(60) // 2
    one, _ = residual(topics, embeddings, groups, fitted)
    spoiled = np.where(fitted[:, None], embeddings, 1e6)
    other, _ = residual(topics, spoiled, groups, fitted)
    np.testing.assert_array_equal(one[fitted], other[fitted])


def test_a_residual_file(workspace, encoder, tmp_path, capsys):
    make_targets(options(workspace, encoder, tmp_path / "residual.parquet"))
    before, after = (read(path, RATIONALES) for path in (workspace / "embedded.parquet", tmp_path / "residual.parquet"))
    same = [name for name in before if name not in ("cot_embedding", "encoder")]
    pd.testing.assert_frame_equal(after[same], before[same])
    assert after["target_fitted"].tolist() == ([True] * 40 + [False] * 8) * 2  # training pairs alone
    assert set(after["encoder"]) == {"encoder (residual)"}
    assert str(pq.read_schema(tmp_path / "residual.parquet").field("cot_embedding").type).endswith("[16]")
    np.testing.assert_allclose(np.linalg.norm(vectors_of(tmp_path / "residual.parquet"), axis=1), 1, atol=1e-5)
    assert not (tmp_path / "residual.parquet.work").exists()
    report = json.loads((tmp_path / "residual.parquet.report.json").read_text())
    assert (report["rationales"], report["fitted"]) == (96, 80)
    make_targets(options(workspace, encoder, tmp_path / "residual.parquet"))
    assert "already holds this target" in capsys.readouterr().out
    # As long as they are, and in the same direction.
    make_targets(options(workspace, encoder, tmp_path / "long.parquet", normalise=False))
    long = vectors_of(tmp_path / "long.parquet")
    unit = long / np.linalg.norm(long, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, vectors_of(tmp_path / "residual.parquet"), atol=1e-5)
    assert np.linalg.norm(long, axis=1).max() < 0.9


def test_a_share_of_the_queries_is_fitted_on(workspace, encoder, tmp_path):
    make_targets(options(workspace, encoder, tmp_path / "half.parquet", fit_share=0.5))
    rows = read(tmp_path / "half.parquet", RATIONALES)
    assert rows["target_fitted"].sum() == 40
    assert rows.groupby(query_groups(rows))["target_fitted"].nunique().max() == 1  # whole queries


# The tuned embedder


def test_rationales_of_one_verdict_come_together(workspace, encoder, tmp_path, capsys):
    tuned = tmp_path / "tuned.parquet"
    make_targets(options(workspace, encoder, tuned, "tuned", steps=40, learning_rate=3e-3))
    rows = read(tuned, RATIONALES)
    assert set(rows["encoder"]) == {"tuned_embedder"}
    assert rows["encoder_revision"].str.fullmatch("sha256:[0-9a-f]{64}").all()

    def separation(path):
        vectors = vectors_of(path)
        cosines = vectors @ vectors.T / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
        same = np.equal.outer(*[rows["predicted_label"].to_numpy()] * 2)
        return cosines[same].mean() - cosines[~same].mean()

    assert separation(tuned) > separation(workspace / "embedded.parquet") + 0.2
    record = json.loads((tmp_path / "tuned_embedder" / "training.json").read_text())
    assert record["rationales_by_verdict"] == {"Exact": 40, "Irrelevant": 40}  # of the training pairs
    assert not (tmp_path / "tuned_embedder" / "checkpoints").exists()
    # The saved embedder gives what the file holds; it is not tuned again where the file alone is gone.
    embed(EmbedArguments(str(workspace / "rationales.parquet"), str(tmp_path / "tuned_embedder"), str(tmp_path / "e")))
    again = vectors_of(tmp_path / "e")
    np.testing.assert_allclose(again / np.linalg.norm(again, axis=1, keepdims=True), vectors_of(tuned), atol=1e-5)
    tuned.unlink()
    make_targets(options(workspace, encoder, tuned, "tuned", steps=40, learning_rate=3e-3))
    assert "already holds this tuned embedder" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds a tuned embedder with .*steps"):
        make_targets(options(workspace, encoder, tuned, "tuned", steps=41, learning_rate=3e-3))


def test_killed_while_tuning_it_goes_on(workspace, encoder, tmp_path):
    arguments = options(workspace, encoder, tmp_path / "tuned.parquet", "tuned", steps=55)
    flags = [f"--{name}={getattr(arguments, name)}" for name in ("rationales", "pairs", "target", "encoder", "output")]
    command = [sys.executable, "-m", "recipes.rationales.targets", *flags, "--steps=55", "--batch_size=8"]
    process = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "tuned_embedder" / "checkpoints" / "checkpoint-50" / "trainer_state.json"
    while not checkpoint.is_file():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "tuned.parquet").exists()
    make_targets(arguments)
    log = json.loads((tmp_path / "tuned_embedder" / "training.json").read_text())["log"]
    assert [line["step"] for line in log if "train_runtime" in line] == [55]
    make_targets(options(workspace, encoder, tmp_path / "whole.parquet", "tuned", steps=55))
    np.testing.assert_allclose(
        vectors_of(tmp_path / "tuned.parquet"), vectors_of(tmp_path / "whole.parquet"), atol=1e-4
    )


# Bad input


def changed(workspace, tmp_path, change):
    rows = read(workspace / "embedded.parquet", RATIONALES)
    return str(write(change(rows), tmp_path / "changed.parquet", RATIONALES))


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        ("residual", lambda rows: rows.drop(columns="cot_embedding"), "no column 'cot_embedding'; run"),
        ("residual", lambda rows: rows.assign(encoder="BAAI/bge-m3"), r"embedded by BAAI/bge-m3 .* name that encoder"),
        ("residual", lambda rows: rows.drop(columns="encoder"), "no columns 'encoder', 'encoder_revision'"),
        (
            "residual",
            lambda rows: rows.assign(pair_id="x", rationale=rows.index.map(str)),
            "none of its pair_ids is in",
        ),
        ("residual", lambda rows: rows[rows["query"].isin(["query 1", "query 2"])], "2 queries to fit on; 5 or more"),
        ("tuned", lambda rows: rows.assign(predicted_label="Exact"), "two verdicts .* found Exact 80"),
        ("tuned", lambda rows: rows.assign(predicted_label=None), "two verdicts .* found none"),
    ],
)
def test_rationales_that_cannot_be_used(workspace, encoder, tmp_path, target, change, message):
    rationales = changed(workspace, tmp_path, change)
    with pytest.raises(UserError, match=message):
        make_targets(options(workspace, encoder, tmp_path / "out.parquet", target, rationales=rationales))
    assert not (tmp_path / "out.parquet").exists()
    assert not Path(tmp_path, "out_embedder").exists()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"fit_share": 0.0}, "fit_share: expected a share"),
        ({"steps": 0}, "steps: expected more than 0"),
        ({"batch_size": 7}, "batch_size: expected an even number"),
    ],
)
def test_numbers_that_cannot_be(workspace, encoder, tmp_path, others, message):
    with pytest.raises(UserError, match=message):
        make_targets(options(workspace, encoder, tmp_path / "out.parquet", "tuned", **others))
