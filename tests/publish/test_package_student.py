import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from recipes.arguments import UserError
from recipes.evaluate.adjust import AdjustArguments, adjust
from recipes.evaluate.run import RunArguments, evaluate
from recipes.publish.package import PackageArguments, collect, main, package
from recipes.record import sha256
from tests.packaging import edit_json, make_student, run_snippets, score, snippets, write_statement

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "README.md",
    "config.json",
    "configuration_lrkd.py",
    "extractors_lrkd.py",
    "figures/confusion.png",
    "metrics.json",
    "model.safetensors",
    "modeling_lrkd.py",
    "separation_lrkd.py",
    "tokenizer.json",
    "tokenizer_config.json",
}
# What parallel work on this project adds to a student.
MAY_COME = {"bank_lrkd.py", "pipeline_lrkd.py", "handler.py", "requirements.txt", "perspectives.safetensors"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def workspace(trained, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(trained, tmp_path / "workspace")


def options(workspace, **changes):
    given = {
        "kind": "student",
        "source": str(workspace / "student"),
        "evaluation": str(workspace / "student" / "evaluation-test"),
        "facts": str(workspace / "facts.yaml"),
        "repo_id": "shop/lrkd-shoes",
        "output": str(workspace / "publish" / "student"),
    }
    return PackageArguments(**{**given, **changes})


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_is_what_is_uploaded_and_the_record_says_so(workspace):
    record = json.loads(package(options(workspace)).read_text())
    output = workspace / "publish" / "student"
    found = tree(output)
    assert EXPECTED <= set(found) <= EXPECTED | MAY_COME
    assert {name: record[name] for name in ("kind", "repo_type", "repo_id")} == {
        "kind": "student",
        "repo_type": "model",
        "repo_id": "shop/lrkd-shoes",
    }
    assert record["files"] == {name: sha256(output / name) for name in sorted(found)}
    assert sorted(path.name for path in output.parent.iterdir()) == ["student", "student.package.json"]
    # Nothing of this machine.
    for name, content in found.items():
        assert str(workspace).encode() not in content, name
        assert b"/encoder" not in content, name
    metrics = json.loads(found["metrics.json"])
    assert (metrics["facts"]["model"], metrics["facts"]["pairs"]) == ("shop/lrkd-shoes", "test.parquet")


def test_packaging_twice_gives_the_same_bytes(workspace):
    package(options(workspace))
    first = tree(workspace / "publish")
    package(options(workspace))
    assert tree(workspace / "publish") == first


def test_the_dry_run_lists_and_writes_nothing(workspace, monkeypatch, capsys):
    given = vars(options(workspace))
    flags = [f"--{name}={given[name]}" for name in ("kind", "source", "evaluation", "facts", "repo_id", "output")]
    monkeypatch.setattr(sys, "argv", ["package", *flags, "--dry_run"])
    before = tree(workspace)
    main()
    assert tree(workspace) == before
    listed = dict(reversed(line.split()) for line in capsys.readouterr().out.splitlines()[:-2])
    assert {name: int(size.replace(",", "")) for name, size in listed.items()} == {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in collect(options(workspace)).items()
    }


def test_the_card_states_what_the_runs_recorded(workspace):
    card = ModelCard(collect(options(workspace))["README.md"].decode())
    metrics = json.loads((workspace / "student" / "evaluation-test" / "metrics.json").read_text())
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-classification", "apache-2.0")
    assert (data.base_model, data.base_model_relation) == ("shop/tiny-encoder", "finetune")
    assert (data.language, data.datasets, data.model_name) == (["en"], ["shop/shoes"], "lrkd-shoes")
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {
        hub: round(metrics["overall"][name], 4)
        for hub, name in (("accuracy", "accuracy"), ("f1", "macro_f1"), ("ndcg", "ndcg"), ("ece", "ece"))
    }
    low, high = (100 * end for end in metrics["intervals"]["overall"]["accuracy"])
    assert f"{100 * metrics['overall']['accuracy']:.1f} [{low:.1f}, {high:.1f}]" in card.text
    training = json.loads((workspace / "student" / "training.json").read_text())
    assert training["encoder_sha256"] == sha256(workspace / "encoder" / "model.safetensors")
    for fact in (
        training["encoder_sha256"],
        training["data_sha256"]["train.parquet"],
        metrics["facts"]["pairs_sha256"],
        training["environment"]["code_commit"],
        training["environment"]["cpu"],
        f"{training['parameters']:,}",
        "It knows four titles.",
        "Laces are accessories.",
        "@misc{shoes}",
        "![Confusion matrix",
    ):
        assert fact in card.text
    assert "not guided by a language model" in card.text


def test_the_card_of_an_adjusted_student_says_so(workspace):
    adjusted = workspace / "adjusted"
    arguments = json.loads((workspace / "student" / "training.json").read_text())["arguments"]
    adjust(
        AdjustArguments(
            model=str(workspace / "student"), pairs=arguments["pairs"], labels=arguments["labels"], output=str(adjusted)
        )
    )
    evaluation = adjusted / "evaluation-test"
    evaluate(
        RunArguments(
            model=str(adjusted),
            pairs=arguments["pairs"],
            labels=arguments["labels"],
            output=str(evaluation),
            device="cpu",
        )
    )
    card = collect(options(workspace, source=str(adjusted), evaluation=str(evaluation)))["README.md"].decode()
    assert "It decides by balanced error" in card
    assert "τ = 1.0" in card


def test_the_cards_code_runs_in_a_clean_process(workspace, tmp_path):
    package(options(workspace))
    folder = workspace / "publish" / "student"
    # One process for all: importing torch and sentence-transformers is what takes the time.
    codes = snippets((folder / "README.md").read_text())
    assert len(codes) >= 3
    assert sum("lrkd-relevance" in code for code in codes) == (folder / "pipeline_lrkd.py").exists()
    assert all('"shop/lrkd-shoes"' in code for code in codes)
    printed = run_snippets([code.replace('"shop/lrkd-shoes"', json.dumps(str(folder))) for code in codes], tmp_path)
    for code, output in zip(codes, printed, strict=True):
        wanted = "red shoe" if "products = [" in code else "Substitute"
        assert wanted in output, f"{code}\n{output}"


def test_calibration_and_onnx_travel_where_they_were_made(workspace):
    student = workspace / "student"
    (student / "calibration.json").write_text('{"temperature": 1.5}')
    (student / "onnx").mkdir()
    (student / "onnx" / "model.onnx").write_bytes(b"onnx")
    (student / "checkpoints").mkdir()
    (student / "checkpoints" / "optimizer.pt").write_bytes(b"")
    files = collect(options(workspace))
    assert set(files) - MAY_COME == EXPECTED | {"calibration.json", "onnx/model.onnx"}
    assert "`onnx/model.onnx`" in files["README.md"].decode()
    assert "`calibration.json`" in files["README.md"].decode()
    assert "expected calibration error on test is" not in files["README.md"].decode()  # nobody recorded one

    record = {
        "method": "vector",
        "confidence": 0.95,
        "facts": {"weights_sha256": sha256(student / "model.safetensors")},
        "splits": {
            "validation": {"boundaries": [{"threshold": 0.1234, "target": 0.02, "relevant_below": 0.0123}]},
            "test": {
                "before": {"ece": 0.333},
                "after": {"ece": 0.089},
                "boundaries": [{"relevant_below": 0.0353}],
            },
        },
    }
    (student / "calibration.json").write_text(json.dumps(record))
    for name in ("rationale_bank.safetensors", "rationale_bank.txt"):
        (student / name).write_bytes(b"bank")
    files = collect(options(workspace))
    assert {"rationale_bank.safetensors", "rationale_bank.txt"} < set(files)
    card = files["README.md"].decode()
    for fact in ("vector scaling", "33.3 % before", "8.9 % after", "0.1234", "2.00 %", "1.23 %", "3.53 %"):
        assert fact in card
    record["facts"]["weights_sha256"] = "0"
    (student / "calibration.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="was fitted for other weights"):
        collect(options(workspace))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("student/config.json", r"config\.json: no such file. recipes\.student\.distill writes it"),
        ("student/model.safetensors", r"model\.safetensors: no such file"),
        ("student/training.json", r"training\.json: no such file"),
        ("student/modeling_lrkd.py", r"modeling_lrkd\.py: no such file"),
        ("student/extractors_lrkd.py", r"extractors_lrkd\.py: no such file"),
        ("student/tokenizer.json", r"no vocabulary"),
        ("student/evaluation-test/metrics.json", r"metrics\.json: no such file. recipes\.evaluate\.run"),
        ("facts.yaml", r"facts\.yaml: no such file"),
    ],
)
def test_a_file_that_is_missing(workspace, missing, message):
    (workspace / missing).unlink()
    with pytest.raises(UserError, match=message):
        package(options(workspace))
    assert not (workspace / "publish").exists()


@pytest.mark.parametrize(
    ("file", "fact"),
    [
        ("training.json", "environment.code_commit"),
        ("training.json", "environment.cpu"),
        ("training.json", "encoder_sha256"),
        ("training.json", "train_seconds"),
        ("training.json", "data_sha256"),
        ("config.json", "label_gains"),
        ("evaluation-test/metrics.json", "facts.weights_sha256"),
        ("evaluation-test/metrics.json", "intervals.overall"),
        ("evaluation-test/metrics.json", "facts.pairs_sha256"),
    ],
)
def test_a_fact_that_no_run_recorded(workspace, file, fact):
    *outer, last = fact.split(".")

    def forget(content):
        for key in outer:
            content = content[key]
        del content[last]

    edit_json(workspace / "student" / file, forget)
    with pytest.raises(UserError, match=rf"{file}.*lacks '.*{last}'.*recipes\.\w+\.(distill|run).* records it"):
        package(options(workspace))


def test_an_evaluation_of_another_model(workspace):
    other = bytearray((workspace / "student" / "model.safetensors").read_bytes())
    other[-1] ^= 1
    (workspace / "student" / "model.safetensors").write_bytes(other)
    with pytest.raises(UserError, match=r"metrics\.json: is of other weights .*python -m recipes\.evaluate\.run"):
        package(options(workspace))
    score(workspace)
    package(options(workspace))


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/home/someone/models/bert", "_name_or_path"),
        ("C:\\Users\\someone\\bert", "_name_or_path"),
        ("~/bert", "_name_or_path"),
        ("file:///srv/bert", "_name_or_path"),
    ],
)
def test_a_path_of_this_machine(workspace, path, place):
    edit_json(workspace / "student" / "config.json", lambda it: it["encoder_config"].update({place: path}))
    with pytest.raises(UserError, match=rf"config\.json: encoder_config\.{place} is .*a path of this machine"):
        package(options(workspace))
    edit_json(workspace / "student" / "config.json", lambda it: it["encoder_config"].pop(place))
    edit_json(workspace / "student" / "tokenizer_config.json", lambda it: it.update(vocab_file=path))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: vocab_file is"):
        package(options(workspace))


