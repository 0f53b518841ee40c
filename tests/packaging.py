"""Things to package: a student that was really trained and evaluated, an adapter, and what a person states of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recipes.record import environment, sha256

STATEMENT = {
    "authors": ["A. Shopkeeper"],
    "license": "apache-2.0",
    "languages": ["en"],
    "dataset_name": "Shoes",
    "dataset_id": "shop/shoes",
    "base_model": "shop/tiny-encoder",
    "intended_use": "To be tested.",
    "out_of_scope_use": "Anything else.",
    "limits": ["It knows four titles."],
    "business_rules": "Laces are accessories.",
    "citation": "@misc{shoes}",
    "example_query": "red shoe",
    "example_products": ["red shoe wide", "shoe lace"],
}


def write_statement(path: Path, **changes: object) -> Path:
    values = {**STATEMENT, **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def make_student(folder: Path) -> Path:
    """Train and evaluate in `folder`: `student/`, `student/evaluation-test/`, `facts.yaml`."""
    # Not at the top: most of what uses this module needs no torch.
    from recipes.schemas import PAIRS, write
    from recipes.student.distill import DistillArguments, distill
    from tests.student.conftest import make_pairs
    from tests.tiny import save_tiny_encoder

    for split, rows in (("train", 32), ("validation", 12), ("test", 48)):
        write(make_pairs(rows, split), folder / "pairs" / f"{split}.parquet", PAIRS)
    save_tiny_encoder(folder / "encoder")
    distill(
        DistillArguments(
            pairs=str(folder / "pairs"),
            output=str(folder / "student"),
            encoder=str(folder / "encoder"),
            labels="esci",
            extractor_type="gat",
            reasoning_dim=6,
            guidance_weight=0.0,
            batch_size=8,
            epochs=1,
            max_length=48,
            learning_rate=1e-3,
            device="cpu",
        )
    )
    score(folder)
    edit_json(folder / "student" / "training.json", lambda it: name_commit(it["environment"]))
    write_statement(folder / "facts.yaml")
    return folder


def score(folder: Path) -> None:
    from recipes.evaluate.run import RunArguments, evaluate

    evaluate(
        RunArguments(
            model=str(folder / "student"),
            pairs=str(folder / "pairs"),
            output=str(folder / "student" / "evaluation-test"),
            device="cpu",
        )
    )


def name_commit(recorded: dict) -> None:
    """The tests also run where there is no git; a record without a commit is refused by another test."""
    recorded["code_commit"] = recorded["code_commit"] or 40 * "0"


def make_rationales(folder: Path) -> Path:
    """Run the stages before a dataset: `bazaar/` (120 pairs), `completions.parquet`, `embedded.parquet`."""
    from recipes.data.bazaar import main as make_bazaar
    from recipes.rationales.build import BuildArguments, build
    from recipes.rationales.embed import EmbedArguments, embed
    from recipes.schemas import SPLITS
    from recipes.teacher.scripted import main as teach
    from tests.tiny import save_tiny_embedder

    with pytest.MonkeyPatch.context() as patch:
        options = ["--output", str(folder / "bazaar"), "--size", "120", "--seed", "3", "--locales", "en", "jp"]
        patch.setattr(sys, "argv", ["bazaar", *options])
        make_bazaar()
        options = ["--pairs", str(folder / "bazaar"), "--output", str(folder / "completions.parquet")]
        patch.setattr(sys, "argv", ["scripted", *options, "--samples", "2"])
        teach()
    build(
        BuildArguments(
            pairs=str(folder / "bazaar"),
            completions=[str(folder / "completions.parquet")],
            output=str(folder / "rationales.parquet"),
            labels="aliexpress6",
            splits=list(SPLITS),
            keep="all",
            samples="all",
        )
    )
    embed(
        EmbedArguments(
            rationales=str(folder / "rationales.parquet"),
            encoder=str(save_tiny_embedder(folder / "embedder")),
            output=str(folder / "embedded.parquet"),
            max_length=32,
        )
    )
    return folder


def make_adapter(folder: Path) -> Path:
    """Save a LoRA adapter of a tiny random Qwen3 with its records: `base/`, `adapter/`, `evaluation/`, ..."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tests.tiny import tiny_tokenizer

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=3, **sizes
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = get_peft_model(
        Qwen3ForCausalLM.from_pretrained(folder / "base"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    model.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    edit_json(
        folder / "adapter" / "adapter_config.json", lambda it: it.update(base_model_name_or_path="shop/tiny-qwen")
    )
    recorded = environment()
    name_commit(recorded)
    training = {
        "base_model": "shop/tiny-qwen",
        "base_revision": 40 * "1",
        "arguments": {"learning_rate": 5e-5, "data": str(folder / "sft.parquet"), "epochs": 3},
        "data_sha256": {"sft.parquet": 64 * "2"},
        "environment": recorded,
        "train_seconds": 12.5,
        "log": [],
    }
    (folder / "adapter" / "training.json").write_text(json.dumps(training))

    def measured(value: float) -> dict:
        return {"value": value, "interval": [value - 0.1, value + 0.1]}

    metrics = {
        "conventions": {"accuracy": "Mean over samples and pairs."},
        "overall": {
            "pairs": 40,
            "perspectives": {
                name: {"samples": 1, "accuracy": measured(value), "macro_f1": measured(value / 2)}
                for name, value in (("user_intent", 0.25), ("unified", 0.5))
            },
        },
        "facts": {
            "adapter_sha256": sha256(folder / "adapter" / "adapter_model.safetensors"),
            "pairs": str(folder / "pairs" / "test.parquet"),
            "pairs_sha256": 64 * "3",
            "completions": {str(folder / "completions.parquet"): 64 * "4"},
            "date": "2026-01-01T00:00:00+00:00",
            "arguments": {"pairs": str(folder / "pairs"), "split": "test", "draws": 100, "seed": 0},
        },
    }
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    (folder / "messages.json").write_text(json.dumps([{"role": "user", "content": "red shoe | shoe lace"}]))
    write_statement(folder / "facts.yaml", base_model=None)
    return folder


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def snippets(card: str) -> list[str]:
    """The Python blocks of a card."""
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)


# The card's code, run where this project cannot be imported.
STRANGER = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_lrkd", "recipes", "hub_cards", "tests"):
            raise ImportError(name + " is not to be used here")

sys.meta_path.insert(0, Refuse())
for number, code in enumerate(json.loads(sys.stdin.read())):
    print(f"SNIPPET {number}")
    exec(compile(code, f"snippet {number}", "exec"), {"__name__": "__main__"})
"""


def run_snippets(codes: list[str], tmp_path: Path, hub: dict[str, str] | None = None) -> list[str]:
    """Run each in one clean process with empty caches; return what each printed.

    Args:
        codes: The snippets.
        tmp_path: Where they run.
        hub: The environment in which they find a Hub; None: they have no network.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("HF_")}
    offline = {**kept, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", STRANGER],
        input=json.dumps(codes),
        cwd=tmp_path,
        env=offline if hub is None else hub,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-1000:]}\n{result.stderr[-3000:]}"
    return [part.partition("\n")[2] for part in result.stdout.split("SNIPPET ")[1:]]
