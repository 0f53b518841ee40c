import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, pipeline

from modeling_lrkd import LRKDForSequenceClassification
from recipes.arguments import UserError
from recipes.schemas import PAIRS, RATIONALES, load_labels, read, write
from recipes.student.dataset import PairCollator, PairDataset, mean_embeddings
from recipes.student.distill import DistillArguments, _build_trainer, distill
from recipes.student.guidance import Guidance

ROOT = Path(__file__).parents[2]


def student(options, **changes):
    return distill(DistillArguments(**{**options, **changes}))


def command(options, *launcher):
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [*(launcher or (sys.executable,)), "-m", "recipes.student.distill", *flags]


def environment(**extra):
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("extractor_type", ["mlp", "poly", "gat", "cls", "none"])
def test_every_student_trains_and_loads(options, extractor_type):
    record = student(options, extractor_type=extractor_type, epochs=1)
    folder = Path(options["output"])
    assert record == json.loads((folder / "training.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == load_labels("esci").id2label
    assert model.config.label_gains == [1.0, 0.1, 0.01, 0.0]
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=False).model_max_length == 128
    assert not (folder / "checkpoints").exists()
    assert list((folder / "tensorboard").rglob("events.*"))
    logged = {name for line in record["log"] for name in line}
    assert "classification_loss" in logged
    assert ("guidance_loss" in logged) == (extractor_type != "none")
    assert record["guided_rows"] == (0 if extractor_type == "none" else 42)
    assert not any(str(folder.parent) in line for line in (folder / "config.json").read_text().splitlines())


def test_it_learns(options):
    record = student(options, epochs=30, learning_rate=3e-3)
    assert record["validation"]["accuracy"] >= 0.9
    guidance = [line["guidance_loss"] for line in record["log"] if "guidance_loss" in line]
    assert guidance[-1] < guidance[0] / 2


def test_without_guidance_no_rationale_is_read(options):
    record = student({**options, "rationales": None}, guidance_weight=0.0, epochs=1)
    assert record["guided_rows"] == 0


def test_the_perspectives_travel_with_the_student(options):
    frame = read(options["rationales"], RATIONALES)
    guided = np.stack(frame["cot_embedding"])
    elsewhere = frame.head(3).assign(pair_id=["x", "y", "z"], cot_embedding=[np.full(6, 99, "float32")] * 3)
    views = {"user_intent": guided, "business_rule": 2 * guided + 1}
    rows = [frame.assign(cot_embedding=list(v.astype("float32")), perspective=name) for name, v in views.items()]
    write(pd.concat([*rows, elsewhere.assign(perspective="user_intent")]), options["rationales"], RATIONALES)
    student(options, epochs=1)
    saved = load_file(Path(options["output"], "perspectives.safetensors"))
    assert saved.keys() == views.keys()
    for name, vectors in views.items():
        np.testing.assert_allclose(saved[name].numpy(), vectors.mean(axis=0), rtol=1e-5)  # rows of `elsewhere` left out
    rank = pipeline("lrkd-relevance", model=options["output"])
    assert rank({"query": "red shoe", "products": ["blue shoe"]})[0]["perspectives"].keys() == views.keys()


def test_one_perspective_alone_is_not_written(options):
    student(options, epochs=1)
    assert not Path(options["output"], "perspectives.safetensors").exists()


def with_perspectives(options):
    """Rewrite the rationales as two perspectives of one file, the second with other vectors; return both."""
    frame = read(options["rationales"], RATIONALES)
    vectors = np.stack(frame["cot_embedding"])
    views = {"user_intent": vectors, "business_rule": 1 - 2 * vectors}
    rows = [frame.assign(cot_embedding=list(v), perspective=name) for name, v in views.items()]
    write(pd.concat(rows, ignore_index=True), options["rationales"], RATIONALES)
    return dict(zip(views, rows))


def test_a_perspective_of_a_file_guides_as_if_it_were_alone_in_it(options, workspace):
    alone = with_perspectives(options)["business_rule"]
    student(options, epochs=1, perspectives=["business_rule"])
    write(alone, workspace / "alone.parquet", RATIONALES)
    student(options, epochs=1, rationales=str(workspace / "alone.parquet"), output=str(workspace / "alone"))
    student(options, epochs=1, output=str(workspace / "both"))
    one = weights(options["output"])
    assert_same_weights(one, weights(workspace / "alone"), atol=0, rtol=0)
    assert not torch.equal(one["reasoning_projection.bias"], weights(workspace / "both")["reasoning_projection.bias"])


@pytest.mark.parametrize("wanted", [["unified"], ["user_intent", "unified"]])
def test_a_perspective_that_the_file_lacks(options, wanted):
    with_perspectives(options)
    with pytest.raises(UserError, match="perspectives: unified; expected some of business_rule, user_intent"):
        student(options, perspectives=wanted)


def test_a_student_of_before_an_option_existed_is_taken_as_finished(options):
    first = student(options, epochs=1)
    path = Path(options["output"], "training.json")
    record = json.loads(path.read_text())
    del record["arguments"]["perspectives"], record["arguments"]["weight_decay"]
    path.write_text(json.dumps(record))
    assert student(options, epochs=1)["validation"] == first["validation"]
    with pytest.raises(UserError, match=r"weight_decay = 0\.01, not 0\.5"):
        student(options, epochs=1, weight_decay=0.5)


def test_head_and_encoder_have_their_own_learning_rates(options):
    arguments = DistillArguments(**options)
    schema = load_labels("esci")
    pairs = {name: read(Path(options["pairs"], f"{name}.parquet"), PAIRS) for name in ("train", "validation")}
    embeddings = mean_embeddings(read(options["rationales"], RATIONALES))
    trainer = _build_trainer(arguments, schema, pairs, Guidance(embeddings))
    optimizer = trainer.create_optimizer()
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in trainer.model.named_parameters():
        rate, decay = rates.pop(id(parameter))
        assert rate == (1e-3 if name.startswith("encoder.") else 1e-2), name
        assert decay == (0.0 if name.endswith("bias") or "LayerNorm" in name else 0.01), name
    assert not rates


def test_the_same_seed_gives_the_same_student_and_another_another(options, workspace):
    student(options, epochs=1)
    student(options, epochs=1, output=str(workspace / "again"))
    student(options, epochs=1, output=str(workspace / "other"), seed=1)
    first = weights(options["output"])
    assert_same_weights(first, weights(workspace / "again"), atol=0, rtol=0)
    assert not torch.equal(first["classifier.weight"], weights(workspace / "other")["classifier.weight"])


def test_early_stopping(options):
    record = student(options, epochs=30, learning_rate=1e-9, head_learning_rate=1e-9, early_stopping_patience=2)
    assert record["steps"] == 3 * 8


def test_a_finished_student_is_left_alone_and_other_settings_are_refused(options, capsys):
    first = student(options, epochs=1)
    assert student(options, epochs=1) == first
    assert "already holds this student" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds a student with epochs = 1, not 2.*--overwrite"):
        student(options, epochs=2)
    assert student(options, epochs=2, overwrite=True)["steps"] == 16


def test_overwrite_deletes_students_only(options):
    precious = Path(options["output"], "thesis.tex")
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(UserError, match="holds no student, so --overwrite will not delete it"):
        student(options, overwrite=True)
    assert precious.read_text() == "years of work"


# Interruptions


def start_and_kill(options):
    """Start a run, and kill it once its first checkpoint is complete."""
    process = subprocess.Popen(command(options), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    pattern = "checkpoints/checkpoint-*/trainer_state.json"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not any(Path(options["output"]).glob(pattern)):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"


def test_killed_and_started_again_it_ends_as_if_never_killed(options, workspace, capsys):
    options = {**options, "epochs": 25}
    start_and_kill(options)
    # A checkpoint that the kill cut in half.
    half = Path(options["output"], "checkpoints", "checkpoint-99999")
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"\x10\x00")
    record = student(options)
    output = capsys.readouterr().out
    assert "checkpoint-99999 is incomplete: removed." in output
    assert "Going on from" in output
    whole = student(options, output=str(workspace / "whole"))
    assert record["steps"] == whole["steps"] == 25 * 8
    assert_same_weights(weights(options["output"]), weights(workspace / "whole"), atol=1e-6, rtol=1e-5)


def test_a_full_disk_says_so_and_loses_nothing(options):
    """Files may not grow beyond 16 KiB: what a full disk does, without filling one."""
    options = {**options, "epochs": 25}
    start_and_kill(options)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))

    full = subprocess.run(
        command(options), cwd=ROOT, env=environment(), capture_output=True, text=True, preexec_fn=limit, check=False
    )
    assert full.returncode == 2, full.stderr[-2000:]
    assert f"error: {options['output']}: saving failed" in full.stderr
    assert "Free some space and run the same command again" in full.stderr
    assert "Traceback" not in full.stderr
    again = subprocess.run(command(options), cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    assert "Going on from" in again.stdout


ACCELERATE = ROOT / "recipes" / "configs" / "accelerate"


def launch(options, config, **how):
    """Start `accelerate launch` and, through it, the processes of its file."""
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0")
    return subprocess.Popen(command(options, sys.executable, *launcher), cwd=ROOT, env=environment(), **how)


def check_two_equal_one(options, workspace, kind):
    """Two processes, of batches half as large, ended where one does."""
    record = json.loads((workspace / "two" / "training.json").read_text())
    assert (record["processes"], record["distributed_type"]) == (2, kind)
    one = student(options)
    assert (record["steps"], record["parameters"]) == (one["steps"], one["parameters"])
    assert_same_weights(weights(options["output"]), weights(workspace / "two"), atol=2e-5, rtol=1e-3)
    AutoModelForSequenceClassification.from_pretrained(workspace / "two")
    assert record["validation"]["accuracy"] == one["validation"]["accuracy"]
    assert record["validation"]["nll"] == pytest.approx(one["validation"]["nll"], rel=1e-4)


def test_two_processes_equal_one_with_twice_the_batch(options, workspace):
    two = {**options, "output": str(workspace / "two"), "batch_size": 4}
    config = ACCELERATE / "two_cpu_processes.yaml"
    process = launch(two, config, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    check_two_equal_one(options, workspace, "MULTI_CPU")


def test_a_sharded_run_that_was_killed_ends_as_if_it_had_not_been(options, workspace):
    options = {**options, "epochs": 6}
    two = {**options, "output": str(workspace / "two"), "batch_size": 4}
    config = ACCELERATE / "two_cpu_processes_fsdp.yaml"
    process = launch(two, config, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints, deadline = workspace / "two" / "checkpoints", time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        if any(checkpoints.glob("checkpoint-*/trainer_state.json")):
            break
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    workers = psutil.Process(process.pid).children(recursive=True)  # in sessions of their own: they outlive it
    process.kill()
    for worker in workers:
        worker.kill()
    psutil.wait_procs(workers)
    process.wait()
    assert not (workspace / "two" / "training.json").exists(), "it ended before it could be killed"
    assert list(checkpoints.glob("checkpoint-*/pytorch_model_fsdp.bin")), "it was not sharded"
    process = launch(two, config, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    assert "Going on from" in output
    check_two_equal_one(options, workspace, "FSDP")


def test_gpus_shard_as_the_tested_processes_do():
    cpu, gpu = (
        yaml.safe_load((ACCELERATE / f"{name}_fsdp.yaml").read_text()) for name in ("two_cpu_processes", "four_gpus")
    )
    assert gpu["fsdp_config"] == cpu["fsdp_config"]
    assert gpu["distributed_type"] == cpu["distributed_type"] == "FSDP"


def test_accumulated_batches_equal_one_large_batch(options, workspace):
    student(options, batch_size=16)
    student(options, batch_size=4, gradient_accumulation_steps=4, output=str(workspace / "accumulated"))
    # Guidance and classification are means over the batch, and LengthBucketSampler orders by the optimizer step.
    assert_same_weights(weights(options["output"]), weights(workspace / "accumulated"), atol=2e-5, rtol=1e-3)


def test_a_plain_trainer_trains_it(options, workspace):
    tokenizer = AutoTokenizer.from_pretrained(options["encoder"], trust_remote_code=False)
    schema = load_labels("esci")
    embeddings = mean_embeddings(read(options["rationales"], RATIONALES))
    train = read(Path(options["pairs"], "train.parquet"), PAIRS)
    model = LRKDForSequenceClassification.from_encoder(options["encoder"], num_labels=4, reasoning_dim=6)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(workspace / "plain"), max_steps=4, learning_rate=1e-3, use_cpu=True, report_to=[]
        ),
        data_collator=PairCollator(tokenizer),
        train_dataset=PairDataset(train, tokenizer, schema.label2id, 128, embeddings),
        eval_dataset=PairDataset(train, tokenizer, schema.label2id, 128, embeddings),
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    assert not any(torch.equal(before[name], p) for name, p in model.named_parameters() if "extractor" in name)
    predictions = trainer.predict(trainer.eval_dataset)
    assert predictions.predictions.shape == (64, 4)  # the logits alone, not every output of the model


# Bad input: one clear error, before any training


def replace(path, contract, **columns):
    write(pd.read_parquet(path).assign(**columns), path, contract)


def rewrite_unchecked(path, **columns):
    pd.read_parquet(path).assign(**columns).to_parquet(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rationales": None}, "needs `rationales`.*Without guidance: --guidance_weight 0"),
        ({"reasoning_dim": 8}, r"vectors of 6 numbers, but reasoning_dim is 8"),
        ({"epochs": 0}, "epochs: expected more than 0, got 0"),
        ({"head_learning_rate": -1.0}, "head_learning_rate: expected more than 0"),
        ({"guidance_weight": -0.1}, "guidance_weight: expected 0 or more"),
        ({"classifier_dropout": 1.0}, "classifier_dropout: expected a share below 1"),
        ({"max_length": 2}, "max_length: expected at least 8 tokens"),
        ({"match_marks": True}, "match_marks: are for texts that are read apart; set separate_layers to 1 or more"),
        ({"query_layers": 1}, "query_layers: are for texts that are read apart; set separate_layers to 1 or more"),
        ({"votes": "votes.parquet"}, "vote_weight is 0.0 and votes 'votes.parquet': give both, or neither"),
        ({"pairs": "nowhere"}, "nowhere: no such folder"),
        ({"rationales": "nowhere.parquet"}, "nowhere.parquet: no such file. Expected rationales"),
        ({"labels": "amazon"}, "label schema 'amazon': no such file. Known: aliexpress6, esci"),
        ({"labels": "aliexpress6"}, "train.parquet: row 0, column 'label': label 'Exact' is not in the schema"),
    ],
)
def test_settings_that_cannot_be(options, changes, message):
    with pytest.raises(UserError, match=message):
        student(options, **changes)
    assert not Path(options["output"]).exists()


def test_an_encoder_that_does_not_exist(options):
    with pytest.raises(UserError, match=r"encoder 'no/such-encoder' \(revision None\) cannot be loaded"):
        student(options, encoder="no/such-encoder")


def test_a_setting_that_failed_at_the_start_can_be_corrected_in_place(options):
    with pytest.raises(UserError, match=r"max_length 161: encoder .*/encoder' takes at most 160 tokens"):
        student(options, max_length=161)
    with pytest.raises(UserError, match="encoder 'no/such-encoder'"):
        student(options, encoder="no/such-encoder")
    assert student(options, epochs=1)["steps"] == 8


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_rows(options, split):
    path = Path(options["pairs"], f"{split}.parquet")
    pd.read_parquet(path).iloc[:0].to_parquet(path)
    with pytest.raises(UserError, match=rf"pairs/{split}\.parquet: no rows"):
        student(options)


def test_layers_to_shard_that_the_encoder_does_not_have(options):
    pairs = {name: read(Path(options["pairs"], f"{name}.parquet"), PAIRS) for name in ("train", "validation")}
    trainer = _build_trainer(DistillArguments(**options, guidance_weight=0.0), load_labels("esci"), pairs, Guidance())
    trainer.check_layers(["BertLayer"])
    with pytest.raises(UserError, match=r"the encoder has no XLMRobertaLayer.*BertLayer: correct the file of"):
        trainer.check_layers(["BertLayer", "XLMRobertaLayer"])


def test_embeddings_with_nan(options):
    vectors = [np.full(6, np.nan, dtype="float32") if row == 3 else np.zeros(6, dtype="float32") for row in range(42)]
    rewrite_unchecked(options["rationales"], cot_embedding=vectors)
    with pytest.raises(UserError, match=r"row 3, column 'cot_embedding': has NaN"):
        student(options)


def test_embeddings_of_several_sizes(options):
    rewrite_unchecked(options["rationales"], cot_embedding=[np.zeros(6 + (row == 5), "float32") for row in range(42)])
    with pytest.raises(UserError, match=r"row 5, column 'cot_embedding': has 7 numbers; expected 6"):
        student(options)


def test_rationales_that_are_not_embedded(options):
    pd.read_parquet(options["rationales"]).drop(columns="cot_embedding").to_parquet(options["rationales"])
    with pytest.raises(UserError, match=r"no column 'cot_embedding'; run recipes\.rationales\.embed"):
        student(options)


def test_rationales_of_other_pairs(options):
    replace(options["rationales"], RATIONALES, pair_id=[f"x{row}" for row in range(42)])
    with pytest.raises(UserError, match=r"none of its pair_ids is in .*train\.parquet"):
        student(options)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("query", "   ", "row 2, column 'query': is empty or blank"),
        ("product_title", None, "row 2, column 'product_title': is null"),
        ("pair_id", "train-1", "row 2 repeats pair_id='train-1'"),
        ("label", "Maybe", "label 'Maybe' is not in the schema 'esci'"),
    ],
)
def test_pairs_that_break_their_contract(options, column, value, message):
    path = Path(options["pairs"], "train.parquet")
    frame = pd.read_parquet(path)
    frame.loc[2, column] = value
    frame.to_parquet(path)
    with pytest.raises(UserError, match=message):
        student(options)


