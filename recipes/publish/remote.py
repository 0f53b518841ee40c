"""What is under a repository's name on the Hub, and what a push would change of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from recipes.arguments import UserError
from recipes.publish.hub import SETTINGS, Hub

if TYPE_CHECKING:
    from recipes.publish.packaged import PackagedFolder

OWN_FILES = {".gitattributes"}  # the Hub makes it


@dataclass(frozen=True)
class Remote:
    """A repository as it was found; the defaults are those of one that does not exist.

    Attributes:
        head: The commit of the branch that is pushed to, or of main where that branch is to be made.
        files: Path -> sha256 of an LFS file, git's id of another, at `head`.
    """

    exists: bool = False
    private: bool = True
    branches: tuple[str, ...] = ("main",)
    tags: dict[str, str] = field(default_factory=dict)
    head: str | None = None
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Changes:
    """Paths that a commit would add, change and delete; false if there are none."""

    add: list[str]
    change: list[str]
    delete: list[str]

    def __bool__(self) -> bool:
        return bool(self.add or self.change or self.delete)


def check_access(hub: Hub) -> None:
    """Check name and token, before anything is read or written under the name.

    Raises:
        UserError: The name is not `owner/name`, the token is not valid or read-only, or the owner is somebody else.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(hub.repo_id)
        owner, _ = hub.repo_id.split("/")
    except (HFValidationError, ValueError):
        raise UserError(f"--repo_id {hub.repo_id}: expected owner/name, in letters, digits, `-`, `_`, `.`.") from None
    user = hub.do("sign in", hub.api.whoami)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"the token of {user['name']} is read-only: make one with write access at {SETTINGS}.")
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if owner not in owners:
        raise UserError(
            f"--repo_id {hub.repo_id}: belongs to {owner}, and {user['name']} may push to {', '.join(owners)} only."
        )


def look(hub: Hub, revision: str) -> Remote:
    """Look at what is under the name already.

    Raises:
        UserError: The token may not write to it.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    where = {"repo_id": hub.repo_id, "repo_type": hub.repo_type}

    def read() -> Remote:
        try:
            info = hub.api.repo_info(**where)
        except RepositoryNotFoundError:
            return Remote()
        hub.api.auth_check(**where, write=True)
        refs = hub.api.list_repo_refs(**where)
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        head = branches.get(revision, branches["main"])
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        return Remote(True, info.private, tuple(branches), tags, head, read_files(hub, head))

    return hub.do(f"read {hub.repo_id}", read)


def check_name(hub: Hub) -> None:
    """Check that no repository of another type has the name.

    Raises:
        UserError: One has.
    """
    for other in ("model", "dataset", "space"):
        if other == hub.repo_type:
            continue
        if hub.do(f"look for a {other}", lambda other=other: hub.api.repo_exists(hub.repo_id, repo_type=other)):
            raise UserError(
                f"--repo_id {hub.repo_id}: is a {other} already, and this folder is for a {hub.repo_type}. Choose "
                "another name, or pass --share_name to use the name for both."
            )


def read_files(hub: Hub, commit: str) -> dict[str, str]:
    """Return path -> what identifies the content, of each file of a commit."""
    from huggingface_hub.hf_api import RepoFile

    tree = hub.api.list_repo_tree(hub.repo_id, repo_type=hub.repo_type, revision=commit, recursive=True)
    files = (entry for entry in tree if isinstance(entry, RepoFile))
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def compare(package: PackagedFolder, files: dict[str, str]) -> Changes:
    """Say what would make files of the Hub those of the folder."""
    there = [path for path in package.files if path in files]
    same = [path for path in there if files[path] in (package.files[path].sha256, package.files[path].git_oid)]
    return Changes(
        add=sorted(package.files.keys() - set(there)),
        change=sorted(set(there) - set(same)),
        delete=sorted(files.keys() - set(there) - OWN_FILES),
    )