def test_an_access_token_is_never_packaged(workspace):
    token = "hf_" + "aB3" * 12
    write_statement(workspace / "facts.yaml", intended_use=f"Use {token}.")
    with pytest.raises(UserError, match=r"README\.md: holds what looks like an access token") as caught:
        package(options(workspace))
    assert token not in str(caught.value)


def test_what_a_person_has_to_state(workspace):
    with pytest.raises(UserError, match=r"--facts: a student needs it. Copy recipes/configs/publish"):
        package(options(workspace, facts=None))
    for changes, message in (
        ({"license": None}, r"lacks license, which no run can know"),
        ({"licence": "mit"}, r"unknown key 'licence'. Did you mean 'license'"),
        ({"languages": ["jp"]}, r"'jp' is no ISO 639 code.*Did you mean 'ja'"),
        ({"languages": "en"}, r"languages"),
        ({"limits": []}, r"'limits' is empty"),
        ({"citation": "  "}, r"'citation' is empty"),
        ({"example_products": ["one"]}, r"'example_products': expected two"),
        ({"dataset_id": "shoes"}, r"'dataset_id': 'shoes' is no Hub id"),
        ({"code_url": "javascript:alert(1)"}, r"'code_url'.*is no https address"),
        ({"base_model": None}, r"'encoder' was a local folder. Write its Hub id: base_model"),
    ):
        write_statement(workspace / "facts.yaml", **changes)
        with pytest.raises(UserError, match=message):
            package(options(workspace))


