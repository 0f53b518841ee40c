"""Every recipe parses through the parser of its verb, and the tiny ones run, one after the other, as written."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hub_cards.dataset import DatasetStatement
from hub_cards.facts import Statement
from recipes.arguments import build, read_yaml
from recipes.bench.efficiency import EfficiencyArguments
from recipes.data.bazaar import BazaarArguments
from recipes.data.prepare import PrepareArguments
from recipes.evaluate.run import RunArguments
from recipes.publish.package import PackageArguments
from recipes.rationales.build import BuildArguments
from recipes.rationales.embed import EmbedArguments
from recipes.rationales.probe import ProbeArguments
from recipes.rationales.targets import TargetsArguments
from recipes.student.bench import BenchArguments, plan
from recipes.student.distill import DistillArguments
from recipes.teacher.dpo import DpoArguments
from recipes.teacher.evaluate import EvaluateArguments
from recipes.teacher.generate import GenerateArguments
from recipes.teacher.preferences import PreferencesArguments
from recipes.teacher.pretrain import PretrainArguments
from recipes.teacher.sft import SftArguments
from recipes.teacher.sft_data import SftDataArguments
from recipes.teacher.tiny import TinyArguments

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "configs"
VERBS = {
    "bench/efficiency_cpu.yaml": EfficiencyArguments,
    "bench/efficiency_gpu.yaml": EfficiencyArguments,
    "data/bazaar.yaml": BazaarArguments,
    "data/esci.yaml": PrepareArguments,
    "data/esci_local.yaml": PrepareArguments,
    "evaluate/esci.yaml": RunArguments,
    "publish/bazaar_dataset.yaml": PackageArguments,
    "publish/bazaar_rationales.yaml": BuildArguments,
    "publish/facts_bazaar.yaml": Statement,
    "publish/facts_bazaar_dataset.yaml": DatasetStatement,
    "publish/facts_esci.yaml": Statement,
    "rationales/build.yaml": BuildArguments,
    "rationales/embed.yaml": EmbedArguments,
    "student/bazaar_frozen.yaml": DistillArguments,
    "student/bazaar_matrix.yaml": BenchArguments,
    "student/bazaar_minilm.yaml": DistillArguments,
    "student/demo_bench.yaml": BenchArguments,
    "student/esci_bench.yaml": BenchArguments,
    "student/esci_frozen.yaml": DistillArguments,
    "student/esci_frozen_tune.yaml": BenchArguments,
    "student/esci_matrix.yaml": BenchArguments,
    "student/esci_guidance.yaml": BenchArguments,
    "student/esci_item_cached.yaml": DistillArguments,
    "student/esci_item_cached_bench.yaml": BenchArguments,
    "student/esci_minilm.yaml": DistillArguments,
    "student/esci_perspectives.yaml": DistillArguments,
    "student/esci_tune.yaml": BenchArguments,
    "student/esci_votes.yaml": BenchArguments,
    "student/paper_esci.yaml": DistillArguments,
    "student/rivals/ced_kd.yaml": DistillArguments,
    "student/rivals/crsd.yaml": DistillArguments,
    "student/rivals/ensemble_member.yaml": DistillArguments,
    "student/rivals/lrkd_combined.yaml": DistillArguments,
    "student/rivals/mkd.yaml": DistillArguments,
    "student/rivals/mkd_scores.yaml": DistillArguments,
    "student/rivals/paper_ced_kd.yaml": DistillArguments,
    "student/rivals/paper_crsd.yaml": DistillArguments,
    "student/rivals/paper_mkd.yaml": DistillArguments,
    "teacher/evaluate_esci.yaml": EvaluateArguments,
    "teacher/few_shot_qwen3_14b.yaml": GenerateArguments,
    "teacher/generate_qwen3_14b.yaml": GenerateArguments,
    "teacher/generate_qwen3_small.yaml": GenerateArguments,
    "teacher/generate_tuned.yaml": GenerateArguments,
    "teacher/bazaar/base.yaml": TinyArguments,
    "teacher/bazaar/data.yaml": BazaarArguments,
    "teacher/bazaar/dpo.yaml": DpoArguments,
    "teacher/bazaar/evaluate.yaml": EvaluateArguments,
    "teacher/bazaar/generate.yaml": GenerateArguments,
    "teacher/bazaar/preferences.yaml": PreferencesArguments,
    "teacher/bazaar/sft.yaml": SftArguments,
    "teacher/bazaar/sft_data.yaml": SftDataArguments,
    "teacher/bazaar/sft_structured.yaml": SftArguments,
    "teacher/bazaar/sft_structured_data.yaml": SftDataArguments,
    "teacher/one_gpu/mpcot_dpo.yaml": DpoArguments,
    "teacher/one_gpu/mpcot_sft.yaml": SftArguments,
    "teacher/preferences/crsd.yaml": PreferencesArguments,
    "teacher/preferences/mpcot.yaml": PreferencesArguments,
    "teacher/preferences/mpcot_balanced.yaml": PreferencesArguments,
    "teacher/preferences/mpcot_size_matched.yaml": PreferencesArguments,
    "teacher/preferences/single.yaml": PreferencesArguments,
    "teacher/qwen3_14b/crsd_dpo.yaml": DpoArguments,
    "teacher/qwen3_14b/crsd_pretrain.yaml": PretrainArguments,
    "teacher/qwen3_14b/crsd_sft.yaml": SftArguments,
    "teacher/qwen3_14b/mpcot_dpo.yaml": DpoArguments,
    "teacher/qwen3_14b/mpcot_dpo_balanced.yaml": DpoArguments,
    "teacher/qwen3_14b/mpcot_dpo_eq5.yaml": DpoArguments,
    "teacher/qwen3_14b/mpcot_dpo_size_matched.yaml": DpoArguments,
    "teacher/qwen3_14b/mpcot_sft.yaml": SftArguments,
    "teacher/qwen3_14b/progressive_1.yaml": SftArguments,
    "teacher/qwen3_14b/progressive_2.yaml": SftArguments,
    "teacher/qwen3_14b/progressive_3.yaml": SftArguments,
    "teacher/qwen3_14b/single_dpo.yaml": DpoArguments,
    "teacher/qwen3_14b/single_sft.yaml": SftArguments,
    "teacher/qwen3_14b/single_sft_mpcot_dpo.yaml": DpoArguments,
    "teacher/qwen3_14b/single_size_matched_dpo.yaml": DpoArguments,
    "teacher/qwen3_14b/single_size_matched_sft.yaml": SftArguments,
    "teacher/sft_data/mpcot.yaml": SftDataArguments,
    "teacher/sft_data/progressive_1.yaml": SftDataArguments,
    "teacher/sft_data/progressive_2.yaml": SftDataArguments,
    "teacher/sft_data/progressive_3.yaml": SftDataArguments,
    "teacher/sft_data/single.yaml": SftDataArguments,
    "teacher/sft_data/single_size_matched.yaml": SftDataArguments,
    "tiny/bazaar.yaml": BazaarArguments,
    "tiny/bench.yaml": BenchArguments,
    "tiny/dataset.yaml": PackageArguments,
    "tiny/embed.yaml": EmbedArguments,
    "tiny/evaluate.yaml": RunArguments,
    "tiny/matrix.yaml": BenchArguments,
    "tiny/probe.yaml": ProbeArguments,
    "tiny/item_cached.yaml": DistillArguments,
    "tiny/rationales.yaml": BuildArguments,
    "tiny/ensemble_member.yaml": DistillArguments,
    "tiny/rival_ced_kd.yaml": DistillArguments,
    "tiny/rival_crsd.yaml": DistillArguments,
    "tiny/rival_mkd.yaml": DistillArguments,
    "tiny/student.yaml": DistillArguments,
    "tiny/student_perspectives.yaml": DistillArguments,
    "tiny/targets.yaml": TargetsArguments,
    "tiny/teacher_evaluate.yaml": EvaluateArguments,
    "tiny/teacher_generate.yaml": GenerateArguments,
    "tiny/teacher_base.yaml": TinyArguments,
    "tiny/teacher_dpo.yaml": DpoArguments,
    "tiny/teacher_preferences.yaml": PreferencesArguments,
    "tiny/teacher_pretrain.yaml": PretrainArguments,
    "tiny/teacher_progressive_1.yaml": SftArguments,
    "tiny/teacher_progressive_2.yaml": SftArguments,
    "tiny/teacher_progressive_3.yaml": SftArguments,
    "tiny/teacher_progressive_data_1.yaml": SftDataArguments,
    "tiny/teacher_progressive_data_2.yaml": SftDataArguments,
    "tiny/teacher_progressive_data_3.yaml": SftDataArguments,
    "tiny/teacher_sft.yaml": SftArguments,
    "tiny/teacher_sft_data.yaml": SftDataArguments,
}
# What a recipe may leave to the command line.
GIVEN_LATER = {
    "source": ["x"],
    "completions": ["x"],
    **dict.fromkeys(("output", "model", "pairs", "rationales", "repo_id"), "x"),
}


def test_no_recipe_is_forgotten():
    found = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert {name for name in found if not name.startswith("accelerate/")} == set(VERBS)


@pytest.mark.parametrize("name", VERBS)
def test_a_recipe_parses(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    verb = VERBS[name]
    values = read_yaml(verb, CONFIGS / name)
    missing = {
        key: value for key, value in GIVEN_LATER.items() if key in verb.__dataclass_fields__ and key not in values
    }
    arguments = build(verb, {**values, **missing}, name)
    if verb is BenchArguments:
        assert plan(arguments)
    assert yaml.safe_load((CONFIGS / name).read_text())


def test_the_paper_recipe_has_the_papers_values():
    recipe = read_yaml(DistillArguments, CONFIGS / "student" / "paper_esci.yaml")
    paper = {"batch_size": 256, "learning_rate": 2e-6, "epochs": 5, "max_length": 128, "guidance_weight": 0.1}
    assert {name: float(recipe[name]) for name in paper} == paper


@pytest.mark.parametrize("rival", ["ced_kd", "mkd", "mkd_scores", "crsd", "lrkd_combined", "ensemble_member"])
def test_a_rival_has_the_settings_of_the_students_it_is_compared_with(rival):
    own = {"rationales", "output", "extractor_type", "perspectives"}
    shared = read_yaml(DistillArguments, CONFIGS / "student" / "esci_minilm.yaml")
    recipe = read_yaml(DistillArguments, CONFIGS / "student" / "rivals" / f"{rival}.yaml")
    shared, recipe = (build(DistillArguments, values, rival) for values in (shared, recipe))
    for name in DistillArguments.__dataclass_fields__:
        if name not in own and not name.startswith("rival"):
            assert getattr(recipe, name) == getattr(shared, name), name


def test_the_paper_teacher_samples_as_the_paper_does():
    recipe = read_yaml(GenerateArguments, CONFIGS / "teacher" / "generate_qwen3_14b.yaml")
    paper = {"model": "Qwen/Qwen3-14B", "samples": 5, "temperature": 0.7, "top_p": 0.99, "top_k": 50}
    assert {name: recipe[name] for name in paper} == paper


def test_the_tiny_recipes_run(tmp_path):
    """In another folder than the checkout's, so that what they write stays there."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "modeling_lrkd").symlink_to(ROOT / "modeling_lrkd")
    (tmp_path / "hub_cards").symlink_to(ROOT / "hub_cards")
    for command in (
        "recipes.data.bazaar --config recipes/configs/tiny/bazaar.yaml --output runs/tiny/bazaar",
        "recipes.teacher.scripted --pairs runs/tiny/bazaar --output runs/tiny/completions.parquet",
        "recipes.teacher.evaluate --config recipes/configs/tiny/teacher_evaluate.yaml",
        "recipes.rationales.build --config recipes/configs/tiny/rationales.yaml",
        "recipes.rationales.embed --config recipes/configs/tiny/embed.yaml",
        "recipes.rationales.build --config recipes/configs/publish/bazaar_rationales.yaml --pairs runs/tiny/bazaar "
        "--completions runs/tiny/completions.parquet --output runs/tiny/all_rationales.parquet",
        "recipes.rationales.embed --config recipes/configs/tiny/embed.yaml "
        "--rationales runs/tiny/all_rationales.parquet --output runs/tiny/all_rationales_embedded.parquet",
        "recipes.publish.package --config recipes/configs/tiny/dataset.yaml",
        "recipes.student.distill --config recipes/configs/tiny/student.yaml",
        "recipes.student.distill --config recipes/configs/tiny/student_perspectives.yaml",
        "recipes.rationales.targets --config recipes/configs/tiny/targets.yaml",
        "recipes.rationales.probe --config recipes/configs/tiny/probe.yaml",
        "recipes.student.distill --config recipes/configs/tiny/item_cached.yaml",
        "recipes.serve.encode_products --model runs/tiny/item_cached --products runs/tiny/bazaar/test.parquet "
        "--output runs/tiny/store",
        "recipes.evaluate.run --config recipes/configs/tiny/evaluate.yaml",
        "recipes.student.bench --config recipes/configs/tiny/bench.yaml",
    ):
        result = subprocess.run(
            [sys.executable, "-m", *command.split()], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stderr[-3000:]}"
    assert "lrkd-gat" in result.stdout
    matrix = [sys.executable, "-m", "recipes.student.bench", "--config", "recipes/configs/tiny/matrix.yaml"]
    result = subprocess.run(matrix, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr[-3000:]  # one of its systems is made to fail
    assert "3 of 5 runs are finished already." in result.stdout
    assert "- broken-0: runs/tiny/nowhere.parquet: no such file" in result.stdout
    for written in (
        "student/model.safetensors",
        "student_perspectives/training.json",
        "probe/probe.png",
        "store/store.json",
        "evaluation/metrics.json",
        "bench/comparison/plot.png",
        "teacher_evaluation/metrics.json",
        "dataset/README.md",
    ):
        assert (tmp_path / "runs" / "tiny" / written).is_file()


def test_the_papers_teacher_has_the_papers_values():
    folder = CONFIGS / "teacher" / "qwen3_14b"
    sft = {"epochs": 3, "batch_size": 8, "gradient_accumulation_steps": 1, "max_length": 3072, "learning_rate": 5e-5}
    dpo = {"epochs": 3, "batch_size": 1, "gradient_accumulation_steps": 16, "learning_rate": 5e-6, "warmup_ratio": 0.1}
    for path in folder.glob("*.yaml"):
        paper = sft if VERBS[f"teacher/qwen3_14b/{path.name}"] is SftArguments else dpo
        recipe = read_yaml(VERBS[f"teacher/qwen3_14b/{path.name}"], path)
        if "pretrain" not in path.name:
            assert {name: float(recipe[name]) for name in paper} == paper, path
            assert recipe["lr_scheduler"] == "cosine"


def test_every_teacher_recipe_reads_what_another_writes():
    """Data and adapters are named by hand in many files: none may point to what no recipe makes."""
    recipes = {name: yaml.safe_load((CONFIGS / name).read_text()) for name in VERBS if name.startswith("teacher/")}
    written = {recipe["output"] for recipe in recipes.values() if "output" in recipe}
    written |= {"runs/esci_full/pairs/train.parquet", "runs/bazaar_teacher/preferences_validation.parquet"}
    for name, recipe in recipes.items():
        if VERBS[name] not in (SftArguments, DpoArguments, PretrainArguments, TinyArguments):
            continue
        for key in ("data", "adapter", "validation"):
            assert recipe.get(key) is None or recipe[key] in written, f"{name}: {key}"
