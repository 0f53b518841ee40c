"""SFT, DPO, pre-training and merging on tiny random models: what moves, what must not, and what is refused."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.arguments import UserError
from recipes.schemas import PAIRS, PREFERENCES, SFT, write
from recipes.student.saving import RECORD
from recipes.teacher import dpo, sft
from recipes.teacher.judged import answer
from recipes.teacher.merge import MergeArguments, merge
from recipes.teacher.pretrain import PretrainArguments, documents, pretrain
from recipes.teacher.tiny import random_model, train_tokenizer
from recipes.teacher.tuning import check_conversations, load_tokenizer, with_adapter

LABELS = ("Exact", "Irrelevant")
PRODUCTS = ("red shoe", "garden hose")


def conversation(number):
    return [{"role": "user", "content": f"red shoe {number} | {PRODUCTS[number % 2]}. Relevant?"}]


def reasoning(number, right=True):
    """A shoe is what was asked for, a hose is not; the wrong rationale says the reverse."""
    kind = number % 2 if right else 1 - number % 2
    return answer(f"It is a {PRODUCTS[number % 2]}, hence {LABELS[kind].lower()}", LABELS[kind])


def sft_rows(count, start=0):
    numbers = range(start, start + count)
    return pd.DataFrame(
        {
            "prompt": [conversation(n) for n in numbers],
            "completion": [reasoning(n) for n in numbers],
            "pair_id": [str(n) for n in numbers],
            "perspective": "user_intent",
        }
    )


def preference_rows(count, start=0):
    numbers = range(start, start + count)
    return pd.DataFrame(
        {
            "prompt": [conversation(n) for n in numbers],
            "chosen": [reasoning(n) for n in numbers],
            "rejected": [reasoning(n, right=False) for n in numbers],
            "pair_id": [str(n) for n in numbers],
            "chosen_perspective": "user_intent",
            "rejected_perspective": "business_rule",
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """SFT data, preferences and a random base of 60,000 parameters."""
    folder = tmp_path_factory.mktemp("teacher")
    rows = sft_rows(32)
    write(rows, folder / "sft.parquet", SFT)
    write(sft_rows(8, start=32), folder / "sft_validation.parquet", SFT)
    write(preference_rows(16), folder / "preferences.parquet", PREFERENCES)
    write(preference_rows(8, start=32), folder / "preferences_validation.parquet", PREFERENCES)
    save_base(folder / "base")
    return folder


def save_base(folder, layers=2, hidden_size=32):
    rows = sft_rows(32)
    texts = (turn["content"] for name in ("prompt", "completion") for turns in rows[name] for turn in turns)
    tokenizer = train_tokenizer(texts, vocab_size=400, max_length=128)
    random_model(tokenizer, hidden_size=hidden_size, layers=layers).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sft_options(folder, output, **changes):
    quick = {"max_length": 96, "batch_size": 8, "learning_rate": 1e-2, "epochs": 1, "gradient_checkpointing": False}
    return sft.SftArguments(
        **{
            "data": str(folder / "sft.parquet"),
            "validation": str(folder / "sft_validation.parquet"),
            "model": str(folder / "base"),
            "output": str(output),
            "device": "cpu",
            "logging_steps": 1,
            "lora_dropout": 0.0,
            **quick,
            **changes,
        }
    )


def dpo_options(data, adapter, output, **changes):
    return dpo.DpoArguments(
        **{
            "data": str(data / "preferences.parquet"),
            "validation": str(data / "preferences_validation.parquet"),
            "adapter": None if adapter is None else str(adapter),
            "output": str(output),
            "device": "cpu",
            "max_length": 96,
            "batch_size": 8,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "epochs": 3,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def full(data):
    """The base after SFT of every weight: a base worth adapting."""
    sft.tune(sft_options(data, data / "full", lora_rank=0, epochs=6))
    return data / "full"


@pytest.fixture(scope="module")
def adapter(data, full):
    sft.tune(sft_options(data, data / "adapter", model=str(full)))
    return data / "adapter"


def record(folder):
    return json.loads((folder / RECORD).read_text())


def losses(folder):
    return [line["loss"] for line in record(folder)["log"] if "loss" in line]


def weights(folder, name="adapter_model.safetensors"):
    from safetensors.torch import load_file

    return load_file(folder / name)


def log_probability(model, tokenizer, prompt, reply):
    """Sum of the log-probabilities of the reply's tokens, and of the eos token that CPOTrainer adds, written out."""
    before = tokenizer.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([*prompt, *reply], tokenize=True, return_dict=False)
    whole.append(tokenizer.eos_token_id)
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
    tokens = torch.tensor(whole[1:])
    return float(logits[torch.arange(len(tokens)), tokens][len(before) - 1 :].sum())


