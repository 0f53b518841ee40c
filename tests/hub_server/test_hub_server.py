"""The test Hub answers real clients, each in a process of its own, as the Hub would."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import Repository, serve

WEIGHTS = bytes(range(256)) * 400  # 100 kB that are not text
README = b"---\nlicense: apache-2.0\ntags: [relevance]\npipeline_tag: text-classification\n---\n# A card\n"
FILES = {"README.md": README, "model.safetensors": WEIGHTS, "data/notes.txt": b"one\n", "empty.txt": b""}

IMPORTS = """
import json
from httpx2 import TimeoutException
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem
from huggingface_hub import get_session, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
api = HfApi()
"""


@pytest.fixture
def hub():
    with serve() as server:
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """Run code with `api`, an HfApi, in a process that knows this Hub only; return what it assigns to `found`."""

    def run(code, token=None, arguments=()):
        code = f"{IMPORTS}\n{code}\nprint('FOUND' + json.dumps(found))"
        environment = hub.environment(tmp_path / "hf", token)
        command = [sys.executable, "-c", code, json.dumps(arguments)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.split("FOUND")[1])

    return run


@pytest.fixture
def folder(tmp_path):
    for path, content in FILES.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(content)
    return tmp_path / "folder"


UPLOAD = """
found = {}
for repo_type in ("model", "dataset", "space"):
    where = {"repo_id": "shop/thing", "repo_type": repo_type}
    space = {"space_sdk": "gradio"} if repo_type == "space" else {}
    api.create_repo(**where, **space, private=True)
    try:
        api.create_repo(**where, **space)
    except HfHubHTTPError as error:
        found["again"] = error.response.status_code
    api.create_repo(**where, **space, exist_ok=True)
    first = api.upload_folder(folder_path="folder", **where).oid
    again = api.upload_folder(folder_path="folder", **where).oid
    api.create_tag(tag="v1", **where)
    api.create_branch(branch="next/one", **where)
    api.create_commit(operations=[CommitOperationDelete("data/")], commit_message="smaller", **where)
    refs = api.list_repo_refs(**where)
    found[repo_type] = {
        "same": first == again,
        "tree": {f.path: [f.blob_id, f.lfs and f.lfs.sha256, f.size] for f in
                 api.list_repo_tree("shop/thing", revision="v1", recursive=True, repo_type=repo_type)
                 if isinstance(f, RepoFile)},
        "titles": [c.title for c in api.list_repo_commits(**where)],
        "refs": {r.name: r.target_commit for r in [*refs.branches, *refs.tags]},
        "info": [i := api.repo_info(**where, files_metadata=True), i.sha, i.private, i.tags][1:],
        "paths": [f.path for f in api.get_paths_info("shop/thing", ["README.md", "none"], repo_type=repo_type)],
        "downloaded": open(hf_hub_download(**where, filename="model.safetensors", revision="v1"), "rb").read().hex(),
        "short": api.repo_info(**where, revision=first[:7]).sha == first,
    }
    try:
        operations = [CommitOperationAdd("x.txt", b"x")]
        api.create_commit(operations=operations, commit_message="late", parent_commit=first, **where)
    except HfHubHTTPError as error:
        found["conflict"] = error.response.status_code
"""


def test_the_life_of_a_repository(hub, client, folder):
    found = client(UPLOAD, hub.token())
    assert (found["again"], found["conflict"]) == (409, 412)
    git = shutil.which("git")
    for repo_type in ("model", "dataset", "space"):
        seen, repository = found[repo_type], hub.repositories[f"{repo_type}s", "shop/thing"]
        assert seen["same"]
        assert seen["short"]
        assert repository.private
        assert seen["titles"][0] == "smaller"
        assert seen["titles"] == [commit.title for commit in repository.log()]
        assert len(seen["titles"]) == 3  # the second upload made none
        assert hub.files(f"{repo_type}s", "shop/thing", "v1") == FILES | {
            ".gitattributes": hub.files(f"{repo_type}s", "shop/thing")[".gitattributes"]
        }
        assert "data/notes.txt" not in hub.files(f"{repo_type}s", "shop/thing")
        assert bytes.fromhex(seen["downloaded"]) == WEIGHTS
        tagged = repository.find("v1").id
        assert seen["refs"] == {"main": repository.commit, "next/one": tagged, "v1": tagged}
        assert seen["info"] == [repository.commit, True, ["relevance"]]
        assert seen["paths"] == ["README.md"]
        assert seen["tree"]["model.safetensors"][1:] == [hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS)]
        command = [git, "hash-object", str(folder / "README.md")]
        assert seen["tree"]["README.md"][0] == subprocess.check_output(command, text=True).strip()
    # Large files, and nothing else, went to the other origin, once each.
    assert sum(request.startswith("PUT /storage/") for request in hub.requests) == 3


ACCESS = """
import sys
found = {}
for token in json.loads(sys.argv[1]):
    api, found[token] = HfApi(token=token or False), {}
    operations = [CommitOperationAdd("x.txt", b"x")]
    for name, call in {
        "whoami": lambda: api.whoami(token or "hf_wrong"),
        "public": lambda: api.model_info("shop/open"),
        "private": lambda: api.model_info("shop/secret"),
        "missing": lambda: api.model_info("shop/none"),
        "download": lambda: api.hf_hub_download("shop/secret", "model.safetensors", local_dir=token or "nobody"),
        "revision": lambda: api.model_info("shop/open", revision="v9"),
        "file": lambda: api.hf_hub_download("shop/open", "none.txt"),
        "write": lambda: api.create_commit("shop/open", operations, commit_message="x"),
        "auth_check": lambda: api.auth_check("shop/open", write=True),
        "create": lambda: api.create_repo("shop/new"),
    }.items():
        try:
            call()
            found[token][name] = "done"
        except HfHubHTTPError as error:
            found[token][name] = f"{type(error).__name__} {error.response.status_code}"
