"""A tiny student, pairs that it classifies without a mistake, and its export."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification
from recipes.schemas import PAIRS, load_labels, write
from recipes.serve.export import ExportArguments, export
from recipes.serve.scorer import Scorer
from recipes.student.saving import save_tokenizer
from tests.tiny import tiny_config, tiny_tokenizer

WORDS = ("red", "blue", "shoe", "shoes", "lamp", "garden hose", "usb c cable", "9 mm", "wide", "x")


def save_student(folder: Path, family: str = "bert", **options) -> Path:
    torch.manual_seed(0)
    schema = load_labels("esci")
    options = {"id2label": schema.id2label, "label_gains": schema.gains, "reasoning_dim": 8, **options}
    model = LRKDForSequenceClassification(LRKDConfig(encoder_config=tiny_config(family), **options)).eval()
    with torch.no_grad():  # an untrained head would call everything the same
        model.classifier.weight.normal_(std=3.0)
        for parameter in model.encoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(tiny_tokenizer(), folder)
    return folder


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("served") / "student")


@pytest.fixture(scope="session")
def pairs(student, tmp_path_factory):
    """Labels are the student's own: its macro-F1 is 1."""
    folder = tmp_path_factory.mktemp("served_pairs")
    texts = [(a, f"{b} {c}") for a in WORDS for b in WORDS for c in WORDS[:2]]
    with Scorer(student, "torch") as scorer:
        labels = [scorer.labels[int(row.argmax())] for row in scorer.score(texts)]
    frame = pd.DataFrame(texts, columns=["query", "product_title"])
    frame = frame.assign(label=labels, locale="us", pair_id=[str(number) for number in range(len(frame))])
    for split in ("train", "validation", "test"):
        write(frame, folder / f"{split}.parquet", PAIRS)
    return folder


@pytest.fixture(scope="session")
def exported(student, pairs, tmp_path_factory):
    output = tmp_path_factory.mktemp("served_export") / "exported"
    # A random student is decided by little: int8 may turn a pair or two.
    export(
        ExportArguments(model=str(student), output=str(output), pairs=str(pairs), guard_split="test", tolerance=50.0)
    )
    return output
