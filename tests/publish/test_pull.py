"""What was pushed, as each user pulls it: in a process that has only the Hub, its libraries, and an empty cache."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification
from recipes.publish.push import PushArguments, push
from recipes.student.saving import save_tokenizer
from tests.hub_server import serve
from tests.publish.conftest import README, online, seal
from tests.tiny import SIZES, tiny_config, tiny_tokenizer

PAIRS = [("red running shoes", "Men's running shoe, red, size 10"), ("phone case", "USB-C cable 2 m")]
LABELS = ("Exact", "Substitute", "Irrelevant")
BIN = Path(sys.executable).parent

# Our own packages are out of reach: what is pulled has to do without them.
STRANGER = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_lrkd", "recipes"):
            raise ImportError("the package is not to be used here")

sys.meta_path.insert(0, Refuse())
pairs = json.loads(sys.argv[1])
{code}
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A Hub with a private student (tagged v1, and a later main), an adapter and its base, rationales, and a metric."""
    folder = tmp_path_factory.mktemp("packages")
    with serve() as hub, pytest.MonkeyPatch.context() as patch, online(patch):
        hub.owner = hub.token()

        def send(path, repo_id, repo_type="model", **options):
            seal(path, repo_type)
            push(PushArguments(folder=str(path), repo_id=repo_id, **options), HfApi(hub.url, hub.owner))

        hub.students = {}
        for version, tag in (("v1", ["v1"]), ("main", [])):
            hub.students[version] = save_student(folder / "student", seed=len(version))
            send(folder / "student", "shop/student", tag=tag)
        save_adapter(folder)
        send(folder / "base", "shop/base", public=True)
        send(folder / "adapter", "shop/adapter", public=True)
        send(save_rationales(folder / "rationales"), "shop/rationales", "dataset", public=True)
        send(save_metric(folder / "metric"), "shop/relevance_accuracy", "space", public=True)
        yield hub


def save_student(folder, seed):
    torch.manual_seed(seed)
    config = LRKDConfig(encoder_config=tiny_config(), extractor_type="gat", id2label=dict(enumerate(LABELS)))
    model = LRKDForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight)  # scores that differ enough to be compared
    model.save_pretrained(folder)
    save_tokenizer(tiny_tokenizer(), folder)
    (folder / "README.md").write_text(README)
    queries, titles = zip(*PAIRS, strict=True)
    with torch.inference_mode():
        output = model(**tiny_tokenizer()(list(queries), list(titles), padding=True, return_tensors="pt"))
    return {"logits": output.logits, "latent": output.latent_reasoning, "probabilities": output.logits.softmax(1)}


def save_adapter(folder):
    sizes = {name: size for name, size in SIZES.items() if name != "type_vocab_size"}
    base = LlamaForCausalLM(LlamaConfig(**sizes))
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    base.name_or_path = base.config._name_or_path = "shop/base"
    adapted = get_peft_model(base, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    for name in ("base", "adapter"):
        (folder / name / "README.md").write_text(README)


def save_rationales(folder):
    configs = []
    for perspective in ("user_intent", "business_rule"):
        configs.append(f"- config_name: {perspective}\n  data_files:\n")
        for split, rows in (("train", 5), ("test", 2)):
            path = folder / perspective / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame({"rationale": [f"{perspective} {split} {row}" for row in range(rows)]}).to_parquet(path)
            configs[-1] += f"  - split: {split}\n    path: {perspective}/{split}.parquet\n"
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nconfigs:\n" + "".join(configs) + "---\n# Rationales\n")
    return folder


METRIC = """
import datasets
import evaluate


class RelevanceAccuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="Accuracy.", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


def save_metric(folder):
    folder.mkdir()
    (folder / "relevance_accuracy.py").write_text(METRIC)
    (folder / "README.md").write_text(
        "---\ntitle: Relevance accuracy\nsdk: gradio\nlicense: apache-2.0\n---\n# Metric\n"
    )
    return folder


@pytest.fixture
def stranger(shop, tmp_path):
    """Run code in a clean process and return what it assigns to `found`."""

    def run(code, token=None, **environment):
        done = subprocess.run(
            [sys.executable, "-c", STRANGER.replace("{code}", code), json.dumps(PAIRS)],
            cwd=tmp_path,
            env=shop.environment(tmp_path / "hf", token) | environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.split("FOUND")[1])

    return run


def close(found, expected):
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)


AUTO = """
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("shop/student", trust_remote_code=False)
batch = tokenizer(*map(list, zip(*pairs)), padding=True, return_tensors="pt")
found = {}
with torch.inference_mode():
    for version in ("v1", "main"):
        remote = {"trust_remote_code": True, "revision": version, "code_revision": version}
        model = AutoModelForSequenceClassification.from_pretrained("shop/student", **remote).eval()
        found[version] = model(**batch).logits.tolist()
    headless = AutoModel.from_pretrained("shop/student", trust_remote_code=True).eval()
    found["latent"] = headless(**batch).latent_reasoning.tolist()
    found["module"] = type(model).__module__
"""


def test_auto_models_at_a_tag_and_at_main(shop, stranger):
    found = stranger(AUTO, shop.owner)
    close(found["v1"], shop.students["v1"]["logits"])
    close(found["main"], shop.students["main"]["logits"])
    close(found["latent"], shop.students["main"]["latent"])
    assert found["module"].startswith("transformers_modules.shop.student.")


PIPELINE = """
from transformers import pipeline
classify = pipeline("text-classification", model="shop/student", trust_remote_code=True)
found = [
    {score["label"]: score["score"] for score in classify({"text": q, "text_pair": p}, top_k=None, truncation=True)}
    for q, p in pairs
]
"""


def test_pipeline(shop, stranger):
    found = stranger(PIPELINE, shop.owner)
    close([[scores[name] for name in LABELS] for scores in found], shop.students["main"]["probabilities"])


CROSS_ENCODER = """
from sentence_transformers import CrossEncoder
model = CrossEncoder("shop/student", trust_remote_code=True, revision="v1")
found = model.predict([tuple(pair) for pair in pairs]).tolist()
"""


def test_cross_encoder(shop, stranger):
    close(stranger(CROSS_ENCODER, shop.owner), shop.students["v1"]["logits"])


ADAPTER = """
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("shop/base")
ids = torch.tensor([[2, 7, 8, 3]])
with torch.inference_mode():
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, "shop/adapter")(ids).logits
    by_name = AutoPeftModelForCausalLM.from_pretrained("shop/adapter")(ids).logits
