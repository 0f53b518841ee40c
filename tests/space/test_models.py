"""Which models the Space offers, and what it says of one that it cannot load."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models import ModelError, Models, choose, load
from tests.space.visiting import SPACE

NOWHERE = Path("nowhere.json")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("LRKD_MODELS", raising=False)


def test_the_command_line_wins_over_the_environment_over_the_file(tmp_path, monkeypatch):
    settings = tmp_path / "space.json"
    settings.write_text(json.dumps({"models": ["org/file@v1"]}))
    assert choose([], settings) == ["org/file@v1"]
    monkeypatch.setenv("LRKD_MODELS", "org/one, org/two,")
    assert choose([], settings) == ["org/one", "org/two"]
    assert choose(["org/typed", "org/typed"], settings) == ["org/typed"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("runs/demo/students/lrkd-gat-0", "make demo"),
        ("./runs", "no such folder"),
        ("org/name/more", "not a name on the Hub"),
        ("<script>", "not a name on the Hub"),
    ],
)
def test_a_name_that_is_nothing_is_an_error(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=words):
        choose([name], NOWHERE)


def test_no_name_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(ModelError, match="No model is named"):
        choose([], NOWHERE)
    with pytest.raises(ModelError, match=r"without config\.json"):
        choose([str(tmp_path)], NOWHERE)


def test_only_the_named_models_are_loaded_and_each_once():
    asked = []
    models = Models(["org/one", "org/two"], lambda name: asked.append(name) or name.upper())
    assert (models[None], models["org/two"], models["org/one"]) == ("ORG/ONE", "ORG/TWO", "ORG/ONE")
    assert asked == ["org/one", "org/two"]
    with pytest.raises(ModelError, match="offers org/one, org/two"):
        models["org/evil"]


def test_labels_come_best_first(students):
    loaded = load(str(students[0]))
    assert loaded.labels == ["Exact", "Substitute", "Complement", "Irrelevant"]
    assert loaded.extractor == "gat"
    assert loaded.parameters > 0


def test_a_student_saved_before_there_was_a_pipeline_says_so(students, tmp_path):
    old = shutil.copytree(students[0], tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    del config["custom_pipelines"]
    (old / "config.json").write_text(json.dumps(config))
    # In a process of its own: here the package has registered the task for every model.
    code = f"from models import load; load({str(old)!r})"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=SPACE, env=environment, capture_output=True, text=True, check=False)
    assert "ModelError" in done.stderr
    assert "saved by an older version" in done.stderr


def test_a_damaged_or_absent_model_is_one_error(students, tmp_path):
    broken = shutil.copytree(students[0], tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="could not be loaded"):
        load(str(broken))
    with pytest.raises(ModelError, match="org/absent: could not be loaded"):
        load("org/absent")  # the tests are offline


def test_the_command_says_what_is_missing_before_anything_is_loaded(tmp_path):
    command = [sys.executable, str(SPACE / "app.py"), "--model", "runs/demo/students/lrkd-gat-0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: runs/demo")
    assert "make demo" in done.stderr
    assert "Traceback" not in done.stderr
