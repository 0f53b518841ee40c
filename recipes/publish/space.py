"""The Space: the app of `space/`, told which students of the Hub it offers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recipes.arguments import UserError
from recipes.publish.folder import check_repo_id, to_json
from recipes.publish.sources import require

if TYPE_CHECKING:
    from recipes.publish.package import Files, PackageArguments

SOURCE = Path(__file__).parents[2] / "space"
SETTINGS = "space.json"  # what the app reads


def package_space(arguments: PackageArguments) -> Files:
    """Collect the app; models go into the front matter, which preloads them, and into `space.json`.

    Raises:
        UserError: No model is given, an id is none, or the app lacks a file or its front matter.
    """
    from huggingface_hub import SpaceCard

    if not arguments.models:
        raise UserError("--models: a Space needs the Hub id of at least one student, e.g. --models ORG/lrkd-gat.")
    ids = [model.partition("@")[0] for model in arguments.models]
    for model in ids:
        check_repo_id(model)
    source = SOURCE if arguments.source is None else Path(arguments.source)
    if not source.is_dir():
        raise UserError(f"--source {source}: no such folder. Pass that of the app, with app.py and README.md.")
    files: dict[str, Path | bytes] = {
        path.relative_to(source).as_posix(): path
        for path in sorted(source.rglob("*"))
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(source).parts)
    }
    readme = require(source / "README.md", "the checkout")
    card = SpaceCard(readme.read_text(encoding="utf-8"))
    if not isinstance(card.data.get("sdk"), str):
        raise UserError(f"{readme}: its front matter lacks 'sdk', so the Hub would not know what to run.")
    require(source / card.data.get("app_file", "app.py"), "the checkout")
    card.data["models"] = ids
    # Only the newest revision can be preloaded whole.
    card.data["preload_from_hub"] = [model for model in arguments.models if "@" not in model] or None
    return {**files, "README.md": str(card).encode(), SETTINGS: to_json({"models": list(arguments.models)})}
