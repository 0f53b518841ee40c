import json
import shutil

import pytest
from huggingface_hub import ModelCard

from recipes.arguments import UserError
from recipes.publish.package import PackageArguments, collect, package
from tests.packaging import edit_json, make_adapter, run_snippets, snippets, write_statement


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def workspace(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "workspace")


def options(workspace, **changes):
    given = {
        "kind": "adapter",
        "source": str(workspace / "adapter"),
        "evaluation": str(workspace / "evaluation"),
        "facts": str(workspace / "facts.yaml"),
        "messages": str(workspace / "messages.json"),
        "repo_id": "shop/teacher",
        "output": str(workspace / "publish" / "adapter"),
    }
    return PackageArguments(**{**given, **changes})


def test_what_travels_and_what_the_card_says(workspace):
    files = collect(options(workspace))
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "metrics.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("shop/tiny-qwen", 40 * "1")
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        assert str(workspace).encode() not in data, name
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert (card.data.base_model, card.data.base_model_relation) == ("shop/tiny-qwen", "adapter")
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "accuracy": 0.5,
        "f1": 0.25,
    }
    assert r"| user\_intent | 40 | 25.0 [15.0, 35.0] | 12.5 [2.5, 22.5] |" in card.text
    assert "| `data` | `sft.parquet` |" in card.text
    assert "| target modules | q\\_proj, v\\_proj |" in card.text


def test_the_cards_code_runs_in_a_clean_process(workspace, tmp_path):
    package(options(workspace))
    folder = workspace / "publish" / "adapter"
    (code,) = snippets((folder / "README.md").read_text())
    for name, stands_for in (
        ('"shop/teacher"', json.dumps(str(folder))),
        (f'"shop/tiny-qwen", revision="{40 * "1"}"', json.dumps(str(workspace / "base"))),
        ("max_new_tokens=512", "min_new_tokens=4, max_new_tokens=4"),
    ):
        assert name in code
        code = code.replace(name, stands_for)
    (printed,) = run_snippets([code], tmp_path)
    assert printed.strip()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "training.json"])
def test_a_file_that_is_missing(workspace, name):
    (workspace / "adapter" / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: no such file. recipes\.teacher\.sft or recipes\.teacher\.dpo"):
        collect(options(workspace))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("adapter/adapter_config.json", {"base_model_name_or_path": None}, "lacks 'base_model_name_or_path'"),
        ("adapter/training.json", {"base_model": None}, "lacks 'base_model'"),
        ("adapter/training.json", {"base_revision": None}, "lacks 'base_revision'"),
        ("adapter/training.json", {"base_model": "/srv/qwen"}, "was a local folder. Write its Hub id: base_model"),
        ("adapter/training.json", {"base_model": "org/other"}, "the base is 'shop/tiny-qwen', but .*'org/other'"),
        ("adapter/training.json", {"train_seconds": None}, "lacks 'train_seconds'"),
        ("evaluation/metrics.json", {"facts": {"adapter_sha256": 64 * "9"}}, "is of other weights"),
        ("evaluation/metrics.json", {"facts": {}}, r"lacks 'facts\.adapter_sha256'.*recipes\.teacher\.evaluate"),
        ("evaluation/metrics.json", {"overall": {"pairs": 3}}, r"lacks 'overall\.perspectives'"),
        (
            "evaluation/metrics.json",
            {"overall": {"pairs": 3, "perspectives": {"unified": {}}}},
            r"lacks 'overall\.perspectives\.unified\.accuracy\.value'",
        ),
    ],
)
def test_a_record_that_lacks_or_contradicts(workspace, file, change, message):
    edit_json(workspace / file, lambda it: it.update(change))
    with pytest.raises(UserError, match=message):
        collect(options(workspace))


def test_a_base_that_was_a_local_folder_goes_by_the_id_that_a_person_states(workspace):
    edit_json(workspace / "adapter" / "training.json", lambda it: it.update(base_model="/srv/qwen"))
    edit_json(workspace / "adapter" / "adapter_config.json", lambda it: it.update(base_model_name_or_path="/srv/qwen"))
    write_statement(workspace / "facts.yaml", base_model="shop/tiny-qwen")
    files = collect(options(workspace))
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "shop/tiny-qwen"


def test_messages_that_are_none(workspace):
    with pytest.raises(UserError, match="--messages: an adapter needs it"):
        collect(options(workspace, messages=None))
    for text, message in (("[", "not readable JSON"), ('{"role": "user"}', "expected "), ("[]", "expected ")):
        (workspace / "messages.json").write_text(text)
        with pytest.raises(UserError, match=rf"messages\.json: {message}"):
            collect(options(workspace))