"""


def test_what_each_token_may_do(hub, client):
    hub.repositories["models", "shop/secret"] = Repository(FILES, private=True)
    hub.repositories["models", "shop/open"] = Repository(FILES)
    owner, reader, stranger = hub.token(), hub.token(role="read"), hub.token("eve", organisations=())
    wrong, nobody = "hf_" + "x" * 34, ""
    found = client(ACCESS, arguments=[owner, reader, stranger, wrong, nobody])
    anybody = {"public": "done", "revision": "RevisionNotFoundError 404", "file": "RemoteEntryNotFoundError 404"}
    reads, writes = ("private", "download"), ("write", "auth_check", "create")

    def all_of(names, answer):
        return dict.fromkeys(names, answer)

    hidden, forbidden = "RepositoryNotFoundError 404", "HfHubHTTPError 403"
    known = anybody | {"whoami": "done", "missing": hidden}
    assert found[owner] == known | all_of([*reads, *writes], "done")
    assert found[reader] == known | all_of(reads, "done") | all_of(writes, forbidden)
    assert found[stranger] == known | all_of(reads, hidden) | all_of(writes, forbidden)
    assert found[wrong] == all_of(known | all_of([*reads, *writes], ""), "HfHubHTTPError 401")
    unauthorized = all_of(["whoami", *writes], "HfHubHTTPError 401")
    assert found[nobody] == anybody | unauthorized | all_of(["missing", *reads], "RepositoryNotFoundError 401")


FAULTS = """
found = {}
for name in ("cut", "failing", "failing", "corrupt", "corrupt"):
    try:
        path = hf_hub_download("shop/open", f"{name}.txt", force_download=name in found)
        found.setdefault(name, []).append(open(path, encoding="latin-1").read())
    except (OSError, ValueError) as error:
        found.setdefault(name, []).append(type(error).__name__)
for timeout in (0.2, 60):
    try:
        url = hf_hub_url("shop/open", "slow.txt")
        found.setdefault("slow", []).append(get_session().get(url, timeout=timeout).text)
    except TimeoutException as error:
        found["slow"] = [type(error).__name__]
"""


def test_faults_on_demand(hub, client):
    names = ("cut", "failing", "slow", "corrupt")
    hub.repositories["models", "shop/open"] = Repository({f"{name}.txt": name.encode() * 1000 for name in names})
    hub.fault("GET .*cut.txt", cut=1000)
    hub.fault("GET .*failing.txt", status=503)
    hub.fault("GET .*slow.txt", delay=60)
    hub.fault("GET .*corrupt.txt", corrupt=True)
    found = client(FAULTS)
    assert found == {
        "cut": ["cut" * 1000],  # the client asks for the rest
        "failing": ["HfHubHTTPError", "failing" * 1000],
        "slow": ["ReadTimeout", "slow" * 1000],
        # The client cannot know; who reads the file will.
        "corrupt": [bytes(255 - byte for byte in b"corrupt" * 1000).decode("latin-1"), "corrupt" * 1000],
    }
    assert hub.requests.count("GET /shop/open/resolve/main/cut.txt") == 2


def test_partial_reads_and_collections(hub, client):
    hub.repositories["datasets", "shop/open"] = Repository(FILES)
    code = """
files = HfFileSystem()
with files.open("datasets/shop/open/model.safetensors", block_size=1000) as file:
    file.seek(70_003)
    found = [file.read(4).hex()]
made = api.create_collection("All of it", namespace="shop", private=True)
again = api.create_collection("All of it", namespace="shop", exists_ok=True)
for _ in range(2):
    collection = api.add_collection_item(made.slug, "shop/open", "dataset", exists_ok=True)
found += [made.slug == again.slug, collection.private, [[i.item_id, i.item_type] for i in collection.items]]
"""
    assert client(code, hub.token()) == [WEIGHTS[70_003:70_007].hex(), True, True, [["shop/open", "dataset"]]]


def test_links_are_signed_and_take_no_token(hub):
    hub.repositories["models", "shop/open"] = Repository(FILES, private=True)
    path = f"/storage/models/shop/open/{hashlib.sha256(WEIGHTS).hexdigest()}"
    curl = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}"]

    def status(*arguments):
        return subprocess.check_output([*curl, *arguments], text=True)

    assert status(hub.link("GET", path)) == "200"
    assert status(hub.storage_url + path) == "403"
    assert status(hub.link("PUT", path)) == "403"
    assert status("-H", "Authorization: Bearer x", hub.link("GET", path)) == "400"


def test_export_is_a_git_folder(tmp_path):
    folder = Repository(FILES).export(tmp_path / "exported")
    listed = subprocess.check_output(["git", "ls-files"], cwd=folder, text=True).split()
    assert listed == sorted(FILES)
    assert Path(folder, "model.safetensors").read_bytes() == WEIGHTS