found = [(adapted - plain).abs().max().item(), (adapted - by_name).abs().max().item()]
"""


def test_adapter(stranger):
    difference, same = stranger(ADAPTER)
    assert difference > 1e-3
    assert same == 0


DATASET = """
from datasets import get_dataset_config_names, load_dataset
whole = load_dataset("shop/rationales", "user_intent")
streamed = load_dataset("shop/rationales", "business_rule", split="test", streaming=True)
found = [get_dataset_config_names("shop/rationales"), {split: rows["rationale"][:] for split, rows in whole.items()},
         [row["rationale"] for row in streamed]]
"""


def test_dataset_whole_and_streaming(stranger):
    names, whole, streamed = stranger(DATASET)
    assert names == ["user_intent", "business_rule"]
    assert whole == {
        split: [f"user_intent {split} {row}" for row in range(n)] for split, n in (("train", 5), ("test", 2))
    }
    assert streamed == ["business_rule test 0", "business_rule test 1"]


METRIC_USE = """
import evaluate
metric = evaluate.load("shop/relevance_accuracy")
found = metric.compute(predictions=[0, 1, 1, 2], references=[0, 1, 2, 2])
"""


def test_metric(stranger):
    assert stranger(METRIC_USE) == {"accuracy": 0.75}


def hf_download(shop, folder, *options, token=None):
    command = [str(BIN / "hf"), "download", *options, "--local-dir", str(folder / "pulled")]
    environment = shop.environment(folder / "hf", token)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_hf_download_of_a_private_repository(shop, tmp_path):
    refused = hf_download(shop, tmp_path, "shop/student")
    assert refused.returncode == 1
    assert "not found" in (refused.stdout + refused.stderr).lower()
    done = hf_download(shop, tmp_path, "shop/student", "--revision", "v1", token=shop.token(role="read"))
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "pulled" / ".cache")
    pulled = {p.relative_to(tmp_path / "pulled").as_posix(): p.read_bytes() for p in (tmp_path / "pulled").rglob("*.*")}
    assert pulled == shop.files("models", "shop/student", "v1")


DAMAGED = """
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
found = []
for options in ({}, {}, {"force_download": True}):
    try:
        found.append(AutoModelForCausalLM.from_pretrained("shop/base", **options).config.model_type)
    except (SafetensorError, OSError) as error:
        found.append(type(error).__name__)
"""


def test_a_damaged_download_is_told_and_healed_by_another(shop, stranger):
    before = len(shop.requests)
    shop.fault("GET /storage/.*", cut=1000)
    # Cut off: the client asks for the rest by itself. Other bytes than were pushed: whoever reads them says so.
    assert stranger(DAMAGED, HF_HOME="cut") == ["llama"] * 3
    assert sum(request.startswith("GET /storage/") for request in shop.requests[before:]) == 3
    shop.fault("GET /storage/.*", corrupt=True)
    first, again, forced = stranger(DAMAGED, HF_HOME="corrupt")
    assert first in ("SafetensorError", "OSError")
    assert again == first  # it lies in the cache
    assert forced == "llama"


@pytest.fixture
def olah(shop, tmp_path):
    """The address of a server that is not ours, with the student as a plain git folder."""
    mirror = tmp_path / "mirror"
    shop.repositories["models", "shop/student"].export(mirror / "models" / "shop" / "student")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{tmp_path}/cached"\n'
    (tmp_path / "olah.toml").write_text(settings + f'mirrors-path = ["{mirror}"]\n[accessibility]\noffline = true\n')
    command = [str(BIN / "olah-cli"), "--config", "olah.toml", "--log-path", "logs"]
    with (tmp_path / "olah.log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not answers(f"http://127.0.0.1:{port}/api/models/shop/student/revision/main"):
            assert server.poll() is None, (tmp_path / "olah.log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


# It answers a folder that is not there (which AutoTokenizer asks for) like a repository that is not there: so the
# tokenizer comes from the snapshot.
OLAH = """
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(snapshot_download("shop/student", revision="main"), trust_remote_code=False)
remote = {"trust_remote_code": True, "revision": "main"}
model = AutoModelForSequenceClassification.from_pretrained("shop/student", **remote).eval()
with torch.inference_mode():
    found = model(**tokenizer(*map(list, zip(*pairs)), padding=True, return_tensors="pt")).logits.tolist()
"""


def test_another_server_serves_the_same_student(shop, olah, stranger):
    close(stranger(OLAH, HF_ENDPOINT=olah), shop.students["main"]["logits"])
