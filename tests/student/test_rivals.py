"""Rivals through the command that trains every student: what is deployed, resumed and reported."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from recipes.arguments import UserError
from recipes.schemas import RATIONALES, read, write
from recipes.student.distill import DistillArguments, distill
from recipes.student.trainer import LRKDTrainer

RIVALS = ("ced_kd", "mkd", "crsd")
PARTS = {
    "ced_kd": {"reconstruction_loss"},
    "mkd": {"tagging_loss", "score_loss"},
    "crsd": {"reasoning_loss", "contrastive_loss", "agreement_loss"},
}


@pytest.fixture
def rival_options(options):
    """The pairs' titles are cited; a third of the pairs have no rationale."""
    return {**options, "extractor_type": "none", "max_length": 64, "rival_length": 48, "rival_score_weight": 0.1}


def train(options, **changes):
    return distill(DistillArguments(**{**options, **changes}))


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("rival", RIVALS)
def test_what_is_deployed_is_a_plain_checkpoint(rival_options, workspace, rival):
    record = train(rival_options, rival=rival, epochs=1)
    train(rival_options, output=str(workspace / "plain"), epochs=1)
    folder = Path(rival_options["output"])
    deployed, plain = weights(folder), weights(workspace / "plain")
    assert {name: tensor.shape for name, tensor in deployed.items()} == {n: t.shape for n, t in plain.items()}
    assert not all(torch.equal(deployed[name], plain[name]) for name in plain), "the rationales taught nothing"
    config = json.loads((folder / "config.json").read_text())
    assert config == json.loads((workspace / "plain" / "config.json").read_text())
    assert {path.name for path in folder.iterdir()} == {path.name for path in (workspace / "plain").iterdir()}
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model).__name__ == "LRKDForSequenceClassification"
    assert record["parameters"] == model.num_parameters()
    logged = {name for line in record["log"] for name in line}
    assert PARTS[rival] <= logged
    assert record["rival"]["rows_with_tags" if rival == "mkd" else "rows_with_rationale"] == 42


@pytest.mark.parametrize("rival", RIVALS)
def test_a_rival_whose_products_can_be_stored(rival_options, rival):
    record = train(rival_options, rival=rival, epochs=1, separate_layers=1)
    assert PARTS[rival] <= {name for line in record["log"] for name in line}
    assert AutoModelForSequenceClassification.from_pretrained(rival_options["output"]).config.separate_layers == 1


class Killed(Exception):
    pass


@pytest.mark.parametrize("rival", ["ced_kd", "mkd"])  # those with training-only parts
def test_interrupted_and_started_again_it_ends_as_if_never_interrupted(rival_options, workspace, rival, monkeypatch):
    train(rival_options, rival=rival, output=str(workspace / "whole"))
    step = LRKDTrainer.training_step

    def until_the_second_epoch(self, *args, **kwargs):
        if self.state.global_step == 10:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LRKDTrainer, "training_step", until_the_second_epoch)
        with pytest.raises(Killed):
            train(rival_options, rival=rival)
    (checkpoint,) = Path(rival_options["output"], "checkpoints").glob("checkpoint-*")
    parts = {"ced_kd": "decoder.", "mkd": "crf."}[rival]
    assert any(name.startswith(parts) for name in weights(checkpoint))
    assert train(rival_options, rival=rival)["steps"] == 16
    resumed, whole = weights(rival_options["output"]), weights(workspace / "whole")
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("rival", ["ced_kd", "mkd"])  # CRSD's negatives are those of a batch
def test_accumulated_batches_equal_one_large_batch(rival_options, workspace, rival):
    train(rival_options, rival=rival, epochs=1, batch_size=16)
    small = {"batch_size": 4, "gradient_accumulation_steps": 4, "output": str(workspace / "accumulated")}
    train(rival_options, rival=rival, epochs=1, **small)
    one, other = weights(rival_options["output"]), weights(workspace / "accumulated")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=2e-5, rtol=1e-3, msg=name)


def test_a_rationale_longer_than_the_decoder_is_cut_and_counted(rival_options):
    frame = read(rival_options["rationales"], RATIONALES)
    frame.loc[:20, "rationale"] = "because " * 100
    write(frame, rival_options["rationales"], RATIONALES)
    for rival in ("ced_kd", "crsd"):
        record = train(rival_options, rival=rival, epochs=1, overwrite=True)
        assert record["rival"]["share_cut"] == pytest.approx(21 / 42)


def test_rationales_that_cite_nothing_leave_plain_training(rival_options, workspace):
    frame = read(rival_options["rationales"], RATIONALES)
    write(
        frame.assign(rationale=[f"…{n} ?!" if n > 99 else "???" for n in range(42)]),
        workspace / "r.parquet",
        RATIONALES,
    )
    record = train(
        rival_options, rival="mkd", rival_score_weight=0.0, epochs=1, rationales=str(workspace / "r.parquet")
    )
    assert record["rival"]["share_of_rationales_with_a_span"] == 0
    assert record["rival"]["rows_with_tags"] == 0
    assert all(line["tagging_loss"] == 0 for line in record["log"] if "tagging_loss" in line)
    train(rival_options, output=str(workspace / "plain"), epochs=1)
    plain = weights(workspace / "plain")
    for name, tensor in weights(rival_options["output"]).items():
        torch.testing.assert_close(tensor, plain[name], atol=1e-6, rtol=1e-5, msg=name)


def test_verdicts_without_a_label_are_no_votes(rival_options):
    frame = read(rival_options["rationales"], RATIONALES).assign(predicted_label=pd.Series([None] * 42, dtype=object))
    write(frame, rival_options["rationales"], RATIONALES)
    record = train(rival_options, rival="mkd", epochs=1)
    assert all(line["score_loss"] == 0 for line in record["log"] if "score_loss" in line)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extractor_type": "gat"}, "rival 'mkd' is a plain encoder .* needs `--extractor_type none` .it is 'gat'"),
        ({"rationales": None}, "needs .* `rationales` .None"),
        ({"rival_weight": -1.0}, "rival_weight: expected 0 or more"),
        ({"rival_length": 0}, "rival_length: expected more than 0"),
        ({"rival": "ced_kd", "rival_length": 1}, "rival_length: expected at least 2"),
        ({"rival_temperature": 0.0}, "rival_temperature: expected more than 0"),
        ({"perspectives": ["user_intent"]}, "perspectives: user_intent; expected some of unified"),
        (
            {"rival": "crsd", "rival_length": 120},
            "rival_length 120: with max_length 64 .* longer than the 160 positions",
        ),
        ({"rival": "lref"}, "rival"),
    ],
)
def test_bad_options(rival_options, changes, message):
    from recipes.arguments import build

    with pytest.raises(UserError, match=message):
        distill(build(DistillArguments, {**rival_options, "rival": "mkd", **changes}, "options"))