def test_letters_for_labels_are_taken(options):
    for split in ("train", "validation"):
        path = Path(options["pairs"], f"{split}.parquet")
        replace(path, PAIRS, label=read(path, PAIRS)["label"].str[0])
    assert student(options, epochs=1)["steps"] == 8


def test_help_and_unknown_keys(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rte: 1e-4\n")
    result = subprocess.run(
        [sys.executable, "-m", "recipes.student.distill", "--config", str(recipe)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "unknown key 'learning_rte'. Did you mean 'learning_rate'?" in result.stderr


def test_perturbed_training_pairs_keep_their_guidance_and_none_changes_nothing(options):
    plain = student(options, epochs=1)
    folder = options["output"]
    same = student({**options, "output": f"{folder}-same"}, epochs=1, augment=0.0)
    assert_same_weights(weights(folder), weights(f"{folder}-same"))
    perturbed = student({**options, "output": f"{folder}-perturbed"}, epochs=1, augment=0.5, augment_kinds=["emoji"])
    assert perturbed["guided_rows"] == plain["guided_rows"] == same["guided_rows"]
    assert perturbed["train_rows"] == plain["train_rows"]
    assert any((one != other).any() for one, other in zip(weights(folder).values(),
                                                          weights(f"{folder}-perturbed").values()))  # fmt: skip
    with pytest.raises(UserError, match="share from 0 to 1"):
        student({**options, "output": f"{folder}-wrong"}, augment=2.0)


def test_rationales_that_are_not_there_are_named_even_where_nothing_reads_them(options):
    with pytest.raises(UserError, match=r"nowhere\.parquet: no such file"):
        student(options, extractor_type="none", rationales="nowhere.parquet")


def test_a_student_whose_products_can_be_stored(options):
    record = student(options, epochs=1, separate_layers=1)
    assert record["arguments"]["separate_layers"] == 1
    model = AutoModelForSequenceClassification.from_pretrained(options["output"])
    assert model.config.separate_layers == 1
    with pytest.raises(UserError, match="holds a student with separate_layers = 1, not 0"):
        student(options, epochs=1)


def test_a_student_from_before_there_were_such_is_one_that_reads_all_together(options):
    student(options, epochs=1)
    path = Path(options["output"], "training.json")
    old = json.loads(path.read_text())
    del old["arguments"]["separate_layers"]
    path.write_text(json.dumps(old))
    assert student(options, epochs=1) == old
    with pytest.raises(UserError, match="holds a student with separate_layers = 0, not 2"):
        student(options, epochs=1, separate_layers=2)