def test_a_base_model_that_the_record_contradicts(workspace):
    edit_json(workspace / "student" / "training.json", lambda it: it.update(encoder="org/other"))
    with pytest.raises(UserError, match=r"base_model is 'shop/tiny-encoder', but .* records 'org/other'"):
        package(options(workspace))


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "shop/bad name", "shop/a--b", "../x"])
def test_names_that_the_hub_refuses(workspace, repo_id):
    with pytest.raises(UserError, match="--repo_id"):
        package(options(workspace, repo_id=repo_id))


def test_an_output_that_is_no_package_is_left_alone(workspace):
    output = workspace / "publish" / "student"
    output.mkdir(parents=True)
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a package, so it is left alone"):
        package(options(workspace))
    assert tree(output) == {"thesis.tex": b"years of work"}
    with pytest.raises(UserError, match="exists and is not a package"):
        package(options(workspace, output=str(workspace / "facts.yaml")))


def test_a_file_that_was_put_into_a_package_is_not_deleted(workspace):
    package(options(workspace))
    mine = workspace / "publish" / "student" / "notes.md"
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"notes\.md: is not of the package"):
        package(options(workspace))
    assert mine.read_text() == "mine"


def test_killed_at_any_moment_nothing_is_half_made(workspace):
    """Kill packaging again and again, later each time, until one call is through."""
    package(options(workspace))
    first = tree(workspace / "publish" / "student")
    edit_json(workspace / "student" / "config.json", lambda it: it.update(architectures=["Newer"]))
    second = {name: c if isinstance(c, bytes) else c.read_bytes() for name, c in collect(options(workspace)).items()}
    assert first != second
    # Each step of the writing asks whether it is the one before which the process dies.
    fragile = """
import itertools, os, pathlib, shutil, signal, sys
last, steps = int(sys.argv.pop(1)), itertools.count(1)
for where, name in ((shutil, "copyfile"), (pathlib.Path, "replace"), (pathlib.Path, "write_bytes")):
    def step(*args, call=getattr(where, name), **kwargs):
        if next(steps) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    setattr(where, name, step)
from recipes.publish.package import main
main()
"""
    given = vars(options(workspace))
    flags = [f"--{name}={given[name]}" for name in ("kind", "source", "evaluation", "facts", "repo_id", "output")]
    output = workspace / "publish" / "student"
    seen = []
    # Before the first file; before the old folder is moved away; before the new one takes its place; and, that place
    # being empty now, before the record.
    for last in (1, len(second) + 1, len(second) + 3, len(second) + 1):
        result = subprocess.run([sys.executable, "-c", fragile, str(last), *flags], cwd=ROOT, check=False)
        assert result.returncode == -signal.SIGKILL
        found = tree(output) if output.exists() else None
        assert found in (None, first, second)
        seen.append("none" if found is None else "old" if found == first else "new")
        if found is not None:
            digests = json.loads((output.parent / "student.package.json").read_text())["files"]
            assert digests == {name: sha256(output / name) for name in sorted(found)}
    assert seen == ["old", "old", "none", "none"]
    package(options(workspace))
    assert tree(output) == second
    assert sorted(path.name for path in output.parent.iterdir()) == ["student", "student.package.json"]