def test_full_sft_learns_and_says_so(full):
    assert losses(full)[-1] < 0.5 * losses(full)[0]
    facts = record(full)
    assert facts["validation"]["after"]["eval_loss"] < facts["validation"]["before"]["eval_loss"]
    assert facts["trainable_parameters"] == facts["parameters"]


def test_sft_moves_every_adapter_weight_and_nothing_else(data, full, adapter):
    """lr 1e-2: LoRA's B begins at zero, so a B that is still zero was not trained."""
    moved = weights(adapter)
    assert len(moved) == 2 * 7 * 2  # A and B, 7 linear layers, 2 blocks
    assert all(bool(value.abs().sum() > 0) for name, value in moved.items() if "lora_B" in name)
    base = AutoModelForCausalLM.from_pretrained(full)
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(full), adapter)
    with reloaded.disable_adapter(), torch.no_grad():
        ids = torch.arange(12).unsqueeze(0)
        assert torch.equal(reloaded(ids).logits, base(ids).logits)


def test_the_record_holds_what_a_card_needs(data, full, adapter):
    facts = record(adapter)
    needed = {"base_model", "base_revision", "arguments", "data_sha256", "environment", "train_seconds", "log"}
    assert needed <= set(facts)
    assert facts["base_model"] == str(full)
    assert {"trl", "peft", "torch"} <= set(facts["environment"]["packages"])
    assert facts["trainable_parameters"] == sum(value.numel() for value in weights(adapter).values())
    assert sorted(path.name for path in adapter.iterdir() if path.is_dir()) == []  # no checkpoints left
    assert not (adapter / "README.md").exists()


def test_a_finished_teacher_is_left_as_it_is_and_another_is_refused(data, full, adapter):
    before = (adapter / "adapter_model.safetensors").stat().st_mtime_ns
    sft.tune(sft_options(data, adapter, model=str(full)))
    assert (adapter / "adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"holds a teacher with learning_rate = 0\.01, not 0\.02"):
        sft.tune(sft_options(data, adapter, model=str(full), learning_rate=2e-2))


def test_a_stage_goes_on_from_the_adapter_of_the_stage_before(data, adapter, tmp_path):
    sft.tune(sft_options(data, tmp_path / "second", model=None, adapter=str(adapter), learning_rate=1e-3))
    first, second = weights(adapter), weights(tmp_path / "second")
    before, after = record(tmp_path / "second")["validation"]["before"], record(adapter)["validation"]["after"]
    assert before["eval_loss"] == pytest.approx(after["eval_loss"], rel=1e-4)
    assert all(not torch.equal(first[name], second[name]) for name in first)
    assert [stage["verb"] for stage in record(tmp_path / "second")["stages"]] == ["sft", "sft"]


def test_dpo_raises_the_held_out_margin_and_keeps_its_reference(data, full, adapter, tmp_path):
    trainer, facts = dpo.prepare(options := dpo_options(data, adapter, tmp_path / "dpo"))
    reference = {n: p.clone() for n, p in trainer.model.named_parameters() if ".ref." in n}
    policy = {n: p.clone() for n, p in trainer.model.named_parameters() if ".default." in n}
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not (".ref." in n or ".default." in n)}
    assert reference
    for name, value in reference.items():
        assert torch.equal(value, policy[name.replace(".ref.", ".default.")])
    after = dpo.train(trainer, options, dpo.settings(options), facts)
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in {**reference, **frozen}.items())
    assert not any(torch.equal(value, now[name]) for name, value in policy.items())

    margins = [after["validation"][when]["eval_rewards/margins"] for when in ("before", "after")]
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert margins[1] > 0.05
    assert after["validation"]["after"]["eval_rewards/accuracies"] == 1
    assert after["stages"][-1]["verb"] == "dpo"
    assert set(weights(tmp_path / "dpo")) == set(weights(adapter))  # the reference is not saved


