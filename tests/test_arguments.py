"""The strict command line: what it accepts, and one clear error for what it does not."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.arguments import UserError, build, parse, read_yaml, run, to_dict


@dataclass
class Arguments:
    """A verb with a field of each kind."""

    name: str = field(metadata={"help": "Its name."})
    size: int = field(default=3, metadata={"help": "Its size."})
    rate: float = field(default=0.5, metadata={"help": "Its rate."})
    limit: int | None = field(default=10, metadata={"help": "Its limit."})
    kind: Literal["good", "bad"] = field(default="good", metadata={"help": "Its kind."})
    flag: bool = field(default=True, metadata={"help": "Yes or no."})
    words: list[str] = field(default_factory=list, metadata={"help": "Some words."})


def write_yaml(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_then_file_then_command_line(tmp_path):
    path = write_yaml(tmp_path, "name: file\nsize: 7\nrate: 1e-4\nlimit: null\nflag: false\nwords: [a, b]\n")
    arguments = parse(Arguments, None, ["--config", path, "--size", "9"])
    assert arguments == Arguments("file", 9, 0.0001, None, "good", False, ["a", "b"])
    assert parse(
        Arguments, None, [f"--config={path}", "--name", "line", "--flag", "true", "--words", "c"]
    ) == Arguments("line", 7, 0.0001, None, "good", True, ["c"])
    assert to_dict(arguments)["limit"] is None


def test_an_integer_is_a_fine_float():
    assert parse(Arguments, None, ["--name", "x", "--rate", "1"]).rate == 1.0
    assert build(Arguments, {"name": "x", "rate": 1}, source="here").rate == 1.0


@given(st.floats(allow_nan=False))
def test_any_way_to_write_a_float(value):
    assert build(Arguments, {"name": "x", "rate": repr(value)}, source="here").rate == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae: x", r"unknown key 'nmae'\. Did you mean 'name'\?"),
        ("name: x\nzzzz: 1", r"unknown key 'zzzz'\. Known keys: name, size, rate"),
        ("name: x\n3: 1", r"unknown key 3\."),
        ("name: [", r"not valid YAML: [^\n]*$"),
        ("- name", "expected `key: value` lines, found a list"),
        ("just words", "expected `key: value` lines, found a str"),
        ("name: x\nsize: many", "size"),
        ("name: x\nsize: 1.5", "size"),
        ("name: x\nsize: true", "size"),
        ("name: x\nrate: fast", "rate"),
        ("name: x\nkind: ugly", "kind"),
        ("name: x\nwords: a", "words"),
        ("name: x\nsize: '7'", "size"),
        ("name: 3", "name"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    path = write_yaml(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        parse(Arguments, None, ["--config", path])
    assert path in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        parse(Arguments, None, ["--config", "nowhere.yaml"])
    with pytest.raises(UserError, match="not a readable UTF-8 text file"):
        read_yaml(Arguments, tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: niña".encode("latin-1"))
    with pytest.raises(UserError, match="not a readable UTF-8 text file"):
        read_yaml(Arguments, tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "argv",
    [
        [],  # --name is required
        ["--name", "x", "--sise", "3"],
        ["--name", "x", "--siz", "3"],  # no abbreviations
        ["--name", "x", "--conf", "nowhere.yaml"],
        ["--name", "x", "--kind", "ugly"],
        ["--name", "x", "--size", "many"],
    ],
)
def test_a_wrong_command_line_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as error:
        parse(Arguments, None, argv)
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_an_empty_file_changes_nothing(tmp_path):
    assert parse(Arguments, None, ["--config", write_yaml(tmp_path, ""), "--name", "x"]) == Arguments("x")


def test_a_user_error_is_one_line_and_other_errors_are_not_hidden(capsys):
    def wrong():
        raise UserError("a.csv: row 3 is broken")

    def defect():
        raise KeyError("x")

    with pytest.raises(SystemExit) as error:
        run(wrong)
    assert error.value.code == 2
    assert capsys.readouterr().err == "error: a.csv: row 3 is broken\n"
    with pytest.raises(KeyError):
        run(defect)


@pytest.mark.parametrize(
    "verb", ["recipes.data.prepare", "recipes.rationales.build", "recipes.rationales.embed", "recipes.teacher.evaluate"]
)
def test_help_needs_no_heavy_import(verb):
    command = [sys.executable, "-X", "importtime", "-m", verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"python -m {verb}" in done.stdout
    assert "--config" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "recipes.arguments" in imported
    assert imported.isdisjoint({"torch", "pandas", "pyarrow", "datasets", "sentence_transformers"})


@pytest.mark.parametrize(("missing", "status", "said"), [
    ("tenacity", 2, "error: tenacity is not installed. This step needs the extra 'publish': pip install -e"),
    ("recipes.publish.hub", 1, "ModuleNotFoundError"),
])  # fmt: skip
def test_a_library_that_is_not_installed_is_named_with_its_extra(tmp_path, missing, status, said):
    """A module of our own that is missing is our mistake, and keeps its traceback."""
    code = f"""
import runpy, sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Gone())
sys.argv = ["push", "--folder", {str(tmp_path / "student")!r}, "--repo_id", "shop/student"]
runpy.run_module("recipes.publish.push", run_name="__main__", alter_sys=True)
"""
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    digest = hashlib.sha256((folder / "README.md").read_bytes()).hexdigest()
    record = {"kind": "student", "repo_type": "model", "files": {"README.md": digest}}
    (tmp_path / "student.package.json").write_text(json.dumps(record))
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == status, result.stderr
    assert said in result.stderr
