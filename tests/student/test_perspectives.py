"""`latents: per_perspective` of recipes.student.distill."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import AutoModelForSequenceClassification, pipeline

from recipes.arguments import UserError
from recipes.schemas import RATIONALES, read, write
from recipes.student.distill import DistillArguments, distill


def student(options, **changes):
    return distill(DistillArguments(**{**options, "latents": "per_perspective", "epochs": 1, **changes}))


@pytest.fixture
def two_perspectives(options):
    """Rationales of two perspectives, the second for every other pair only."""
    frame = read(options["rationales"], RATIONALES)
    second = frame.iloc[::2].assign(
        perspective="business_rule", cot_embedding=lambda f: list(-np.stack(f.cot_embedding))
    )
    write(pd.concat([frame.assign(perspective="user_intent"), second]), options["rationales"], RATIONALES)
    return options


def test_it_trains_saves_and_tells_its_gate(two_perspectives):
    record = student(two_perspectives, epochs=3)
    folder = two_perspectives["output"]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.perspectives == ["business_rule", "user_intent"]  # the order of perspectives.safetensors too
    assert record["guided_rows"] == 42
    assert model.perspective_gate.weight.abs().sum() > 0  # it began at zero
    guidance = [line["guidance_loss"] for line in record["log"] if "guidance_loss" in line]
    assert guidance[-1] < guidance[0]
    [hit] = pipeline("lrkd-relevance", model=folder)({"query": "red shoe", "products": ["blue shoe"]})
    assert hit["perspective_weights"].keys() == hit["perspectives"].keys() == {"business_rule", "user_intent"}
    # Another form of the student is another student.
    with pytest.raises(UserError, match="latents = 'per_perspective', not 'single'"):
        student(two_perspectives, epochs=3, latents="single")


def test_without_guidance_it_has_the_papers_perspectives(options):
    student({**options, "rationales": None}, guidance_weight=0.0)
    model = AutoModelForSequenceClassification.from_pretrained(options["output"])
    assert model.config.perspectives == ["user_intent", "structured_analysis", "business_rule"]


def test_guidance_off_takes_nothing_else_away(two_perspectives):
    frame = read(two_perspectives["rationales"], RATIONALES)
    frame["perspective"] = frame["perspective"].replace("user_intent", "客の目")
    write(frame, two_perspectives["rationales"], RATIONALES)
    student(two_perspectives, guidance_weight=0.0)
    model = AutoModelForSequenceClassification.from_pretrained(two_perspectives["output"])
    assert model.config.perspectives == ["business_rule", "客の目"]


def test_one_perspective_and_no_extractor_are_refused(options):
    with pytest.raises(UserError, match=r"rationales\.parquet: latents per_perspective need .* found 'unified' alone"):
        student(options)
    with pytest.raises(UserError, match=r"latents: per_perspective needs an extractor .*'cls'"):
        student(options, extractor_type="cls")
    assert not Path(options["output"]).exists()


def test_a_student_of_before_the_option_is_still_the_same(options):
    student(options, latents="single")
    record = Path(options["output"], "training.json")
    content = json.loads(record.read_text())
    del content["arguments"]["latents"]
    record.write_text(json.dumps(content))
    assert student(options, latents="single") == content
