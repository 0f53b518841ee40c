"""The tiny recipes of the rivals, LRKD-Combined and Avg. Ensemble from completions to metrics, with a tiny encoder."""

import json
from pathlib import Path

import pandas as pd
import pytest

from recipes.arguments import build, read_yaml
from recipes.data.bazaar import make_bazaar
from recipes.evaluate.ensemble import average
from recipes.evaluate.run import RunArguments, evaluate
from recipes.rationales.build import BuildArguments
from recipes.rationales.build import build as build_rationales
from recipes.rationales.embed import EmbedArguments, embed
from recipes.schemas import COMPLETIONS, PAIRS, PERSPECTIVES, RATIONALES, SPLITS, read, write
from recipes.student.distill import DistillArguments, distill
from recipes.teacher.scripted import complete
from tests.tiny import save_tiny_embedder, save_tiny_encoder

TINY = Path(__file__).parents[2] / "recipes" / "configs" / "tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the tiny recipes read, of fewer pairs: `runs/tiny/bazaar` and its rationales, some perspectives missing."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        frames = make_bazaar(150)
        for split in SPLITS:
            write(frames[split], f"runs/tiny/bazaar/{split}.parquet", PAIRS)
        pairs = pd.concat([frames[split] for split in SPLITS])
        write(complete(pairs, frames["structures"]), "runs/tiny/completions.parquet", COMPLETIONS)
        save_tiny_embedder(folder / "embedder")
        save_tiny_encoder(folder / "encoder")
        for target in ("mean", "concatenation"):
            build_rationales(
                BuildArguments(
                    pairs="runs/tiny/bazaar",
                    completions=["runs/tiny/completions.parquet"],
                    output=f"runs/tiny/{target}.parquet",
                    labels="aliexpress6",
                    target=target,
                    separator=" [SEP] ",
                )
            )
        for source, name in (("mean", "rationales"), ("concatenation", "concatenation")):
            output = f"runs/tiny/{name}_embedded.parquet"
            embed(EmbedArguments(rationales=f"runs/tiny/{source}.parquet", encoder="embedder", output=output))
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def train(name, **changes):
    recipe = {**read_yaml(DistillArguments, TINY / name), "encoder": "encoder", **changes}
    return distill(build(DistillArguments, recipe, name))


@pytest.mark.parametrize("rival", ["ced_kd", "mkd", "crsd"])
def test_the_tiny_recipes_run(here, rival):
    record = train(f"rival_{rival}.yaml")
    assert record["arguments"]["rival"] == rival
    assert record["rival"]["rows_with_tags" if rival == "mkd" else "rows_with_rationale"] > 0
    assert Path("runs/tiny/rivals", rival, "model.safetensors").is_file()


def test_avg_ensemble(here):
    members = []
    for perspective in PERSPECTIVES:
        output = f"runs/tiny/rivals/ensemble/{perspective}"
        record = train("ensemble_member.yaml", perspectives=[perspective], output=output)
        table = read("runs/tiny/rationales_embedded.parquet", RATIONALES)
        assert record["guided_rows"] == (table["perspective"] == perspective).sum()  # not every pair has every one
        arguments = {"pairs": "runs/tiny/bazaar", "labels": "aliexpress6", "max_length": 48, "device": "cpu"}
        evaluate(RunArguments(model=output, output=f"{output}/evaluation", **arguments))
        members.append(f"{output}/evaluation")
    metrics = average(members, "runs/tiny/rivals/ensemble/evaluation")
    assert metrics["schema"] == "aliexpress6"
    assert metrics["facts"]["seed"] == 0
    assert [Path(member["model"]).name for member in metrics["facts"]["members"]] == list(PERSPECTIVES)


def test_lrkd_combined(here):
    """The target is one embedding of r1 SEP r2 SEP r3; a pair that lacks perspectives joins those it has."""
    rationales, joined = (read(f"runs/tiny/{name}.parquet", RATIONALES) for name in ("mean", "concatenation"))
    texts = rationales.groupby("pair_id")["rationale"].agg(" [SEP] ".join)
    assert joined.set_index("pair_id")["rationale"].to_dict() == texts.to_dict()
    report = json.loads(Path("runs/tiny/concatenation.parquet.report.json").read_text())
    counted = rationales.groupby("pair_id").size().value_counts().to_dict()
    assert report["pairs_by_perspectives"] == {str(number): counted[number] for number in sorted(counted)}
    assert len(counted) == 3, "every pair has the same number of perspectives: nothing is missing"
    record = train(
        "student.yaml",
        rationales="runs/tiny/concatenation_embedded.parquet",
        output="runs/tiny/rivals/lrkd_combined",
    )
    assert record["guided_rows"] == len(joined)
