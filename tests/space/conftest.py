"""A tiny student or two, the Space on them in a process of its own, and a browser to visit it with."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modeling_lrkd import LRKDForSequenceClassification
from recipes.schemas import load_labels
from recipes.student.saving import save_tokenizer
from tests.tiny import save_tiny_encoder, tiny_tokenizer

SPACE = Path(__file__).parents[2] / "space"
# As on the Hub: the app's own folder, and neither the recipes nor the package.
RUN_ALONE = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_lrkd", "recipes", "hub_cards"):
            raise ImportError(f"the Space must do without {name}")

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, ".")
sys.argv = ["app.py", *sys.argv[1:]]
runpy.run_path("app.py", run_name="__main__")
"""


def save_student(folder: Path, labels: str, **options: object) -> Path:
    schema = load_labels(labels)
    encoder = save_tiny_encoder(folder / "encoder")
    model = LRKDForSequenceClassification.from_encoder(
        str(encoder),
        id2label=dict(enumerate(schema.names)),
        label_gains=schema.gains,
        reasoning_dim=4,
        **options,
    )
    with torch.no_grad():
        model.classifier.weight.mul_(30)  # random, but of an opinion: products differ
    model.save_pretrained(folder)
    save_tokenizer(tiny_tokenizer(), folder)
    shutil.rmtree(encoder)
    return folder


@pytest.fixture(scope="session")
def students(tmp_path_factory):
    """One with everything, and a plain cross-encoder with other labels."""
    folder = tmp_path_factory.mktemp("students")
    full = save_student(folder / "full", "esci", tier_thresholds=[0.2, 0.4, 0.6, 0.8])
    centres = torch.eye(3, 4)
    names = ("user_intent", "structured_analysis", "business_rule")
    save_file({name: centre.clone() for name, centre in zip(names, centres)}, full / "perspectives.safetensors")
    return [full, save_student(folder / "plain", "aliexpress6", extractor_type="none")]


@pytest.fixture(scope="module")
def address(students, tmp_path_factory):
    """The address of a Space that offers both students."""
    folder = tmp_path_factory.mktemp("space")
    shutil.copytree(SPACE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "LRKD_MODELS": ",".join(map(str, students)),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "GRADIO_TEMP_DIR": str(folder / "gradio"),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    environment.pop("PYTHONPATH", None)
    log = folder / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-c", RUN_ALONE, "--port", str(port)],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 240
        while "Running on" not in log.read_text():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, or the one that LRKD_CHROMIUM names."""
    program = shutil.which(os.environ.get("LRKD_CHROMIUM", "chromium"))
    if program is None:
        reason = "no Chromium: apt-get install chromium, or name one in LRKD_CHROMIUM"
        if os.environ.get("LRKD_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()
