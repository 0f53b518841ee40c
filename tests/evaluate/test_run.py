import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from modeling_lrkd import LRKDConfig
from recipes.arguments import UserError, parse
from recipes.evaluate.predict import load, predict, schema_order
from recipes.evaluate.run import RunArguments, main
from recipes.schemas import PAIRS, PREDICTIONS, read, write

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs" / "evaluate"


@pytest.fixture
def evaluate(monkeypatch):
    """Run the verb as the command line does."""

    def call(**options):
        options = {"max_length": 64, **options}  # the tiny model's positions
        argv = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["run", *argv])
        main()

    return call


@pytest.fixture(scope="session")
def model(checkpoint, schema):
    return load(str(checkpoint), schema)


def one_by_one(model, tokenizer, frame, max_length=128):
    """Each pair alone, without padding: what batching must agree with."""
    rows = []
    for query, title in zip(frame["query"], frame["product_title"], strict=True):
        inputs = tokenizer(query, title, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            rows.append(model(**inputs).logits.float().softmax(dim=1)[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_predictions_come_in_input_order_whatever_the_batches(model, pairs, batch_size):
    probabilities = predict(*model, pairs, batch_size=batch_size, max_length=48, progress=False)
    np.testing.assert_allclose(probabilities, one_by_one(*model, pairs, max_length=48), atol=1e-6)
    assert probabilities.dtype == np.float32
    # The rows do differ, or the order would prove nothing.
    assert len(np.unique(probabilities.round(4), axis=0)) == len(pairs)


def test_rows_predict_the_same_in_another_order(model, pairs):
    order = [3, 0, 6, 2, 5, 1, 4]
    probabilities = predict(*model, pairs, batch_size=2, progress=False)
    shuffled = predict(*model, pairs.iloc[order], batch_size=2, progress=False)
    np.testing.assert_allclose(shuffled, probabilities[order], atol=1e-6)


def test_prediction_leaves_the_mode_of_the_model_alone(model, pairs):
    for training in (True, False):
        model[0].train(training)
        first, second = (predict(*model, pairs, progress=False) for _ in range(2))
        np.testing.assert_array_equal(first, second)  # no dropout
        assert model[0].training is training


def test_bfloat16_gives_probabilities_near_those_of_float32(checkpoint, model, pairs, schema):
    rounded = predict(*load(str(checkpoint), schema, dtype="bfloat16"), pairs, progress=False)
    np.testing.assert_allclose(rounded.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(rounded, predict(*model, pairs, progress=False), atol=0.05)


def test_the_verb_writes_predictions_metrics_and_a_picture(evaluate, checkpoint, pairs, pairs_folder, tmp_path, capsys):
    evaluate(model=checkpoint, pairs=pairs_folder, output=tmp_path / "out")
    predictions = read(tmp_path / "out" / "predictions.parquet", PREDICTIONS)
    assert predictions["pair_id"].tolist() == pairs["pair_id"].tolist()
    assert predictions["label"].tolist()[:4] == ["Exact", "Exact", "Exact", "Irrelevant"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    right = predictions["label"] == predictions["predicted_label"]
    assert metrics["overall"]["accuracy"] == right.mean()
    assert set(metrics["locales"]) == {"us", "es"}
    facts = metrics["facts"]
    assert (facts["rows"], facts["queries"], facts["split"], facts["revision"]) == (7, 5, "test", None)
    assert len(facts["pairs_sha256"]) == 64
    assert facts["seed"] is None
    assert (tmp_path / "out" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "Next: python -m recipes.evaluate.compare" in shown
    assert max(map(len, shown.split("\nWrote")[0].splitlines())) <= 80


def test_the_seed_is_taken_from_the_training_record(
    evaluate, checkpoint, pairs_folder, tmp_path, build_checkpoint, schema
):
    trained = build_checkpoint(schema.names)
    (trained / "training.json").write_text('{"arguments": {"seed": 13}}')
    evaluate(model=trained, pairs=pairs_folder, output=tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["facts"]["seed"] == 13


def test_labels_in_another_order_and_spelling_are_matched_by_name(
    evaluate, build_checkpoint, checkpoint, pairs_folder, tmp_path, schema
):
    # The same weights, the classes named in another order: what the first calls Exact, the second calls Irrelevant.
    order = ["I", "exact", "S", "complement"]
    reordered = build_checkpoint(order)
    evaluate(model=checkpoint, pairs=pairs_folder, output=tmp_path / "a")
    evaluate(model=reordered, pairs=pairs_folder, output=tmp_path / "b")
    a, b = (np.stack(read(tmp_path / run / "predictions.parquet", PREDICTIONS)["probabilities"]) for run in "ab")
    logit_of_schema = schema_order(dict(enumerate(order)), schema, "b")
    assert logit_of_schema == [1, 2, 3, 0]
    np.testing.assert_array_equal(b, a[:, logit_of_schema])


@pytest.mark.parametrize(
    "labels",
    [["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"], ["Exact", "Substitute"], ["Exact", "E", "Substitute", "Irrelevant"]],
)
def test_a_model_of_other_labels_is_refused(evaluate, build_checkpoint, pairs_folder, tmp_path, labels):
    with pytest.raises(UserError, match=rf"classifies into {labels[0]}, .*'esci' has Exact.*--labels"):
        evaluate(model=build_checkpoint(labels), pairs=pairs_folder, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_logits_that_are_not_numbers_are_refused(evaluate, build_checkpoint, pairs_folder, tmp_path, schema):
    with pytest.raises(UserError, match=r"pair 'p.': the model's logits are NaN"):
        evaluate(model=build_checkpoint(schema.names, poison=True), pairs=pairs_folder, output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_split_that_is_not_there(evaluate, checkpoint, pairs_folder, tmp_path):
    with pytest.raises(UserError, match=r"validation\.parquet: no such file"):
        evaluate(model=checkpoint, pairs=pairs_folder, split="validation", output=tmp_path)


def test_a_split_without_rows_and_a_label_outside_the_schema(evaluate, checkpoint, pairs, tmp_path):
    write(pairs.iloc[:0].astype(str), tmp_path / "test.parquet", PAIRS)
    with pytest.raises(UserError, match=r"test\.parquet: no rows"):
        evaluate(model=checkpoint, pairs=tmp_path, output=tmp_path / "out")
    write(pairs.assign(label="Brand Mismatch"), tmp_path / "test.parquet", PAIRS)
    with pytest.raises(UserError, match=r"row 0.*'Brand Mismatch' is not in the schema 'esci'"):
        evaluate(model=checkpoint, pairs=tmp_path, output=tmp_path / "out")


def test_checkpoints_that_cannot_be_used(evaluate, build_checkpoint, pairs_folder, tmp_path, schema):
    with pytest.raises(UserError, match=r"nowhere: not a loadable.*no such folder here"):
        evaluate(model=tmp_path / "nowhere", pairs=pairs_folder, output=tmp_path)

    truncated = build_checkpoint(schema.names)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{truncated}: not a loadable"):
        evaluate(model=truncated, pairs=pairs_folder, output=tmp_path)

    from safetensors.torch import load_file, save_file

    headless = build_checkpoint(schema.names)
    state = {key: value for key, value in load_file(headless / "model.safetensors").items() if "classifier" not in key}
    save_file(state, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack classifier\.bias, classifier\.weight"):
        evaluate(model=headless, pairs=pairs_folder, output=tmp_path)

    view = tmp_path / "view"
    gains = {"label_gains": schema.gains, "ranking_view": True}
    LRKDConfig(id2label=schema.id2label, **gains).save_pretrained(view)
    with pytest.raises(UserError, match="saved with ranking_view"):
        evaluate(model=view, pairs=pairs_folder, output=tmp_path)


def test_a_device_that_is_not_there(evaluate, checkpoint, pairs_folder, tmp_path):
    with pytest.raises(UserError, match="--device nonsense"):
        evaluate(model=checkpoint, pairs=pairs_folder, output=tmp_path, device="nonsense")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("batch_size", 0, "--batch_size 0: expected at least 1"), ("max_length", 65, "takes at most 64 tokens")],
)
def test_sizes_that_cannot_be(evaluate, checkpoint, pairs_folder, tmp_path, option, value, message):
    with pytest.raises(UserError, match=message):
        evaluate(model=checkpoint, pairs=pairs_folder, output=tmp_path, **{option: value})


def test_an_output_that_cannot_be_written(evaluate, checkpoint, pairs_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"not a folder to write to .*Choose another output"):
        evaluate(model=checkpoint, pairs=pairs_folder, output=tmp_path / "file" / "out")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipes_parse(path):
    arguments = parse(RunArguments, None, ["--config", str(path), "--model", "m", "--output", "o"])
    for key, value in yaml.safe_load(path.read_text()).items():
        assert getattr(arguments, key) == value
