"""What student and adapter share: their folders, tokenizer, base model, and metrics fit for others to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError

if TYPE_CHECKING:
    from hub_cards.facts import Statement
    from recipes.publish.package import PackageArguments

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
    "chat_template.jinja",
)


def folders(arguments: PackageArguments, trained_by: str, evaluated_by: str) -> tuple[Path, Path]:
    """Return the folders of `--source` and `--evaluation`.

    Raises:
        UserError: One is not given, or no folder.
    """
    found = []
    for option, value, maker in (
        ("source", arguments.source, trained_by),
        ("evaluation", arguments.evaluation, evaluated_by),
    ):
        if value is None:
            raise UserError(f"--{option}: a package of kind {arguments.kind} needs it; {maker} makes such a folder.")
        if not Path(value).is_dir():
            raise UserError(f"--{option} {value}: no such folder; {maker} makes it.")
        found.append(Path(value))
    return found[0], found[1]


def require(path: Path, made_by: str) -> Path:
    """Return the path of a file that has to be there.

    Raises:
        UserError: It is not.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. {made_by} writes it.")
    return path


def tokenizer_files(source: Path, made_by: str) -> dict[str, Path]:
    """Return the files of the tokenizer that are there.

    Raises:
        UserError: There is no tokenizer.
    """
    require(source / "tokenizer_config.json", made_by)
    files = {name: source / name for name in TOKENIZER if (source / name).is_file()}
    if not set(files) - {
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    }:
        raise UserError(f"{source}: has tokenizer_config.json and no vocabulary. {made_by} writes tokenizer.json.")
    return files


def public_metrics(metrics: Mapping[str, Any], repo_id: str) -> dict[str, Any]:
    """Return the metrics without the paths of the machine that made them."""
    facts = metrics["facts"]
    options = facts.get("arguments", {})
    private = ("model", "pairs", "completions", "adapter", "output", "device")
    kept = {key: value for key, value in options.items() if key not in private}
    if "labels" in kept:
        kept["labels"] = Path(kept["labels"]).stem
    public = {**facts, "model": repo_id, "pairs": Path(facts["pairs"]).name, "arguments": kept}
    if "completions" in facts:  # a teacher's: file -> digest
        public["completions"] = {Path(file).name: digest for file, digest in facts["completions"].items()}
    return {**metrics, "facts": public}


def base_model_id(recorded: str, statement: Statement, file: Path) -> str:
    """Return the Hub id of the base model: the recorded one, or a person's word for a local folder.

    Raises:
        CardError: The base was a local folder of which nothing is stated, or the two disagree.
    """
    from hub_cards.facts import REPO_ID, CardError

    stated = statement.base_model
    if not REPO_ID.fullmatch(recorded):
        if stated is None:
            raise CardError(
                f"{file}: the base model {recorded!r} was a local folder. Write its Hub id: base_model in --facts."
            )
        return stated
    if stated not in (None, recorded):
        raise CardError(f"--facts: base_model is {stated!r}, but {file} records {recorded!r}. Remove it from --facts.")
    return recorded
