"""Everything that is published, over HTTP: packaged, pushed, and used by strangers who have nothing but the Hub."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gradio_client import Client
from huggingface_hub import HfApi
from transformers import pipeline

from recipes.publish.package import PackageArguments, package
from recipes.publish.push import PushArguments, push
from tests.hub_server import serve
from tests.packaging import (
    edit_json,
    make_adapter,
    make_rationales,
    make_student,
    run_snippets,
    snippets,
    write_statement,
)
from tests.publish.conftest import README, online, seal
from tests.space.visiting import serve as serve_space

BAZAAR = Path(__file__).parents[2] / "recipes" / "configs" / "publish" / "facts_bazaar_dataset.yaml"
# Kind -> where it goes. The student stays private.
REPOSITORIES = {
    "student": ("models", "shop/student"),
    "adapter": ("models", "shop/teacher"),
    "dataset": ("datasets", "shop/bazaar"),
    "metric": ("spaces", "shop/lrkd_relevance"),
    "space": ("spaces", "shop/relevance"),
}
REQUEST = {"query": "red shoe", "products": ["blue shoe", {"title": "red shoe wide", "product_id": "B7"}, "shoe lace"]}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hub that holds one of each kind, and `folders`: kind -> the package."""
    folder = tmp_path_factory.mktemp("everything")
    student, adapter, data = (folder / name for name in ("student", "adapter", "data"))
    for path in (student, adapter, data):
        path.mkdir()
    make_student(student)
    make_adapter(adapter)
    make_rationales(data)
    (adapter / "base" / "README.md").write_text(README)
    write_statement(folder / "facts.yaml")
    given = {
        "student": {
            "source": student / "student",
            "evaluation": student / "student" / "evaluation-test",
            "facts": student / "facts.yaml",
        },
        "adapter": {
            "source": adapter / "adapter",
            "evaluation": adapter / "evaluation",
            "messages": adapter / "messages.json",
            "facts": adapter / "facts.yaml",
        },
        "dataset": {"source": data / "bazaar", "facts": BAZAAR, "labels": "aliexpress6"},
        "metric": {"facts": folder / "facts.yaml"},
        "space": {},
    }
    lists = {
        "dataset": {"completions": [str(data / "completions.parquet")], "rationales": [str(data / "embedded.parquet")]},
        "space": {"models": ["shop/student@v1"]},
    }
    with serve() as hub, pytest.MonkeyPatch.context() as patch, online(patch):
        hub.owner = hub.token()
        hub.folders = {}
        api = HfApi(hub.url, hub.owner)
        push(PushArguments(folder=str(seal(adapter / "base")), repo_id="shop/tiny-qwen", public=True), api)
        base = hub.commits("models", "shop/tiny-qwen")[0].id
        edit_json(adapter / "adapter" / "training.json", lambda record: record.update(base_revision=base))
        for kind, (_, repo_id) in REPOSITORIES.items():
            paths = {name: str(value) for name, value in given[kind].items()}
            output = folder / "publish" / kind
            package(PackageArguments(kind=kind, repo_id=repo_id, output=str(output), **paths, **lists.get(kind, {})))
            hub.folders[kind] = output
            push_package(hub, kind)
        yield hub


def push_package(hub, kind):
    folder, repo_id = hub.folders[kind], REPOSITORIES[kind][1]
    options = PushArguments(folder=str(folder), repo_id=repo_id, public=kind != "student", tag=["v1"])
    push(options, HfApi(hub.url, hub.owner))


@pytest.mark.parametrize("kind", REPOSITORIES)
def test_what_was_packaged_is_on_the_hub_in_one_commit(published, monkeypatch, kind):
    repository = REPOSITORIES[kind]
    record = json.loads(published.folders[kind].with_name(f"{kind}.package.json").read_text())
    assert set(published.files(*repository)) - {".gitattributes"} == set(record["files"])
    assert published.repositories[repository].private == (kind == "student")
    before = published.commits(*repository)
    assert len(before) == 2  # the Hub's own first one, and the push
    with online(monkeypatch):
        push_package(published, kind)  # nothing has changed
    assert published.commits(*repository) == before


