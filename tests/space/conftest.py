"""A tiny student or two, the Space on them in a process of its own, and a browser to visit it with."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modeling_lrkd import LRKDForSequenceClassification
from recipes.schemas import load_labels
from recipes.student.saving import save_tokenizer
from tests.space.visiting import chromium, serve
from tests.tiny import save_tiny_encoder, tiny_tokenizer


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
    with serve(students, tmp_path_factory.mktemp("space")) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, or the one that LRKD_CHROMIUM names."""
    if (program := chromium()) is None:
        reason = "no Chromium: apt-get install chromium, or name one in LRKD_CHROMIUM"
        if os.environ.get("LRKD_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()
