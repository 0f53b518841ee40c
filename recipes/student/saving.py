"""The folder of a student or tuned teacher: claimed by its settings, resumed, finished whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError
from recipes.record import write_json

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

RECORD = "training.json"
PERSPECTIVES = "perspectives.safetensors"  # the name that modeling_lrkd.pipeline_lrkd looks for


def claim_folder(
    output: Path,
    settings: dict[str, Any],
    overwrite: bool,
    what: str = "student",
    defaults: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Return the record of a finished student (or `what`) with these settings, or make the folder ready for one.

    `defaults` stand for the options that the folder's record does not have.

    Raises:
        UserError: The folder holds one of other settings; or, to be overwritten, something else.
    """
    is_main = int(os.environ.get("RANK", "0")) == 0
    claim = output / "checkpoints" / "settings.json"
    for path in (output / RECORD, claim):
        if overwrite or not path.is_file():
            continue
        if path == claim and not any(claim.parent.glob("checkpoint-*")):
            continue  # what failed before its first checkpoint (no such encoder, out of memory) can be corrected
        found = json.loads(path.read_text(encoding="utf-8"))
        for part in ("arguments", "data_sha256"):
            for name, value in settings[part].items():
                before = found[part].get(name, (defaults or {}).get(name))
                if before != value:
                    raise UserError(
                        f"{output}: holds a {what} with {name} = {before!r}, not {value!r}. Choose "
                        "another output folder, or pass --overwrite to discard it."
                    )
        if path.name == RECORD:
            return dict(found)
    if is_main:
        if overwrite and output.is_dir():
            if any(output.iterdir()) and not ((output / RECORD).is_file() or claim.is_file()):
                raise UserError(f"{output}: holds no {what}, so --overwrite will not delete it. Choose another folder.")
            shutil.rmtree(output)
        write_json(claim, settings)
    return None


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end; a half-written one is removed."""
    from safetensors import SafetensorError, safe_open

    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # Trainer writes it last
            weights = list(checkpoint.glob("*.safetensors"))  # of a model, its shards, or an adapter
            for file in weights:
                with safe_open(file, framework="pt"):
                    pass
            if weights:
                return checkpoint
            raise FileNotFoundError(checkpoint)
        except (OSError, ValueError, SafetensorError):
            print(f"{checkpoint} is incomplete: removed.")
            shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def save_student(
    model: Any,
    tokenizer: Any,
    record: dict[str, Any],
    output: Path,
    perspectives: dict[str, np.ndarray] | None = None,
    **options: Any,
) -> None:
    """Put the finished student in its folder: beside it first, so that a full disk leaves no half of one.

    Args:
        model: The student.
        tokenizer: Its tokenizer.
        record: What it was made from and how it went, written last.
        output: Its folder.
        perspectives: Mean embedding of each perspective's training rationales, `(reasoning_dim,)` each.
        options: To the model's `save_pretrained`.
    """
    from safetensors.numpy import save_file

    partial = output / ".saving"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with explain_failed_writes(output):
            model.save_pretrained(partial, **options)
            save_tokenizer(tokenizer, partial)
            if perspectives is not None:
                save_file(perspectives, partial / PERSPECTIVES)
            for path in sorted(partial.iterdir()):
                path.replace(output / path.name)
            write_json(output / RECORD, record)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


@contextmanager
def explain_failed_writes(output: Path) -> Iterator[None]:
    """Turn a write that the disk refused into one clear error; nothing that stands is lost by it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError of its archive writer; any other is not ours to explain.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{output}: saving failed ({reason}). Free some space and run the same command again: it goes on from the "
            "last complete checkpoint."
        ) from None


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save `tokenizer` under a class name that transformers 4 and 5 both know.

    transformers 5 calls a tokenizer without a class of its own `TokenizersBackend`, which 4.57 refuses to load; both
    know it as `PreTrainedTokenizerFast`.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder, "tokenizer_config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def update_code(folder: str | Path) -> list[str]:
    """Write this checkout's modules into a student's folder where it carries others, and return their names.

    A student that was saved before the configuration had a field would ignore it without a word.
    """
    import modeling_lrkd

    changed = []
    for source in sorted(Path(modeling_lrkd.__file__).parent.glob("*_lrkd.py")):
        target = Path(folder, source.name)
        if not target.is_file() or target.read_bytes() != source.read_bytes():
            target.write_bytes(source.read_bytes())
            changed.append(source.name)
    return changed