@pytest.mark.parametrize(
    ("kind", "printed"),
    [
        ("student", [r"torch\.Size\(\[1, 16\]\)", r"'corpus_id': \d", r"^1 "]),
        ("adapter", []),  # a random model: that it says nothing readable is no fault
        ("dataset", [r" -> \w", r"\(\d{2,}, \d+\)"]),
        ("metric", [r"'accuracy': 0\.666"]),
    ],
)
def test_the_cards_code_runs_as_it_stands(published, tmp_path, kind, printed):
    """Every snippet of the card, in a process that has the Hub's libraries, an empty cache and none of our packages."""
    card = published.files(*REPOSITORIES[kind])["README.md"].decode()
    codes = snippets(card)
    assert codes
    results = run_snippets(codes, tmp_path, published.environment(tmp_path / "hf", published.owner))
    assert len(results) == len(codes)
    for pattern in printed:
        assert any(re.search(pattern, result, flags=re.MULTILINE) for result in results), (pattern, results)


RANK = """
import json, sys
from huggingface_hub import snapshot_download
from sentence_transformers import CrossEncoder
from transformers import pipeline
request = json.loads(sys.argv[1])
titles = [p if isinstance(p, str) else p["title"] for p in request["products"]]
pinned = {"trust_remote_code": True, "revision": "v1"}
rank = pipeline("lrkd-relevance", model="shop/student", **pinned)
encoder = CrossEncoder("shop/student", config_kwargs={"ranking_view": True}, **pinned)
sys.path.insert(0, snapshot_download("shop/student"))  # as an Inference Endpoint has it
from handler import EndpointHandler
found = {
    "ranked": rank(request),
    "by_rank": [[hit["corpus_id"], float(hit["score"])] for hit in encoder.rank(request["query"], titles)],
    "endpoint": EndpointHandler(sys.path[0])({"inputs": request}),
}
print("FOUND" + json.dumps(found))
"""


def test_the_private_student_ranks_for_its_owner_as_its_folder_does(published, tmp_path):
    expected = pipeline("lrkd-relevance", model=str(published.folders["student"]), trust_remote_code=True)(REQUEST)
    done = subprocess.run(
        [sys.executable, "-c", RANK, json.dumps(REQUEST)],
        cwd=tmp_path,
        env=published.environment(tmp_path / "hf", published.owner),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("FOUND")[1])
    for ranked in (found["ranked"], found["endpoint"]):
        assert [hit["title"] for hit in ranked] == [hit["title"] for hit in expected]
        assert [hit["score"] for hit in ranked] == pytest.approx([hit["score"] for hit in expected], abs=1e-5)
    assert [hit.get("product_id") for hit in found["ranked"]] == [hit.get("product_id") for hit in expected]
    assert [index for index, _ in found["by_rank"]] == [hit["index"] for hit in expected]
    assert [score for _, score in found["by_rank"]] == pytest.approx([hit["score"] for hit in expected], abs=1e-5)


def test_the_space_shows_the_student_of_the_hub(published, tmp_path):
    """Its files, pulled from its repository, run as the Hub runs them; the student comes from the Hub, too."""
    source = tmp_path / "pulled"
    for path, content in published.files(*REPOSITORIES["space"]).items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(content)
    environment = published.environment(tmp_path / "hf", published.owner)
    expected = pipeline("lrkd-relevance", model=str(published.folders["student"]), trust_remote_code=True)(REQUEST)
    with serve_space([], tmp_path / "space", source, environment) as address:
        client = Client(address, verbose=False)
        titles = [product if isinstance(product, str) else product["title"] for product in REQUEST["products"]]
        ranked = client.predict(REQUEST["query"], titles, api_name="/rank")
    assert [hit["title"] for hit in ranked] == [hit["title"] for hit in expected]
    assert [hit["score"] for hit in ranked] == pytest.approx([hit["score"] for hit in expected], abs=1e-5)
