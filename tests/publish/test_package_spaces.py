"""Packages that are Spaces: the metric module, and the app."""

import json

import pytest
import yaml

from recipes.arguments import UserError
from recipes.publish import metric as metric_kind
from recipes.publish.package import PackageArguments, collect, package
from tests.packaging import run_snippets, snippets, write_statement


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture
def metric(tmp_path, monkeypatch):
    monkeypatch.setattr(metric_kind, "code_commit", lambda: 40 * "c")  # the tests also run where there is no git
    facts = write_statement(tmp_path / "facts.yaml")
    given = {"kind": "metric", "facts": str(facts), "repo_id": "shop/shoe_relevance"}

    def arguments(**changes):
        return PackageArguments(**{**given, "output": str(tmp_path / "publish" / "shoe_relevance"), **changes})

    return arguments


def test_the_metrics_card_is_that_of_an_evaluate_module_and_its_code_runs(metric, tmp_path):
    record = json.loads(package(metric()).read_text())
    folder = tmp_path / "publish" / "shoe_relevance"
    assert (record["kind"], record["repo_type"]) == ("metric", "space")
    assert sorted(record["files"]) == ["README.md", "index.html", "requirements.txt", "shoe_relevance.py"]
    card = (folder / "README.md").read_text()
    data = front_matter(card)
    assert (data["sdk"], data["app_file"], data["tags"]) == ("static", "index.html", ["evaluate", "metric"])
    assert len(data["short_description"]) <= 60
    assert "predictions: Class probabilities" in card
    assert 'evaluate.load("shop/shoe_relevance")' in (folder / "index.html").read_text()
    (code,) = snippets(card)
    (printed,) = run_snippets([code.replace('"shop/shoe_relevance"', json.dumps(str(folder)))], tmp_path)
    # Right: rows 0 and 1 of three. nDCG: 1 for "en cup", whose two pairs have gains 1 and 0; "en hat" has one pair.
    assert "'accuracy': 0.666" in printed
    assert "'ndcg': 1.0, 'ndcg_queries': 2" in printed


def test_a_metric_that_evaluate_could_not_import(metric, monkeypatch):
    with pytest.raises(UserError, match=r"evaluate imports shoe-relevance\.py; use letters, digits and _"):
        collect(metric(repo_id="shop/shoe-relevance"))
    with pytest.raises(UserError, match="--facts: a metric needs it"):
        collect(metric(facts=None))
    monkeypatch.setattr(metric_kind, "code_commit", lambda: None)
    with pytest.raises(UserError, match="lacks 'code_commit'"):
        collect(metric())


@pytest.fixture
def space(tmp_path):
    source = tmp_path / "space"
    (source / "__pycache__").mkdir(parents=True)
    (source / "__pycache__" / "app.pyc").write_bytes(b"")
    (source / ".secret").write_text("")
    (source / "app.py").write_text("print('hello')\n")
    (source / "README.md").write_text("---\ntitle: Shoes\nsdk: gradio\napp_file: app.py\n---\n\nHello.\n")

    def arguments(**changes):
        given = {"source": str(source), "models": ["shop/one", "shop/two@v1"], "output": str(tmp_path / "out")}
        return PackageArguments(kind="space", repo_id="shop/app", **{**given, **changes})

    arguments.source = source
    return arguments


def test_the_space_is_told_its_models(space):
    files = collect(space())
    assert sorted(files) == ["README.md", "app.py", "space.json"]
    assert json.loads(files["space.json"]) == {"models": ["shop/one", "shop/two@v1"]}
    text = files["README.md"].decode()
    assert front_matter(text) == {
        "title": "Shoes",
        "sdk": "gradio",
        "app_file": "app.py",
        "models": ["shop/one", "shop/two"],
        "preload_from_hub": ["shop/one"],
    }
    assert text.endswith("\nHello.\n")
    assert "preload_from_hub" not in front_matter(collect(space(models=["shop/two@v1"]))["README.md"].decode())


def test_a_space_that_cannot_be(space):
    with pytest.raises(UserError, match="--models: a Space needs the Hub id of at least one student"):
        collect(space(models=[]))
    with pytest.raises(UserError, match="expected owner/name"):
        collect(space(models=["student"]))
    (space.source / "app.py").unlink()
    with pytest.raises(UserError, match=r"app\.py: no such file"):
        collect(space())
    (space.source / "README.md").write_text("Hello.")
    with pytest.raises(UserError, match=r"README\.md: .*'sdk'"):
        collect(space())
    with pytest.raises(UserError, match="no such folder"):
        collect(space(source=str(space.source / "nowhere")))
