"""Encode products once, before there is a query: the layers of an item-cached student that read the product alone.

    python -m recipes.serve.encode_products --model runs/esci/item_cached --products runs/esci/pairs/test.parquet \
        --output runs/esci/store
    python -m recipes.serve.encode_products --model MODEL --products A.parquet B.parquet --key product_id \
        --dtype int8 --output FOLDER --threads 2

Killed at any moment and started again with the same command, it goes on from its last shard. Reads `product_title`
(and `product_id`, if it is the key); a product that comes several times is encoded once. `recipes.serve.item_cached`
scores a query against what is stored.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.arguments import UserError, parse, run
from recipes.record import sha256, write_json
from recipes.schemas import Column, Contract, make_folder, read
from recipes.serve.product_store import (
    FORMAT,
    MANIFEST,
    Identity,
    load_student,
    open_shard,
    product_keys,
    read_manifest,
    refuse_another_model,
    shard_path,
    write_shard,
)
from recipes.serve.scorer import CHARACTERS_PER_TOKEN, longest_input, progress_interval

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from transformers import PreTrainedTokenizerBase

    from modeling_lrkd import LRKDForSequenceClassification

_TEXT = Column("string", blank=False)
BATCH_TOKENS = 4096


@dataclass
class EncodeProductsArguments:
    """Options of `recipes.serve.encode_products`."""

    model: str = field(metadata={"help": "Student trained with separate_layers: a folder or a name on the Hub."})
    products: list[str] = field(metadata={"help": "Parquet files with product_title (pairs will do)."})
    output: str = field(metadata={"help": "Folder of the store."})
    key: Literal["product_title", "product_id"] = field(
        default="product_title", metadata={"help": "What products are asked for by."}
    )
    dtype: Literal["float32", "float16", "int8"] = field(default="float16", metadata={"help": "Of stored vectors."})
    max_product_tokens: int | None = field(
        default=None, metadata={"help": "Longest title in tokens (None: 3/4 of what the model takes); others are cut."}
    )
    shard_products: int = field(default=16_384, metadata={"help": "Products a file: what a kill can cost."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads (None: all cores)."})
    overwrite: bool = field(default=False, metadata={"help": "Discard the store that the output folder holds."})


def encode_products(arguments: EncodeProductsArguments, progress: bool = True) -> dict[str, Any]:
    """Make a store, or finish one that was interrupted; a finished one is left as it is.

    Returns:
        What `store.json` says.

    Raises:
        UserError: An input breaks its contract, the model cannot be used, or the folder holds another store.
    """
    import torch
    from tqdm import tqdm

    for name in ("max_product_tokens", "shard_products", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"{name}: expected 1 or more, got {value}.")
    if not arguments.products:
        raise UserError("products: expected at least one parquet file.")
    frame = read_products(arguments.products, arguments.key)
    model, tokenizer, identity = load_student(arguments.model)
    longest = longest_input(tokenizer, model.config)
    cut = arguments.max_product_tokens or longest * 3 // 4
    if cut >= longest:
        raise UserError(f"max_product_tokens: expected less than the {longest} tokens that the model takes, got {cut}.")
    folder = make_folder(arguments.output)
    manifest = _claim(folder, arguments, identity, len(frame), cut)
    if manifest["complete"] and all(shard_path(folder, number).is_file() for number in range(manifest["shards"])):
        print(f"{folder} already holds these products; --overwrite encodes them again.")
        return manifest
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    tokens = 0
    bar_options = {"mininterval": progress_interval(), "disable": not progress}
    with tqdm(total=len(frame), unit="product", desc="encode", **bar_options) as bar:
        for number in range(manifest["shards"]):
            part = frame.iloc[number * arguments.shard_products : (number + 1) * arguments.shard_products]
            path = shard_path(folder, number)
            if not path.is_file():
                encoded = product_tokens(tokenizer, part["product_title"].tolist(), cut)
                vectors = encode(model, encoded, bar)
                lengths = [len(ids) for ids in encoded]
                ids = torch.tensor([*chain.from_iterable(encoded)]) if model.config.match_marks else None
                try:
                    write_shard(path, torch.cat(vectors), lengths, product_keys(part["key"]), arguments.dtype, ids)
                except OSError as error:
                    raise UserError(f"{path}: could not be written ({error}). Free some space and go on.") from None
            else:
                bar.update(len(part))
            tokens += int(open_shard(path)["offsets"][-1])
    size = sum(shard_path(folder, number).stat().st_size for number in range(manifest["shards"]))
    manifest |= {"complete": True, "tokens": tokens, "bytes": size, "bytes_per_product": round(size / len(frame), 1)}
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_products(paths: list[str], key: str) -> pd.DataFrame:
    """Read the distinct products of several files: columns `key` and `product_title`.

    Raises:
        UserError: A file breaks its contract, holds nothing, or gives one key two titles.
    """
    import pandas as pd

    contract = Contract("products", "recipes.data.prepare, or your catalogue", {"product_title": _TEXT, key: _TEXT}, ())
    frames = []
    for path in paths:
        frame = read(path, contract)
        if frame.empty:
            raise UserError(f"{path}: has no rows. Expected products.")
        frames.append(pd.DataFrame({"key": frame[key], "product_title": frame["product_title"]}).assign(file=path))
    products = pd.concat(frames).drop_duplicates(["key", "product_title"])
    if (twice := products["key"].duplicated()).any():
        row = products[twice].iloc[0]
        raise UserError(
            f"{row['file']}: {key} {row['key']!r} comes with two titles, e.g. {row['product_title'][:60]!r}. Keep one."
        )
    return products.reset_index(drop=True)


def product_tokens(tokenizer: PreTrainedTokenizerBase, titles: list[str], longest: int) -> list[list[int]]:
    """Return the ids of what stands behind the query in a pair: `title [SEP]`, at most `longest` of them."""
    before = len(query_tokens(tokenizer, ""))
    titles = [title[: CHARACTERS_PER_TOKEN * longest] for title in titles]  # as the scorer does
    encoded = tokenizer([""] * len(titles), titles, truncation="only_second", max_length=before + longest)
    return [ids[before:] for ids in encoded["input_ids"]]


def query_tokens(tokenizer: PreTrainedTokenizerBase, query: str) -> list[int]:
    """Return the ids of what stands before the product in a pair: `[CLS] query [SEP]`."""
    ids: list[int] = tokenizer(query)["input_ids"]
    return ids


def encode(model: LRKDForSequenceClassification, encoded: list[list[int]], bar: Any = None) -> list[torch.Tensor]:
    """Return the token vectors of each product, `(tokens, hidden)` each, products of about one length together."""
    import torch

    vectors: list[torch.Tensor] = [torch.empty(0)] * len(encoded)
    with torch.inference_mode():
        for rows in batches([len(ids) for ids in encoded], BATCH_TOKENS):
            longest = max(len(encoded[row]) for row in rows)
            ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
            for place, row in enumerate(rows):
                ids[place, : len(encoded[row])] = torch.tensor(encoded[row])
                mask[place, : len(encoded[row])] = 1
            states = model.encode_segment(ids, mask, segment=1)
            for place, row in enumerate(rows):
                vectors[row] = states[place, : len(encoded[row])].clone()
            if bar is not None:
                bar.update(len(rows))
    return vectors


def batches(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """Yield rows of about one length, longest first, at most `tokens` tokens with their padding.

    >>> list(batches([2, 9, 3, 3], tokens=9))
    [[1], [2, 3, 0]]
    """
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if rows and (len(rows) + 1) * lengths[rows[0]] > tokens:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _claim(
    folder: Path, arguments: EncodeProductsArguments, identity: Identity, products: int, cut: int
) -> dict[str, Any]:
    """Return the description of the store in the folder, made now if there is none."""
    manifest = {
        "format": FORMAT,
        "complete": False,
        "model": asdict(identity),
        "key": arguments.key,
        "dtype": arguments.dtype,
        "hidden_size": identity.hidden_size,
        "max_product_tokens": cut,
        "shard_products": arguments.shard_products,
        "shards": -(-products // arguments.shard_products),
        "products": products,
        "inputs_sha256": [sha256(path) for path in arguments.products],
    }
    if arguments.overwrite and any(folder.iterdir()):
        read_manifest(folder)  # or it is no store, and not ours to delete
        shutil.rmtree(folder)
        folder.mkdir()
    if (folder / MANIFEST).is_file():
        found = read_manifest(folder)
        refuse_another_model(folder, found, identity)
        for name, value in manifest.items():
            if name != "complete" and found[name] != value:
                raise UserError(
                    f"{folder}: holds a store with {name} = {found[name]!r}, not {value!r}. Choose another output "
                    "folder, or pass --overwrite to discard it."
                )
        return found
    if any(folder.iterdir()):
        raise UserError(f"{folder}: not empty, and no store. Choose another output folder.")
    write_json(folder / MANIFEST, manifest)
    return manifest


def main() -> None:
    """Run the verb."""
    arguments = parse(EncodeProductsArguments, __doc__)
    manifest = encode_products(arguments)
    print(
        f"Store: {arguments.output} ({manifest['products']:,} products, {manifest['bytes_per_product']:,.0f} bytes "
        f"each)\nNext: recipes.serve.item_cached.ItemCachedScorer({arguments.model!r}, {arguments.output!r})"
    )


if __name__ == "__main__":
    run(main)
