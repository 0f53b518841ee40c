"""Measure the search of a rationale bank: time, and how often it finds what the exact search finds.

    python -m recipes.bench.bank --model runs/esci/bench/gat-0 --pairs runs/esci/pairs \
        --rationales runs/esci/rationales_embedded.parquet --entries 100000 --output runs/esci/bank_bench.json

One process and one thread; every way of searching sees the same latents, those of held-out pairs, in turn, and finds
the nearest rationales of every perspective. Exact is a scan of all float32 vectors. Where `--entries` is more than
there are rationales, the rest are points between two of one perspective, away from both: real text, invented places.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, command_line, parse, run
from recipes.record import environment, write_json
from recipes.schemas import read_pairs

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from modeling_lrkd.bank_lrkd import RationaleBank

PROBES = (1, 2, 4, 8, 16, 32)
PASSES = 5  # what else the machine does only adds to a time


@dataclass
class BankBenchArguments:
    """Options of `recipes.bench.bank`."""

    model: str = field(metadata={"help": "Folder of a student with latent reasoning."})
    rationales: str = field(metadata={"help": "Embedded rationales (parquet)."})
    pairs: str = field(metadata={"help": "Folder of pairs; the latents of `split` are what is looked up."})
    output: str = field(metadata={"help": "JSON to write."})
    split: str = field(default="test", metadata={"help": "Which file of the pairs folder."})
    entries: int | None = field(default=None, metadata={"help": "Entries of the bank (None: one a rationale)."})
    searches: int = field(default=300, metadata={"help": "Latents to look up."})
    nearest: int = field(default=5, metadata={"help": "Rationales a perspective."})
    seed: int = field(default=0, metadata={"help": "Seed of cells, invented entries and chosen pairs."})


def bench(arguments: BankBenchArguments) -> dict[str, Any]:
    """Build a bank, search it in every way, and write what that took and found."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import modeling_lrkd  # noqa: F401  registers the lrkd classes
    from recipes.evaluate.latents import encode
    from recipes.rationales.bank import make_bank, read_embedded, read_student, select

    if min(arguments.searches, arguments.nearest, arguments.entries or 1) < 1:
        raise UserError("searches, nearest, entries: expected at least 1 each.")
    if Path(arguments.output).is_dir():
        raise UserError(f"--output {arguments.output}: is a folder; expected the JSON file to write.")
    config = read_student(Path(arguments.model))
    rationales = read_embedded(arguments.rationales)
    size = len(rationales["cot_embedding"].iloc[0]) if len(rationales) else 0
    if size != config["reasoning_dim"]:
        raise UserError(f"{arguments.rationales}: embeddings of {size}; the model's are of {config['reasoning_dim']}.")
    pairs = read_pairs(arguments.pairs, [arguments.split])[arguments.split]
    pairs = pairs.sample(min(arguments.searches, len(pairs)), random_state=arguments.seed)
    torch.set_num_threads(1)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model)
    latents = torch.from_numpy(encode(model, tokenizer, pairs).projected)
    entries, _ = select(rationales, near_duplicate=2)
    if arguments.entries is not None:
        entries = resized(entries, arguments.entries, arguments.seed)
    # Its number ends each text, so that the exact search can name entries as the bank does.
    entries["rationale"] = [f"{text} #{row}" for row, text in enumerate(entries["rationale"])]
    print(f"{len(entries):,} entries: looking for their cells", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bank = make_bank(entries, Path(folder, "lines.txt"), arguments.seed)
        bank.save(folder, Path(arguments.model, "model.safetensors"))
        sizes = {path.name: path.stat().st_size for path in sorted(Path(folder).glob("rationale_bank.*"))}
        exact, exact_ms = timed(flat_search(entries, bank), latents, arguments.nearest)
        rows = [{"search": "exact, float32", "probes": None, **exact_ms, "recall_at_1": 1.0, "recall": 1.0}]
        for probes in (*PROBES, None):
            found, milliseconds = timed(
                lambda latent, count, probes=probes: bank.search(latent, count, probes), latents, arguments.nearest
            )
            rows.append(
                {
                    "search": "all cells, int8" if probes is None else "cells, int8",
                    "probes": probes,
                    **milliseconds,
                    "recall_at_1": recall(found, exact, 1),
                    "recall": recall(found, exact, arguments.nearest),
                }
            )
        _, with_texts = timed(bank.nearest, latents, 1)
    result = {
        "entries": len(bank),
        "of_them_rationales": min(len(rationales), len(bank)),
        "cells": len(bank.centroids),
        "perspectives": bank.perspectives,
        "nearest": arguments.nearest,
        "searches": len(latents),
        "bytes": sizes,
        "float32_bytes": 4 * bank.vectors.numel(),
        "rows": rows,
        "nearest_with_texts_ms": with_texts["median_ms"],
        "environment": environment(),
        "command": command_line("recipes.bench.bank", arguments),
    }
    write_json(arguments.output, result)
    return result


def resized(entries: pd.DataFrame, wanted: int, seed: int) -> pd.DataFrame:
    """Return `wanted` entries: some of them, or all and invented ones."""
    import numpy as np
    import pandas as pd

    if wanted <= len(entries):
        return entries.sample(wanted, random_state=seed)
    generator = np.random.default_rng(seed)
    first = generator.integers(len(entries), size=wanted - len(entries))
    groups = entries.groupby("perspective", sort=False).indices
    perspective = entries["perspective"].to_numpy()
    second = np.array([generator.choice(groups[perspective[row]]) for row in first])
    vectors = np.stack(entries["cot_embedding"])
    share = generator.uniform(0.2, 0.5, size=(len(first), 1))
    mixed = (1 - share) * vectors[first] + share * vectors[second]
    mixed *= np.linalg.norm(vectors[first], axis=1, keepdims=True) / np.linalg.norm(mixed, axis=1, keepdims=True)
    invented = entries.iloc[first].assign(cot_embedding=list(mixed.astype(np.float32)))
    return pd.concat([entries, invented], ignore_index=True)


Search = Callable[["Tensor", int], "list[tuple[Tensor, Tensor]]"]


def flat_search(entries: pd.DataFrame, bank: RationaleBank) -> Search:
    """Return the exact search: every float32 offset of a perspective, entries numbered as in the bank."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    borders = bank.cell_starts[bank.perspective_cells].tolist()
    rows = [int(line.rsplit("#", 1)[1]) for line in bank.texts.read_text(encoding="utf-8").splitlines()]
    vectors = torch.from_numpy(np.stack(entries["cot_embedding"].to_numpy()[rows]))
    units = [
        F.normalize(vectors[start:end] - mean, dim=1)
        for mean, start, end in zip(bank.means, borders[:-1], borders[1:], strict=True)
    ]
    centre = bank.means.mean(dim=0)

    def search(latent: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        offset = F.normalize(latent - centre, dim=0)
        best = [(part @ offset).topk(min(count, len(part))) for part in units]
        return [(top.indices + start, top.values) for top, start in zip(best, borders, strict=False)]

    return search


def timed(search: Search, latents: Tensor, count: int) -> tuple[list[Any], dict[str, float]]:
    """Return what was found, and the time of one search: of each latent the best of `PASSES` passes over all."""
    import numpy as np

    found: list[Any] = []
    seconds = np.empty((PASSES, len(latents)))
    for turn in range(PASSES):
        found = []
        for place, latent in enumerate(latents):
            started = time.perf_counter()
            found.append(search(latent, count))
            seconds[turn, place] = time.perf_counter() - started
    best = 1000 * seconds.min(axis=0)
    return found, {"median_ms": float(np.median(best)), "p95_ms": float(np.quantile(best, 0.95))}


def recall(found: list[Any], exact: list[Any], count: int) -> float:
    """Share of the `count` exactly nearest entries that are among the `count` found, by search and perspective."""
    hits = total = 0
    for mine, right in zip(found, exact, strict=True):
        for (entries, _), (nearest, _) in zip(mine, right, strict=True):
            wanted = set(nearest[:count].tolist())
            hits += len(wanted & set(entries[:count].tolist()))
            total += len(wanted)
    return hits / total


def main() -> None:
    """Measure from the command line."""
    arguments = parse(BankBenchArguments, __doc__)
    result = bench(arguments)
    nearest = arguments.nearest
    print(f"\n{result['entries']:,} entries, {result['cells']:,} cells, {len(result['perspectives'])} perspectives")
    print(f"{'search':16} {'cells':>6} {'ms':>8} {'p95 ms':>8} {'recall@1':>9} {f'recall@{nearest}':>9}")
    for row in result["rows"]:
        cells = "-" if row["probes"] is None else row["probes"]
        print(
            f"{row['search']:16} {cells:>6} {row['median_ms']:8.3f} {row['p95_ms']:8.3f} {row['recall_at_1']:9.3f} "
            f"{row['recall']:9.3f}"
        )
    print(f"nearest(), texts read: {result['nearest_with_texts_ms']:.3f} ms")
    stored, plain = sum(result["bytes"].values()) / 1e6, result["float32_bytes"] / 1e6
    print(f"on disk {stored:.1f} MB, texts included; the vectors alone in float32: {plain:.1f} MB")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run(main)
