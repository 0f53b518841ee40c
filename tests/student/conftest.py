"""Pairs that a tiny student can learn, with rationales that give the class away."""

import numpy as np
import pandas as pd
import pytest

from recipes.schemas import PAIRS, RATIONALES, load_labels, write
from tests.tiny import save_tiny_encoder

REASONING_DIM = 6
TITLES = ("red shoe", "blue shoe", "shoe lace", "garden hose")


def make_pairs(rows: int, split: str) -> pd.DataFrame:
    names = load_labels("esci").names
    number = np.arange(rows)
    return pd.DataFrame(
        {
            "pair_id": [f"{split}-{n}" for n in number],
            "query": [f"red shoe {n // 4}" for n in number],
            "product_title": [f"{TITLES[n % 4]} {split} {n}" + " wide" * (n % 3) for n in number],
            "locale": "us",
            "label": [names[n % 4] for n in number],
        }
    )


@pytest.fixture
def workspace(tmp_path):
    return make_workspace(tmp_path)


def make_workspace(tmp_path):
    """A folder with `pairs/`, `rationales.parquet` (for two thirds of the pairs) and `encoder/`."""
    train = make_pairs(64, "train")
    write(train, tmp_path / "pairs" / "train.parquet", PAIRS)
    write(make_pairs(20, "validation"), tmp_path / "pairs" / "validation.parquet", PAIRS)
    write(make_pairs(20, "test"), tmp_path / "pairs" / "test.parquet", PAIRS)
    generator = np.random.default_rng(0)
    class_means = dict(zip(load_labels("esci").names, generator.standard_normal((4, REASONING_DIM))))
    rationales = train[train.index % 3 > 0].assign(
        perspective="unified",
        rationale=lambda frame: "because of " + frame["product_title"],
        predicted_label=lambda frame: frame["label"],
        cot_embedding=lambda frame: [class_means[label].astype("float32") for label in frame["label"]],
    )
    write(rationales, tmp_path / "rationales.parquet", RATIONALES)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    save_tiny_encoder(tmp_path / "encoder", **no_dropout)
    return tmp_path


@pytest.fixture
def options(workspace):
    return make_options(workspace)


def make_options(workspace):
    """Arguments of a run that takes seconds; deterministic up to the order of sums."""
    return {
        "pairs": str(workspace / "pairs"),
        "rationales": str(workspace / "rationales.parquet"),
        "encoder": str(workspace / "encoder"),
        "output": str(workspace / "student"),
        "labels": "esci",
        "learning_rate": 1e-3,
        "head_learning_rate": 1e-2,
        "batch_size": 8,
        "epochs": 2,
        "classifier_dropout": 0.0,
        "logging_steps": 2,
        "device": "cpu",
    }
