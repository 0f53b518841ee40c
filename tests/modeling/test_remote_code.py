"""A saved folder, loaded as a stranger would: another process, this package out of reach, the code from the folder."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification
from recipes.student.saving import save_tokenizer
from tests.tiny import FAMILIES, tiny_config, tiny_tokenizer

PACKAGE = Path(__file__).parents[2] / "modeling_lrkd"
PAIRS = [("red running shoes", "Men's running shoe, red, size 10"), ("phone case", "USB-C cable 2 m")]

STRANGER = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_lrkd":
            raise ImportError("the package is not to be used here")

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

folder, pairs = sys.argv[1], json.loads(sys.argv[2])
remote = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **remote)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
model = AutoModelForSequenceClassification.from_pretrained(folder, **remote).eval()
headless = AutoModel.from_pretrained(folder, **remote).eval()
queries, titles = zip(*pairs)
batch = tokenizer(list(queries), list(titles), padding=True, truncation=True, return_tensors="pt")
found = {"model_type": config.model_type, "module": type(model).__module__}
with torch.inference_mode():
    found["logits"] = model(**batch).logits.tolist()
    reasoning = headless(**batch)
    found["latent"] = reasoning.latent_reasoning.tolist()
    weights = reasoning.perspective_weights
    found["perspective_weights"] = None if weights is None else weights.tolist()
classify = pipeline("text-classification", model=folder, tokenizer=tokenizer, **remote)
found["pipeline"] = [
    {score["label"]: score["score"] for score in classify({"text": q, "text_pair": p}, top_k=None, truncation=True)}
    for q, p in pairs
]
from sentence_transformers import CrossEncoder
found["cross_encoder"] = CrossEncoder(folder, **remote).predict([tuple(pair) for pair in pairs]).tolist()
print("FOUND" + json.dumps(found))
"""


# `make test` names a Python with the oldest supported transformers: what we save must load there too.
OLDEST = os.environ.get("LRKD_OLDEST_PYTHON")
PYTHONS = [
    pytest.param(sys.executable, id="pinned"),
    pytest.param(OLDEST, id="oldest", marks=pytest.mark.skipif(not OLDEST, reason="LRKD_OLDEST_PYTHON is not set")),
]


def as_a_stranger(python, folder, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [python, "-c", STRANGER, str(folder), json.dumps(PAIRS)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.split("FOUND")[1])


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("family", "extractor_type", "perspectives"),
    [
        *zip(FAMILIES, ("gat", "mlp", "poly", "gat"), (None,) * 4),
        ("bert", "cls", None),
        ("bert", "gat", ["user_intent", "business_rule"]),
    ],
)
def test_a_saved_folder_loads_without_the_package(family, extractor_type, perspectives, python, tmp_path):
    torch.manual_seed(0)
    names = {0: "Exact", 1: "Substitute", 2: "Irrelevant"}
    options = {"extractor_type": extractor_type, "perspectives": perspectives}
    apart = extractor_type == "cls"
    options |= {"separate_layers": int(apart), "match_marks": apart, "query_layers": int(apart)}
    config = LRKDConfig(encoder_config=tiny_config(family), id2label=names, **options)
    model, tokenizer = LRKDForSequenceClassification(config).eval(), tiny_tokenizer()
    if family == "xlm-roberta":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]  # it has one segment type
    if perspectives:
        torch.nn.init.normal_(model.perspective_gate.weight)
    torch.nn.init.normal_(model.classifier.weight)  # scores that differ enough to be compared
    model.save_pretrained(tmp_path / "student")
    save_tokenizer(tokenizer, tmp_path / "student")
    found = as_a_stranger(python, tmp_path / "student", tmp_path)

    queries, titles = zip(*PAIRS)
    with torch.inference_mode():
        output = model(**tokenizer(list(queries), list(titles), padding=True, return_tensors="pt"))
    assert found["model_type"] == "lrkd"
    assert found["module"].startswith("transformers_modules.")
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(torch.tensor(found["logits"]), output.logits, **close)
    torch.testing.assert_close(torch.tensor(found["latent"]), output.latent_reasoning, **close)
    if perspectives:
        torch.testing.assert_close(torch.tensor(found["perspective_weights"]), output.perspective_weights, **close)
    probabilities = output.logits.softmax(1)
    by_name = torch.tensor([[scores[name] for name in names.values()] for scores in found["pipeline"]])
    torch.testing.assert_close(by_name, probabilities, **close)
    torch.testing.assert_close(torch.tensor(found["cross_encoder"]), output.logits, **close)


def test_the_uploaded_code_imports_only_torch_transformers_and_its_siblings():
    uploaded = [path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert len(uploaded) >= 3
    allowed = {"torch", "transformers", "safetensors", *sys.stdlib_module_names}
    for path in uploaded:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, path.name
            elif isinstance(node, ast.ImportFrom):
                # `from . import x` and sub-packages are silently missed when the code is uploaded.
                assert node.level == 1
                assert f"{node.module}.py" in {sibling.name for sibling in uploaded}


def test_the_package_folder_is_flat():
    assert [path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"] == []
