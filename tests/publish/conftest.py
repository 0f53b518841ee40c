"""Packaged folders made by hand, and the Hub that they are pushed to."""

import hashlib
import json
from contextlib import contextmanager

import pytest
from huggingface_hub import HfApi, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from recipes.publish import dataset, metric
from recipes.publish.push import PushArguments, push
from tests.hub_server import serve

README = "---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: text-classification\n---\n# A student\n"


@pytest.fixture(scope="session", autouse=True)
def a_commit():
    """The tests also run where there is no git; that a card refuses to be without a commit is tested by itself."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (dataset, metric):
            if module.code_commit() is None:
                patch.setattr(module, "code_commit", lambda: 40 * "0")
        yield


@pytest.fixture
def hub():
    with serve() as server:
        yield server


def seal(folder, repo_type="model", kind="student"):
    """Write the record that `recipes.publish.package` leaves beside its folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    record = {"kind": kind, "repo_type": repo_type, "files": files, "created_by": "a test"}
    folder.with_name(f"{folder.name}.package.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def package(tmp_path):
    """Make a sealed folder of README.md and `files`."""

    def make(files=None, repo_type="model", kind="student", name="student", readme=README):
        folder = tmp_path / name
        for path, content in {"README.md": readme.encode(), **(files or {})}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return seal(folder, repo_type, kind)

    return make


@contextmanager
def online(monkeypatch):
    """Let this process push, which the other tests keep offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    yield
    set_client_factory(default_client_factory)


@pytest.fixture
def push_to(hub, monkeypatch):
    """Push in this process, as somebody of the shop; the client is told where the Hub is, as HF_ENDPOINT would."""

    def run(folder, repo_id="shop/student", token=None, **options):
        token = token or hub.token()
        return push(PushArguments(folder=str(folder), repo_id=repo_id, **options), HfApi(hub.url, token))

    with online(monkeypatch):
        yield run