def test_a_disk_that_refuses_keeps_the_old_package(workspace):
    package(options(workspace))
    first = tree(workspace / "publish")
    edit_json(workspace / "student" / "config.json", lambda it: it.update(architectures=["Newer"]))
    given = vars(options(workspace))
    flags = [f"--{name}={given[name]}" for name in ("kind", "source", "evaluation", "facts", "repo_id", "output")]
    limited = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); "
        "from recipes.arguments import run; from recipes.publish.package import main; run(main)"
    )
    result = subprocess.run(
        [sys.executable, "-c", limited, *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert re.search(r"error: .*could not be written \(.*File too large.*Free space", result.stderr)
    assert "Traceback" not in result.stderr
    assert tree(workspace / "publish") == first


def test_an_audit_by_brand_is_stated_and_one_of_other_weights_refused(workspace):
    evaluation = workspace / "student" / "evaluation-test"
    entry = {"value": 0.125, "interval": [0.1, 0.2], "rows": 400, "queries": 40}
    report = {
        "weights_sha256": sha256(workspace / "student" / "model.safetensors"), "split": "test",
        "filtered": "predicted Irrelevant", "filtered_wrongly": entry,
        "swaps": {"tried": 300, "pairs": 120, "change": entry, "absolute_change": entry, "decision_flips": entry},
        "brands": {"Acme|x": {"value": 0.5, "p_holm": 0.01}, "Zed": {"value": 0.1, "p_holm": 0.9}},
        "third_party": {"difference": {**entry, "queries": 3}},
    }  # fmt: skip
    (evaluation / "bias.json").write_text(json.dumps(report))
    card = collect(options(workspace))["README.md"].decode()
    assert "## Audit by brand" in card
    assert "Of the relevant products 12.5 [10.0, 20.0] %" in card
    assert "300 swaps of the brand in 120 titles" in card
    assert "2 brands had enough relevant products" in card
    assert "Acme\\|x (50.0 % filtered) differs." in card
    assert "by 12.5 points" in card  # three queries: no interval
    (evaluation / "bias.json").write_text(json.dumps({**report, "brands": {}, "swaps": None, "third_party": None}))
    assert "No brand had enough" in collect(options(workspace))["README.md"].decode()
    (evaluation / "bias.json").write_text(json.dumps({**report, "weights_sha256": "0" * 64}))
    with pytest.raises(UserError, match="is of other weights"):
        collect(options(workspace))
