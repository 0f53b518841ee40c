"""Push a packaged folder to the Hub, in one commit.

    hf auth login                                  # or HF_TOKEN; a token with write access
    python -m recipes.publish.push --folder runs/publish/student --repo_id shop/relevance --dry_run
    python -m recipes.publish.push --folder runs/publish/student --repo_id shop/relevance --tag v1
    python -m recipes.publish.push --folder runs/publish/student --repo_id shop/relevance --revision candidate
    python -m recipes.publish.push --folder runs/publish/student --repo_id shop/relevance --public --collection Search

Reads: a folder of `recipes.publish.package` and `<folder>.package.json` beside it. Afterwards the repository's branch
holds the files of the folder and no others (the Hub's own .gitattributes stays). A new repository is private unless
`--public`; an existing one stays what it is unless `--public` or `--private` is said. A push that changes nothing makes
no commit, and one that was interrupted is finished by the next.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from json import JSONDecodeError
from typing import TYPE_CHECKING, Literal

from recipes.arguments import UserError, parse, run
from recipes.publish.hub import SETTINGS, Hub, set_timeout
from recipes.publish.packaged import PackagedFolder, read_packaged
from recipes.publish.remote import Changes, Remote, check_access, check_name, compare, look, read_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass
class PushArguments:
    """What `recipes.publish.push` can be told."""

    folder: str = field(metadata={"help": "Folder that recipes.publish.package made."})
    repo_id: str | None = field(
        default=None,
        metadata={"help": "Repository, owner/name; created if need be. By default what it is packaged for."},
    )
    repo_type: Literal["model", "dataset", "space"] | None = field(
        default=None, metadata={"help": "The package's own type by default; another one is an error."}
    )
    revision: str = field(default="main", metadata={"help": "Branch to push to; it is created, from main, if need be."})
    tag: list[str] = field(default_factory=list, metadata={"help": "Tags for what was pushed. Tags are never moved."})
    public: bool = field(default=False, metadata={"help": "Make the repository public, once all is pushed."})
    private: bool = field(default=False, metadata={"help": "Make the repository private; a new one is so by default."})
    collection: str | None = field(
        default=None, metadata={"help": "Title of a collection of the owner, created if need be, to put it into."}
    )
    share_name: bool = field(
        default=False, metadata={"help": "Allow a name that a repository of another type has already."}
    )
    message: str | None = field(default=None, metadata={"help": "First line of the commit's message."})
    dry_run: bool = field(default=False, metadata={"help": "Show what would be done, and do nothing."})
    attempts: int = field(default=3, metadata={"help": "Attempts at a call that fails for a reason that may pass."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds without any answer that make a call fail."})


def push(arguments: PushArguments, api: HfApi | None = None) -> str | None:
    """Push a folder.

    Args:
        arguments: What to push, and where.
        api: The client; by default that of HF_ENDPOINT and the saved token.

    Returns:
        The commit that the branch is at in the end; None if a dry run finds no repository, or has no token.

    Raises:
        UserError: The folder is not what was packaged, the account may not push there, or the Hub fails for good.
    """
    from huggingface_hub import HfApi, get_token

    api = api or HfApi()
    token = api.token or get_token()
    package = read_packaged(arguments.folder, [token] if token else [])
    if arguments.repo_type not in (None, package.repo_type):
        raise UserError(
            f"--repo_type {arguments.repo_type}: {arguments.folder} is packaged for a {package.repo_type} repository "
            f"({package.kind}). Leave the option out."
        )
    repo_id = arguments.repo_id or package.repo_id
    if repo_id is None:
        raise UserError("--repo_id: expected the repository to push to, owner/name.")
    if package.repo_id not in (None, repo_id):
        raise UserError(
            f"--repo_id {repo_id}: {arguments.folder} is packaged for {package.repo_id}, which its card names. Leave "
            "the option out, or package it again for the other name."
        )
    if arguments.public and arguments.private:
        raise UserError("--public and --private: choose one of them, or neither.")
    if package.repo_type == "space" and "sdk" not in package.card:
        raise UserError(f"{package.path / 'README.md'}: a Space needs `sdk:` in its metadata. Package it again.")
    for path, file in package.files.items():
        print(f"{file.size:>13,}  {path}")
    if not token and arguments.dry_run:
        print("Dry run: nothing was pushed. Without a token of the Hub (`hf auth login`) it says no more than that.")
        return None
    if not token:
        raise UserError(f"no token of the Hub: run `hf auth login`, or set HF_TOKEN to one of {SETTINGS}.")
    set_timeout(arguments.timeout)
    hub = Hub(api, repo_id, package.repo_type, arguments.attempts)
    check_access(hub)
    before = look(hub, arguments.revision)
    if not before.exists and not arguments.share_name:
        check_name(hub)
    changes = compare(package, before.files)
    check_refs(before, arguments, changes)
    if arguments.dry_run:
        _show(repo_id, arguments.revision, before, changes)
        return before.head
    return _push(hub, arguments, package, before)


def check_refs(before: Remote, arguments: PushArguments, changes: Changes) -> None:
    """Check branch and tags before anything is uploaded.

    Raises:
        UserError: `--revision` is no branch, or a tag stands for something else already.
    """
    if arguments.revision in before.tags or re.fullmatch("[0-9a-f]{40}", arguments.revision):
        raise UserError(f"--revision {arguments.revision}: is a tag or a commit; expected a branch.")
    for tag in arguments.tag:
        if tag in (*before.branches, arguments.revision):
            raise UserError(f"--tag {tag}: is a branch. Choose another name.")
        if tag in before.tags and (changes or before.tags[tag] != before.head):
            raise UserError(
                f"--tag {tag}: stands for commit {before.tags[tag][:7]}, and tags are not moved. Choose another."
            )


def _show(repo_id: str, revision: str, before: Remote, changes: Changes) -> None:
    """Say what a push would do."""
    branch = revision + ("" if revision in before.branches else " (new)")
    print(f"To {repo_id}{'' if before.exists else ' (new)'}, branch {branch}:")
    for sign, paths in (("+", changes.add), ("~", changes.change), ("-", changes.delete)):
        print("".join(f"  {sign} {path}\n" for path in paths), end="")
    print("Dry run: nothing was pushed." if changes else "Nothing to push. Dry run.")


def _push(hub: Hub, arguments: PushArguments, package: PackagedFolder, before: Remote) -> str:
    api, where, branch = hub.api, {"repo_id": hub.repo_id, "repo_type": hub.repo_type}, arguments.revision
    if not before.exists:
        # Private until all of it is there, even if it is to be public.
        space = {"space_sdk": package.card["sdk"]} if hub.repo_type == "space" else {}
        hub.do("create the repository", lambda: api.create_repo(**where, **space, private=True, exist_ok=True))
    if branch not in before.branches:
        hub.do(f"create the branch {branch}", lambda: api.create_branch(**where, branch=branch, exist_ok=True))
    commit = hub.do("upload the folder", lambda: _commit(hub, arguments, package))
    print(f"Commit {commit[:7]}." if commit != before.head else f"Nothing has changed since {commit[:7]}: no commit.")
    for tag in arguments.tag:
        tagged = {"tag": tag, "revision": commit, "exist_ok": True}
        hub.do(f"create the tag {tag}", lambda tagged=tagged: api.create_tag(**where, **tagged))
    asked = arguments.public or arguments.private
    private = arguments.private if asked else before.private
    if private != before.private:
        hub.do("change the visibility", lambda: api.update_repo_settings(**where, private=private))
    if arguments.collection:
        _collect(hub, arguments.collection, private)
    left_alone = ", as it was" if before.exists and not asked else ""
    folder = "" if hub.repo_type == "model" else f"{hub.repo_type}s/"
    print(f"{'Private' if private else 'Public'}{left_alone}: {api.endpoint}/{folder}{hub.repo_id}")
    print(f"Next: hf download {hub.repo_id} --repo-type {hub.repo_type} --revision {(arguments.tag or [branch])[0]}")
    return commit


def _commit(hub: Hub, arguments: PushArguments, package: PackagedFolder) -> str:
    """Make the branch hold the folder's files, and return its commit. May be done again after a failure."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    where = {"repo_id": hub.repo_id, "repo_type": hub.repo_type, "revision": arguments.revision}
    made = False
    while True:
        head = hub.api.repo_info(**where).sha
        changes = compare(package, read_files(hub, head))
        if not changes:
            return head
        if made:
            left = ", ".join([*changes.add, *changes.change, *changes.delete][:5])
            raise UserError(f"{hub.repo_id}: the Hub took the commit, but without {left}. Push again.")
        operations = [
            *(CommitOperationAdd(path, str(package.path / path)) for path in [*changes.add, *changes.change]),
            *(CommitOperationDelete(path) for path in changes.delete),
        ]
        message = arguments.message or f"Push {package.kind}"
        try:
            hub.api.create_commit(**where, operations=operations, commit_message=message, parent_commit=head)
        except ValueError as error:
            if isinstance(error, HfHubHTTPError | JSONDecodeError):
                raise
            # What the Hub says of the card, before anything is uploaded.
            raise UserError(f"{package.path / 'README.md'}: {' '.join(str(error).split())}") from None
        made = True


def _collect(hub: Hub, title: str, private: bool) -> None:
    """Put the repository into a collection; if the Hub does not allow it, the push stands."""
    owner = hub.repo_id.split("/")[0]

    def collect() -> str:
        collection = hub.api.create_collection(title, namespace=owner, private=private, exists_ok=True)
        hub.api.add_collection_item(collection.slug, hub.repo_id, hub.repo_type, exists_ok=True)
        return str(collection.url)

    try:
        print(f"In the collection {hub.do('put it into the collection', collect)}")
    except UserError as error:
        print(f"{error} The push itself is done.")


def main() -> None:
    """Push what the command line names."""
    push(parse(PushArguments, __doc__))


if __name__ == "__main__":
    run(main)
