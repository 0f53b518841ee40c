"""A packaged folder on its way to the Hub, over HTTP: what arrives, what is refused, and what goes wrong between."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.arguments import UserError
from recipes.publish.packaged import PackagedFile, PackagedFolder
from recipes.publish.remote import compare
from tests.publish.conftest import README, seal

ROOT = Path(__file__).parents[2]
WEIGHTS = bytes(range(256)) * 400
FILES = {"model.safetensors": WEIGHTS, "config.json": b"{}", "plots/one.png": b"\x89PNG\0" * 9}
MODEL = ("models", "shop/student")


def on_the_hub(hub, kind="models", repo_id="shop/student", revision="main"):
    files = hub.files(kind, repo_id, revision)
    assert files.pop(".gitattributes")
    return files


def in_the_folder(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def writes(hub):
    """The requests that change something, but for the checks of the client."""
    asked = [request for request in hub.requests if not request.startswith(("GET", "HEAD"))]
    return [request for request in asked if not re.search("preupload|validate-yaml|objects/batch", request)]


@pytest.mark.parametrize(("repo_type", "kind"), [("model", "adapter"), ("dataset", "dataset"), ("space", "metric")])
def test_what_is_pushed_is_the_folder_in_one_private_commit(repo_type, kind, hub, package, push_to, capsys):
    readme = README.replace("license", "sdk: gradio\nlicense")
    folder = package(FILES, repo_type, kind, readme=readme)
    commit = push_to(folder, tag=["v1", "latest"])
    where = (f"{repo_type}s", "shop/student")
    assert on_the_hub(hub, *where) == in_the_folder(folder)
    assert [c.title for c in hub.commits(*where)] == [f"Push {kind}", "initial commit"]
    repository = hub.repositories[where]
    assert repository.private
    assert repository.tags == {"v1": commit, "latest": commit}
    said = capsys.readouterr().out
    assert "model.safetensors" in said
    assert f"Private: {hub.url}/{'' if repo_type == 'model' else repo_type + 's/'}shop/student" in said


def test_pushing_twice_makes_no_commit(hub, package, push_to, capsys):
    folder = package(FILES)
    first = push_to(folder, tag=["v1"])
    before = len(writes(hub))
    assert push_to(folder, tag=["v1"]) == first
    assert "Nothing has changed" in capsys.readouterr().out
    assert writes(hub)[before:] == ["POST /api/models/shop/student/tag/" + first]  # it stands already
    assert push_to(folder, tag=["v2"]) == first
    assert hub.repositories[MODEL].tags == {"v1": first, "v2": first}
    assert len(hub.commits(*MODEL)) == 2


def test_what_left_the_folder_leaves_the_hub_and_only_changes_are_sent(hub, package, push_to):
    folder = package(FILES)
    push_to(folder)
    (folder / "plots" / "one.png").unlink()
    (folder / "config.json").write_bytes(b'{"a": 1}')
    seal(folder)
    uploads = [request for request in hub.requests if request.startswith("PUT /storage")]
    push_to(folder)
    assert on_the_hub(hub) == in_the_folder(folder)
    assert len(hub.commits(*MODEL)) == 3
    assert [request for request in hub.requests if request.startswith("PUT /storage")] == uploads


def test_a_branch_is_made_and_main_stays(hub, package, push_to):
    folder = package(FILES)
    first = push_to(folder)
    (folder / "config.json").write_bytes(b'{"a": 1}')
    candidate = push_to(seal(folder), revision="candidate/1", tag=["v2"])
    repository = hub.repositories[MODEL]
    assert repository.branches == {"main": first, "candidate/1": candidate}
    assert repository.tags == {"v2": candidate}
    assert on_the_hub(hub, revision="candidate/1") == in_the_folder(folder)
    assert push_to(folder, revision="candidate/1") == candidate


def test_visibility_is_left_alone_unless_asked_for(hub, package, push_to, capsys):
    folder = package()
    push_to(folder, public=True)
    repository = hub.repositories[MODEL]
    assert not repository.private
    push_to(folder)
    assert not repository.private
    assert "Public, as it was" in capsys.readouterr().out
    push_to(folder, private=True)
    assert repository.private
    # A new repository becomes public only after the commit.
    asked = writes(hub)
    assert asked.index("PUT /api/models/shop/student/settings") > asked.index(
        "POST /api/models/shop/student/commit/main"
    )


def test_a_dry_run_writes_nothing(hub, package, push_to, capsys):
    folder = package(FILES)
    assert push_to(folder, dry_run=True) is None
    said = capsys.readouterr().out
    assert "shop/student (new)" in said
    assert "+ plots/one.png" in said
    assert hub.repositories == {}
    push_to(folder)
    (folder / "plots" / "one.png").unlink()
    (folder / "config.json").write_bytes(b'{"a": 1}')
    before = writes(hub)
    push_to(seal(folder), dry_run=True, revision="next")
    said = capsys.readouterr().out
    assert "branch next (new)" in said
    assert "~ config.json" in said
    assert "- plots/one.png" in said
    assert writes(hub) == before


def test_a_collection(hub, package, push_to, capsys):
    folder = package()
    for _ in range(2):
        push_to(folder, collection="Search, all of it")
    (collection,) = hub.collections.values()
    assert (collection["title"], collection["private"]) == ("Search, all of it", True)
    assert [(item["type"], item["id"]) for item in collection["items"]] == [("model", "shop/student")]
    hub.fault("POST /api/collections", status=403)
    push_to(folder, collection="Another")
    assert "The push itself is done." in capsys.readouterr().out


def test_the_folder_must_be_what_was_packaged(hub, package, push_to, tmp_path):
    folder = package(FILES)
    outside = tmp_path / "secret.txt"
    outside.write_text("not to be seen")

    def refused(match):
        with pytest.raises(UserError, match=match):
            push_to(folder)

    for name in (".DS_Store", ".cache/huggingface/x.lock", "plots/new.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
        refused(f"{re.escape(name)}: was not packaged")
        (folder / name).unlink()
    (folder / "link.txt").symlink_to(outside)
    refused("link.txt: is a link that leads out of the folder")
    (folder / "link.txt").unlink()
    (folder / "more").symlink_to(tmp_path)
    refused("more: is a link that leads out of the folder")
    (folder / "more").unlink()
    (folder / "config.json").write_bytes(b"[]")
    refused("config.json: has changed since it was packaged. Package it again")
    (folder / "config.json").unlink()
    refused("config.json: was packaged and is missing")
    os.mkfifo(folder / "config.json")
    refused("config.json: is not a regular file")
    (folder / "config.json").unlink()
    (folder / ".cache" / "lock").write_bytes(b"")
    seal(folder)
    refused("lock: the Hub takes no files under .cache or .git")
    (folder / ".cache" / "lock").unlink()
    (folder / "README.md").unlink()
    seal(folder)
    refused("has no README.md")
    (folder / "README.md").write_text("no metadata")
    seal(folder)
    refused("README.md: has no metadata")
    (folder / "README.md").write_text("---\na: [\n---\n")
    seal(folder)
    refused("README.md: its metadata is not YAML")
    (tmp_path / "student.package.json").write_text("{}")
    refused("student.package.json: not the record of a packaged folder")
    (tmp_path / "student.package.json").unlink()
    refused("was not packaged .student.package.json is not beside it")
    folder = tmp_path / "nowhere"
    refused("nowhere: no such folder")
    assert hub.requests == []


def test_a_token_is_never_pushed(hub, package, push_to, capsys):
    token = hub.token()
    for content in (b"x" * 1_048_570 + token.encode(), b"key = hf_" + b"a1" * 17, rb"a card: hf\_" + b"a1" * 17):
        with pytest.raises(UserError, match=r"notes[.]txt: holds what looks like an access token") as caught:
            push_to(package({"notes.txt": content}), token=token)
        assert token not in str(caught.value)
    assert hub.requests == []
    push_to(package({"notes.txt": b"hf_hub_download, hf_" + b"x" * 10}, name="other"), token=token)
    assert token not in capsys.readouterr().out


def test_who_may_not_push(hub, package, push_to):
    folder = package(FILES)

    def refused(match, **options):
        with pytest.raises(UserError, match=match):
            push_to(folder, **options)

    refused("Could not sign in: the Hub answers 401.*token is not valid", token="hf_" + "x" * 34)
    refused("token of maria is read-only", token=hub.token(role="read"))
    refused("belongs to rival, and maria may push to maria, shop only", repo_id="rival/student")
    for name in ("student", "a/b/c", "shop/a b", "shop/--"):
        refused("expected owner/name", repo_id=name)
    refused("is packaged for a model repository", repo_type="dataset")
    refused("choose one of them", public=True, private=True)
    assert writes(hub) == []
    assert hub.repositories == {}
    # A member of the organisation who may only read, which the Hub knows and the token does not say.
    push_to(folder)
    hub.fault("GET .*/auth-check/write", status=403, times=9)
    refused("answers 403.*use one with write access")


def test_the_name_that_it_is_packaged_for(hub, package, push_to, tmp_path):
    folder = package(FILES)
    with pytest.raises(UserError, match="--repo_id: expected the repository"):
        push_to(folder, repo_id=None)
    record = tmp_path / "student.package.json"
    record.write_text(record.read_text().replace("{", '{"repo_id": "shop/other", ', 1))
    with pytest.raises(UserError, match="student is packaged for shop/other, which its card names"):
        push_to(folder)
    push_to(folder, repo_id=None)
    assert on_the_hub(hub, repo_id="shop/other") == in_the_folder(folder)


def test_a_name_of_another_type(hub, package, push_to):
    push_to(package(FILES))
    pairs = package({"train.parquet": b"PAR1"}, "dataset", "dataset", name="pairs")
    with pytest.raises(UserError, match="shop/student: is a model already, and this folder is for a dataset"):
        push_to(pairs)
    push_to(pairs, share_name=True)
    push_to(pairs)
    assert on_the_hub(hub, "datasets") == in_the_folder(pairs)


def test_branches_and_tags_that_cannot_be(hub, package, push_to):
    folder = package(FILES)
    first = push_to(folder, tag=["v1"])
    asked = writes(hub)

    def refused(match, **options):
        with pytest.raises(UserError, match=match):
            push_to(folder, **options)

    refused("--revision v1: is a tag", revision="v1")
    refused("--revision .*: is a tag or a commit", revision=first)
    refused("--tag main: is a branch", tag=["main"])
    (folder / "config.json").write_bytes(b"[]")
    seal(folder)
    refused(f"--tag v1: stands for commit {first[:7]}", tag=["v1"])
    assert writes(hub) == asked


OIDS = st.sampled_from(["a", "b"])
PATHS = st.sampled_from(["README.md", "x", "y/z", ".gitattributes"])


@given(local=st.dictionaries(PATHS, OIDS), remote=st.dictionaries(PATHS, OIDS))
def test_the_changes_make_the_hubs_files_those_of_the_folder(local, remote):
    files = {path: PackagedFile(1, f"sha256 {oid}", oid) for path, oid in local.items()}
    changes = compare(PackagedFolder(Path("x"), None, "student", "model", files, {}), remote)
    kept = {path: oid for path, oid in remote.items() if path not in changes.delete}
    after = kept | {path: local[path] for path in [*changes.add, *changes.change]}
    assert {path: after[path] for path in local} == local
    assert after.keys() - local.keys() <= {".gitattributes"}
    assert bool(changes) == (after != remote)
    assert all(remote[path] != local[path] for path in changes.change)


# One phase of a push a line, as the request that fails.
PHASES = {
    "sign in": "GET /api/whoami-v2",
    "read shop/student": "GET /api/models/shop/student",
    "create the repository": "POST /api/repos/create",
    "create the branch next": "POST .*/branch/next",
    "upload the folder": "POST .*/commit/next",
    "create the tag v1": "POST .*/tag/.*",
    "change the visibility": "PUT .*/settings",
}


@pytest.mark.parametrize("fault", [{"status": 502}, {"delay": 30}], ids=["failing", "silent"])
def test_a_failure_in_each_phase_is_one_error_and_the_next_push_finishes(fault, hub, package, push_to):
    for number, (phase, request) in enumerate(PHASES.items()):
        folder = package(FILES | {"number.txt": b"%d" % number})
        hub.repositories.clear()
        if "read" in phase:
            push_to(package(name="first"))
        options = {"revision": "next", "tag": ["v1"], "public": True}
        failing = hub.fault(request, times=99, **fault)
        with pytest.raises(UserError, match=f"Could not {phase}: .*run the same command again"):
            push_to(seal(folder), attempts=1, timeout=0.5 if "delay" in fault else 60, **options)
        failing.times = 0
        commit = push_to(folder, **options)
        repository = hub.repositories[MODEL]
        assert on_the_hub(hub, revision="next") == in_the_folder(folder)
        assert len([c for c in hub.commits(*MODEL, "next") if c.title == "Push student"]) <= 2
        assert repository.tags == {"v1": commit}
        assert not repository.private


def test_large_files_are_sent_once_whatever_happens(hub, package, push_to):
    folder = package(FILES)
    failing = hub.fault("PUT /storage/.*", times=99, status=503)
    with pytest.raises(UserError, match="Could not upload the folder: the Hub answers 503"):
        push_to(folder, attempts=1)
    failing.times = 0
    hub.fault("POST .*/preupload/main", status=500)
    hub.fault("POST .*/validate-yaml", status=502)
    hub.fault("POST .*/objects/batch", delay=30)
    hub.fault("PUT /storage/.*", lost=True)
    # The Hub makes the commit, and the answer is lost: the commit is found, not made again.
    hub.fault("POST .*/commit/main", lost=True)
    push_to(folder, timeout=1.0)
    assert on_the_hub(hub) == in_the_folder(folder)
    assert [commit.title for commit in hub.commits(*MODEL)] == ["Push student", "initial commit"]


def test_a_commit_of_somebody_else_in_between(hub, package, push_to):
    folder = package(FILES)
    push_to(folder)
    (folder / "config.json").write_bytes(b"[]")
    repository, theirs = hub.repositories[MODEL], {}

    def meanwhile(request):
        files = repository.find().files
        theirs[request] = repository.add("main", files | {"theirs.txt": files["README.md"]}, "theirs", "eve")

    hub.fault("POST .*/preupload/main", call=meanwhile)
    push_to(seal(folder))
    assert theirs
    assert [commit.title for commit in hub.commits(*MODEL)][:2] == ["Push student", "theirs"]
    assert on_the_hub(hub) == in_the_folder(folder)


@pytest.fixture
def command(hub, tmp_path):
    """`python -m recipes.publish.push` in a process of its own."""

    def start(folder, token, *options, **environment):
        arguments = ["--folder", str(folder), "--repo_id", "shop/student", *options]
        return subprocess.Popen(
            [sys.executable, "-m", "recipes.publish.push", *arguments],
            env=hub.environment(tmp_path / "hf", token) | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def test_the_command_killed_in_an_upload_and_run_again(hub, package, command):
    token, folder = hub.token(), package(FILES)
    slow = hub.fault("POST .*/commit/main", delay=60)
    process = command(folder, token, "--tag", "v1", "v2")
    while slow.times:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.kill()
    said = process.communicate()[0]
    uploads = [request for request in hub.requests if request.startswith("PUT /storage")]
    assert len(uploads) == 2
    process = command(folder, token, "--tag", "v1", "v2")
    said += process.communicate()[0]
    assert process.returncode == 0, said
    assert [request for request in hub.requests if request.startswith("PUT /storage")] == uploads
    assert on_the_hub(hub) == in_the_folder(folder)
    assert set(hub.repositories[MODEL].tags) == {"v1", "v2"}
    assert len(hub.commits(*MODEL)) == 2
    assert "100%" in said  # a progress bar
    assert token not in said


def test_the_command_without_token_network_or_sense(hub, package, command):
    folder = package(FILES)
    expected = {
        "no token of the Hub: run `hf auth login`": command(folder, None),
        "Is there a network, .*The folder stands as it is": command(
            folder, hub.token(), "--attempts", "1", HF_ENDPOINT="http://127.0.0.1:9"
        ),
        "HF_HUB_OFFLINE is set": command(folder, hub.token(), HF_HUB_OFFLINE="1"),
    }
    for match, process in expected.items():
        said = process.communicate()[0]
        assert process.returncode == 2, said
        assert re.search(f"error: .*{match}", said)
        assert "Traceback" not in said
    dry = command(folder, None, "--dry_run")
    said = dry.communicate()[0]
    assert dry.returncode == 0, said
    assert "README.md" in said
    assert "nothing was pushed. Without a token" in said
    assert hub.requests == []