def test_the_first_dpo_loss_is_that_of_equal_policies(data, adapter, tmp_path):
    trainer, _ = dpo.prepare(dpo_options(data, adapter, tmp_path / "dpo", beta=0.7))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_eq_5_to_the_letter(data, full, adapter, tmp_path):
    """-log sigmoid(log p(chosen) - log p(rejected)): no reference, no beta, sums over tokens."""
    options = dpo_options(data, adapter, tmp_path / "eq5", loss="eq5", batch_size=1)
    trainer, _ = dpo.prepare(options)
    tokenizer = AutoTokenizer.from_pretrained(full)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(full), adapter).eval()
    expected = []
    for row in preference_rows(8, start=32).itertuples():
        chosen, rejected = (log_probability(model, tokenizer, row.prompt, side) for side in (row.chosen, row.rejected))
        expected.append(-torch.nn.functional.logsigmoid(torch.tensor(chosen - rejected)).item())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-3)


def test_dpo_on_a_full_model_takes_the_model_as_reference(data, full, tmp_path):
    trainer, _ = dpo.prepare(dpo_options(data, None, tmp_path / "dpo", model=str(full)))
    assert trainer.ref_model is None
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_the_merged_model_is_plain_and_equal(full, adapter, tmp_path):
    assert merge(MergeArguments(adapter=str(adapter), output=str(tmp_path), device="cpu")) < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(full), adapter)
    ids = AutoTokenizer.from_pretrained(tmp_path)("red shoe", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)
        assert not torch.allclose(merged(ids).logits, AutoModelForCausalLM.from_pretrained(full)(ids).logits, atol=1e-3)


def test_pretraining_reads_titles_and_attributes_and_no_label(data, tmp_path):
    pairs = pd.DataFrame(
        {
            "pair_id": [str(n) for n in range(16)],
            "query": [f"shoe {n // 4}" for n in range(16)],
            "product_title": [f"{PRODUCTS[n % 2]} {n}" for n in range(16)],
            "locale": "us",
            "label": "Exact",
            "brand": ["Aro" if n % 4 == 0 else None for n in range(16)],
        }
    )
    assert (
        next(documents(pairs)) == "shoe 0\n- red shoe 0\n  brand: Aro\n- garden hose 1\n- red shoe 2\n- garden hose 3"
    )
    write(pairs, tmp_path / "train.parquet", PAIRS)
    options = {"model": str(data / "base"), "max_length": 16, "batch_size": 2, "epochs": 3, "learning_rate": 1e-2}
    options |= {"gradient_accumulation_steps": 1, "device": "cpu", "logging_steps": 1, "gradient_checkpointing": False}
    pretrain(PretrainArguments(data=str(tmp_path / "train.parquet"), output=str(tmp_path / "adapted"), **options))
    assert losses(tmp_path / "adapted")[-1] < losses(tmp_path / "adapted")[0]
    AutoModelForCausalLM.from_pretrained(tmp_path / "adapted")
    assert record(tmp_path / "adapted")["train_rows"] > 4  # longer documents go on in the next sequence


def test_killed_it_goes_on_and_ends_where_it_would_have(data, adapter, full, tmp_path):
    """DPO, because its checkpoints hold two adapters: the policy must not fall back to the reference."""
    # A small rate: a large one makes of the last bit of a sum a difference that can be seen.
    options = {"epochs": 10, "save_steps": 3, "batch_size": 8, "learning_rate": 1e-3}
    whole = dpo.tune(dpo_options(data, adapter, tmp_path / "whole", **options))
    arguments = dpo_options(data, adapter, tmp_path / "killed", **options)
    command = [sys.executable, "-m", "recipes.teacher.dpo"]
    for name, value in vars(arguments).items():
        if value is not None:
            command += [f"--{name}", str(value)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        checkpoints = tmp_path / "killed" / "checkpoints"
        while process.poll() is None and not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "killed" / RECORD).exists(), "it was not killed in time"
    again = dpo.tune(arguments)
    assert again["steps"] == whole["steps"]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)


