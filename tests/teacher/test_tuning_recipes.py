"""The tiny recipes of the teacher run as written, one after the other, in this process."""

import json
from pathlib import Path

import pytest

from recipes.arguments import parse
from recipes.publish.package import PackageArguments, package
from recipes.record import write_json
from recipes.teacher import dpo, pretrain, sft, tiny
from recipes.teacher.evaluate import EvaluateArguments, evaluate
from recipes.teacher.generate import GenerateArguments, generate
from recipes.teacher.merge import MergeArguments, merge
from recipes.teacher.preferences import PreferencesArguments, prefer
from recipes.teacher.sft_data import SftDataArguments, collect
from tests.packaging import edit_json, name_commit, write_statement

ROOT = Path(__file__).parents[2]


def recipe(cls, name):
    return parse(cls, None, ["--config", f"recipes/configs/tiny/teacher_{name}.yaml"])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with the tiny bazaar and its scripted completions; in it, what the recipes write stays."""
    from recipes.data import bazaar
    from recipes.teacher import scripted

    folder = tmp_path_factory.mktemp("flow")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for verb, argv in (
            (bazaar, ["--config", "recipes/configs/tiny/bazaar.yaml", "--output", "runs/tiny/bazaar"]),
            (scripted, ["--pairs", "runs/tiny/bazaar", "--output", "runs/tiny/completions.parquet", "--samples", "2"]),
        ):
            patch.setattr("sys.argv", ["", *argv])
            verb.main()
        yield folder


def log(folder):
    return [line["loss"] for line in json.loads((folder / "training.json").read_text())["log"] if "loss" in line]


def test_pairs_to_merged_teacher(workspace, monkeypatch):
    teacher = workspace / "runs" / "tiny" / "teacher"
    collect(recipe(SftDataArguments, "sft_data"))
    monkeypatch.setattr("sys.argv", ["", "--config", "recipes/configs/tiny/teacher_base.yaml"])
    tiny.main()
    pretrain.pretrain(recipe(pretrain.PretrainArguments, "pretrain"))
    sft.tune(recipe(sft.SftArguments, "sft"))
    prefer(recipe(PreferencesArguments, "preferences"))
    dpo.tune(recipe(dpo.DpoArguments, "dpo"))
    assert log(teacher / "pretrained")[-1] < log(teacher / "pretrained")[0]
    assert log(teacher / "sft")[-1] < log(teacher / "sft")[0]
    assert log(teacher / "dpo")[-1] < log(teacher / "dpo")[0]
    merge(MergeArguments(adapter=str(teacher / "dpo"), output=str(teacher / "merged"), device="cpu"))
    assert (teacher / "merged" / "model.safetensors").is_file()
    stages = json.loads((teacher / "dpo" / "training.json").read_text())["stages"]
    assert [stage["verb"] for stage in stages] == ["sft", "dpo"]

    # The tuned teacher labels pairs, is measured, and its adapter gets its card.
    generate(recipe(GenerateArguments, "generate"))
    measured = evaluate(
        EvaluateArguments(
            pairs="runs/tiny/bazaar",
            completions=["runs/tiny/teacher/generated.parquet"],
            adapter="runs/tiny/teacher/dpo",
            labels="aliexpress6",
            draws=100,
            output="runs/tiny/teacher/evaluation",
        )
    )
    assert measured["overall"]["perspectives"]["unified"]["samples"] == 1
    edit_json(teacher / "dpo" / "training.json", lambda record: name_commit(record["environment"]))
    arguments = PackageArguments(
        kind="adapter",
        source="runs/tiny/teacher/dpo",
        evaluation="runs/tiny/teacher/evaluation",
        messages=str(write_json("messages.json", [{"role": "user", "content": "red shoe | shoe lace"}])),
        facts=str(write_statement(Path("facts.yaml"), base_model="shop/tiny-qwen", base_revision=40 * "1")),
        repo_id="shop/teacher",
        output="publish/teacher",
    )
    package(arguments)
    card = Path("publish/teacher/README.md").read_text()
    assert "shop/tiny-qwen" in card
    assert str(workspace) not in "".join(path.read_text() for path in Path("publish/teacher").glob("*.json"))

    for number in (1, 2, 3):
        collect(recipe(SftDataArguments, f"progressive_data_{number}"))
        record = sft.tune(recipe(sft.SftArguments, f"progressive_{number}"))
        assert len(record["stages"]) == number


def test_the_tiny_base_is_the_same_every_time(workspace, tmp_path, monkeypatch):
    collect(recipe(SftDataArguments, "sft_data"))
    files = []
    for name in ("one", "two"):
        argv = ["", "--config", "recipes/configs/tiny/teacher_base.yaml", "--output", str(tmp_path / name)]
        monkeypatch.setattr("sys.argv", argv)
        tiny.main()
        files.append([(tmp_path / name / file).read_bytes() for file in ("model.safetensors", "tokenizer.json")])
    assert files[0] == files[1]