def test_sequences_that_are_too_long_are_never_cut_in_silence(data, tmp_path, capsys):
    with pytest.raises(
        UserError, match=r"32 of 32 sequences are longer than max_length 20 \(row 0: \d+ tokens; longest"
    ):
        sft.tune(sft_options(data, tmp_path / "a", max_length=20))
    tokenizer = load_tokenizer(str(data / "base"))
    rows = [(conversation(0), reasoning(0)), (conversation(1), answer("long " * 60, "Exact"))]
    assert check_conversations(tokenizer, rows, 100, "drop", "x") == [True, False]
    assert check_conversations(tokenizer, rows, 100, "truncate", "x") == [True, True]
    assert "1 of 2 sequences are longer than max_length 100" in capsys.readouterr().out
    with pytest.raises(UserError, match="2 of 2"):
        check_conversations(tokenizer, rows, 10, "drop", "x")


def test_a_template_that_drops_the_reasoning_is_refused(data, tmp_path):
    template = tmp_path / "strip.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(UserError, match="drops the reasoning between <think> tags"):
        sft.tune(sft_options(data, tmp_path / "a", chat_template=str(template)))
    template.write_text("{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="renders a prompt otherwise when an answer follows"):
        sft.tune(sft_options(data, tmp_path / "b", chat_template=str(template)))
    tokenizer = load_tokenizer(str(data / "base"))
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        check_conversations(tokenizer, [(conversation(0), reasoning(0))], 100, "refuse", "x")


def test_without_a_pad_token_the_eos_token_pads_and_is_still_learnt(data, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(data / "base")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token == loaded.eos_token == "<|im_end|>"
    assert "has no pad token; '<|im_end|>'" in capsys.readouterr().out
    random_model(loaded, 32, 2).save_pretrained(tmp_path)
    sft.tune(sft_options(data, tmp_path / "out", model=str(tmp_path), lora_rank=2))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="neither a pad nor an eos token"):
        load_tokenizer(str(tmp_path))


def test_an_adapter_fits_its_own_base_only(data, full, adapter, tmp_path):
    with pytest.raises(UserError, match="fits its own base only"):
        dpo.tune(dpo_options(data, adapter, tmp_path / "a", model=str(data / "base")))
    bare = tmp_path / "bare"  # an adapter of another tool: no record to compare with
    shutil.copytree(adapter, bare, ignore=shutil.ignore_patterns(RECORD))
    for name, sizes, folder in (
        ("deeper", {"layers": 3}, adapter),
        ("shallower", {"layers": 1}, bare),
        ("wider", {"hidden_size": 64}, bare),
    ):
        save_base(tmp_path / name, **sizes)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with pytest.raises(UserError, match="does not fit"):
            with_adapter(model, str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "expected a Hub id or a folder"),
        ({"model": "nowhere"}, "model 'nowhere'"),
        ({"adapter": "nowhere"}, "no adapter_config.json"),
        ({"epochs": 0}, "epochs: expected more than 0"),
        ({"lora_rank": -1}, "lora_rank"),
        ({"chat_template": "nowhere.jinja"}, "chat_template: nowhere.jinja"),
    ],
)
def test_mistakes_are_named(data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        sft.tune(sft_options(data, tmp_path / "out", **changes))


def test_eq_5_has_no_beta(data, adapter, tmp_path):
    with pytest.raises(UserError, match=r"eq\. 5 has none"):
        dpo.tune(dpo_options(data, adapter, tmp_path / "out", loss="eq5", beta=0.5))


def test_messages_of_another_form_are_named(data, tmp_path):
    rows = sft_rows(2)
    rows["completion"] = ["plain text", "plain text"]
    rows.to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=r"column 'completion' holds .*string; expected messages \(role, content\)"):
        sft.tune(sft_options(data, tmp_path / "out", data=str(tmp_path / "bad.parquet")))
    assert not Path(tmp_path / "out").exists()
