"""What encoding products once buys: bytes a product, and the time of a query with 100, 1,000 and 5,000 candidates.

    python -m recipes.bench.item_cache
    python -m recipes.bench.item_cache --model runs/esci/item_cached --pairs runs/esci/pairs --labels esci
    python -m recipes.bench.item_cache --variants k=4 k=4,marks k=4,marks,q=1

Side by side, in turn, in one run: the student uncached through torch; a plain student through the scorer, as
`recipes.serve.export` made it fastest; and the same queries against a store. A student that reads all together is
given each of `--variants` for the occasion, as speed does not depend on the weights: k (`separate_layers`), `marks`
(`match_marks`) and q (`query_layers`). What they cost in accuracy is measured by
recipes/configs/student/esci_item_cached_bench.yaml. The first is stored in every precision, the others in float16,
which is what is timed. The joint layers are computed in bfloat16 where the CPU multiplies it, else in float32. Writes
item_cache.json and item_cache.md.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.bench.measure import (
    LEAST_ROUNDS,
    RESULTS,
    emulated,
    facts,
    interleave,
    paired_ratio,
    percentiles,
    show_left_out,
    show_ratio,
    table,
    write_results,
)
from recipes.schemas import make_folder
from recipes.serve.product_store import DTYPES

if TYPE_CHECKING:
    from recipes.serve.item_cached import ItemCachedScorer

UNCACHED, PLAIN = "uncached, torch", "plain student, scorer"


@dataclass
class ItemCacheArguments:
    """Options of the bench of stored products."""

    output: str = field(default=RESULTS, metadata={"help": "Folder of item_cache.json and item_cache.md."})
    work: str = field(default="runs/bench", metadata={"help": "Folder of the quick student, exports and stores."})
    model: str | None = field(default=None, metadata={"help": "Folder of a student (None: a quick one)."})
    pairs: str | None = field(default=None, metadata={"help": "Folder of pairs of its marketplace."})
    labels: str = field(default="aliexpress6", metadata={"help": "Label schema of the pairs."})
    variants: list[str] = field(
        default_factory=lambda: ["k=4,marks", "k=4", "k=4,marks,q=1", "k=5,marks", "k=5,marks,q=1"],
        metadata={"help": "Ways to read apart that a plain student is given."},
    )
    candidates: list[int] = field(default_factory=lambda: [100, 1000, 5000], metadata={"help": "Products of a query."})
    uncached_up_to: int = field(default=100, metadata={"help": "Most candidates that torch is asked for uncached."})
    threads: int | None = field(default=None, metadata={"help": "Cores (None: all)."})
    rounds: int = field(default=5, metadata={"help": "Times that each system is asked, in turn."})
    patience: float = field(
        default=45.0,
        metadata={
            "help": "Seconds after which no 4th or later round begins; a count that needs twice as long is left out."
        },
    )


def read_variant(variant: str) -> dict[str, Any]:
    """Read `k=4,marks,q=1`: options of `LRKDConfig`.

    Raises:
        UserError: It is something else.

    >>> read_variant("k=4,marks,q=1")
    {'separate_layers': 4, 'match_marks': True, 'query_layers': 1}
    """
    found = re.fullmatch(r"k=([1-9]\d*)(,marks)?(?:,q=(\d+))?", variant)
    if found is None:
        raise UserError(f"--variants {variant}: expected k=4, k=4,marks, k=4,q=1 or k=4,marks,q=1, with any numbers.")
    k, marks, q = found.groups()
    return {"separate_layers": int(k), "match_marks": marks is not None, "query_layers": int(q or 0)}


def name_variant(config: dict[str, Any]) -> str:
    """Write what `read_variant` reads, of a config.json.

    >>> name_variant(read_variant("k=4,marks,q=1"))
    'k=4,marks,q=1'
    """
    marks = ",marks" if config.get("match_marks") else ""
    query = f",q={config['query_layers']}" if config.get("query_layers") else ""
    return f"k={config['separate_layers']}{marks}{query}"


def apart(student: Path, variant: str, folder: Path) -> Path:
    """Return a copy of a student that reads query and product apart as `variant` says.

    Raises:
        UserError: Its encoder cannot.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    from modeling_lrkd.separation_lrkd import check_query_layers, check_separable

    options = read_variant(variant)
    try:
        encoder_config = AutoConfig.from_pretrained(student).encoder_config
        check_separable(encoder_config, options["separate_layers"])
        check_query_layers(encoder_config, options["separate_layers"], options["query_layers"])
    except ValueError as error:
        raise UserError(f"--variants {variant}: {error}") from None
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(student, folder, ignore=shutil.ignore_patterns("onnx", "openvino", "checkpoints"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= options
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if options["match_marks"]:
        weights = load_file(folder / "model.safetensors")
        weights["match_marks.weight"] = torch.full((2, config["encoder_config"]["hidden_size"]), 0.1)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def item_cache(arguments: ItemCacheArguments) -> dict[str, Any]:
    """Measure; return what item_cache.json holds.

    Raises:
        UserError: An option or a file is not usable (see `recipes.bench.student.prepare`).
    """
    import numpy as np

    from recipes.bench.student import prepare, timed_pairs
    from recipes.serve.item_cached import ItemCachedScorer
    from recipes.serve.plan import cpu_flags
    from recipes.serve.scorer import Scorer, usable_cores

    if not arguments.candidates or min(arguments.candidates) < 1:
        raise UserError(f"--candidates {arguments.candidates}: expected numbers of at least 1.")
    if not arguments.variants:
        raise UserError("--variants: expected at least one, e.g. k=4,marks.")
    for variant in arguments.variants:
        read_variant(variant)
    for name in ("rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: expected at least 1.")
    make_folder(arguments.output)
    exported, source = prepare(arguments.model, arguments.pairs, arguments.labels, arguments.work)
    frame = timed_pairs(source, max(arguments.candidates))
    query = min(frame["query"], key=lambda text: abs(len(text) - frame["query"].str.len().median()))
    titles = [frame["product_title"].iloc[number % len(frame)] for number in range(max(arguments.candidates))]
    threads = arguments.threads or usable_cores()
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    students = {variant: Path(arguments.work, f"apart-{variant}") for variant in arguments.variants}
    if config.get("separate_layers", 0):
        students = {name_variant(config): exported}
    else:
        students = {variant: apart(exported, variant, folder) for variant, folder in students.items()}
    first = next(iter(students))
    left_out = emulated({"OpenVINO bfloat16": "bfloat16"}, cpu_flags())
    fast = "float32" if left_out else "bfloat16"
    stores: list[dict[str, Any]] = []
    systems: dict[str, ItemCachedScorer] = {}
    for variant, student in students.items():
        with Scorer(student, "torch", threads=threads) as scorer:
            reference = np.stack(list(scorer.score([(query, title) for title in titles[:256]])))
        for dtype in DTYPES if variant == first else ("float16",):
            made = _make_store(student, frame, dtype, arguments.work, threads)
            stores.append({"variant": variant, "dtype": dtype, **made})
            folder = stores[-1].pop("folder")
            for backend, precision in (("torch", "float32"), ("openvino", fast)):
                if backend == "torch" and variant != first:
                    continue
                cached = ItemCachedScorer(str(student), folder, backend, precision, threads)  # type: ignore[arg-type]
                drift = float(np.abs(cached.score(query, titles[:256]) - reference).max())
                stores[-1][f"largest_difference_{backend}_{precision}"] = drift
                if backend == "openvino" and dtype == "float16":
                    systems[f"{variant}, {dtype} store, {backend} {precision}"] = cached
    cells, ratios = [], []
    round_seconds = 0.0  # of one candidate, uncached torch aside
    with Scorer(students[first], "torch", threads=threads) as torch_scorer, Scorer(exported, threads=threads) as plain:
        for count in sorted(arguments.candidates):
            expected = count * round_seconds
            if (1 + LEAST_ROUNDS) * expected > 2 * arguments.patience:
                left_out[f"{count:,} candidates"] = f"a round would take about {expected:.0f} s here"
                continue
            pairs = [(query, title) for title in titles[:count]]
            variants: dict[str, Callable[[], Any]] = {PLAIN: lambda pairs=pairs: list(plain.score(pairs))}
            if count <= arguments.uncached_up_to:
                variants[UNCACHED] = lambda pairs=pairs: list(torch_scorer.score(pairs))
            for name, cached in systems.items():
                variants[name] = lambda cached=cached, count=count: cached.score(query, titles[:count])
            seconds = interleave(variants, arguments.rounds, f"{count} candidates", arguments.patience)
            round_seconds = sum(min(values) for name, values in seconds.items() if name != UNCACHED) / count
            for name, values in seconds.items():
                cells.append(
                    {"candidates": count, "system": name, "seconds": percentiles(values), "rounds": len(values)}
                )
                for base in (PLAIN, UNCACHED):
                    if name in systems and base in seconds:
                        ratio = paired_ratio(seconds[base], values)
                        ratios.append({"candidates": count, "system": name, "over": base, "ratio": ratio})
        form = plain.form
    return {
        "command": command_line("recipes.bench.item_cache", arguments),
        "facts": facts(to_dict(arguments)),
        "threads": threads,
        "plain_form": form,
        "joint_precision": fast,
        "left_out": left_out,
        "query_tokens": len(next(iter(systems.values())).tokenizer(query)["input_ids"]),
        "stores": stores,
        "cells": cells,
        "ratios": ratios,
    }


def _make_store(student: Path, frame: Any, dtype: str, work: str, threads: int) -> dict[str, Any]:
    """Encode the products of `frame`; return size and time."""
    from recipes.serve.encode_products import EncodeProductsArguments, encode_products

    folder, products = Path(work, f"store-{student.name}-{dtype}"), Path(work, "products.parquet")
    shutil.rmtree(folder, ignore_errors=True)
    frame[["product_title"]].to_parquet(products)
    started = time.perf_counter()
    made = encode_products(
        EncodeProductsArguments(str(student), [str(products)], str(folder), dtype=dtype, threads=threads)  # type: ignore[arg-type]
    )
    return {
        "folder": str(folder),
        "products": made["products"],
        "tokens_per_product": made["tokens"] / made["products"],
        "bytes_per_product": made["bytes_per_product"],
        "encode_seconds": time.perf_counter() - started,
    }


def format_table(content: dict[str, Any]) -> str:
    """Return stores and times as Markdown."""
    kept = [
        {
            "store": f"{store['variant']}, {store['dtype']}",
            "bytes a product": f"{store['bytes_per_product']:,.0f}",
            "tokens a product": f"{store['tokens_per_product']:.1f}",
            "largest difference of a probability, torch float32": _show(store, "torch_float32"),
            f"OpenVINO {content['joint_precision']}": _show(store, f"openvino_{content['joint_precision']}"),
        }
        for store in content["stores"]
    ]
    found = {(item["candidates"], item["system"], item["over"]): item["ratio"] for item in content["ratios"]}
    rows = []
    for cell in content["cells"]:
        name = cell["system"] + (f" ({content['plain_form']})" if cell["system"] == PLAIN else "")
        row = {"candidates": f"{cell['candidates']:,}", "system": name}
        row |= {point: f"{1000 * value:.0f} ms" for point, value in cell["seconds"].items()}
        for base in (UNCACHED, PLAIN):
            ratio = found.get((cell["candidates"], cell["system"], base))
            row[f"times faster than {base}"] = "" if ratio is None else show_ratio(ratio)
        rows.append(row)
    return f"{table(kept)}\n\n{table(rows)}{show_left_out(content['left_out'])}"


def _show(store: dict[str, Any], form: str) -> str:
    value = store.get(f"largest_difference_{form}")
    return "" if value is None else f"{value:.1e}"


def main() -> None:
    """Measure from the command line."""
    arguments = parse(ItemCacheArguments, __doc__)
    content = item_cache(arguments)
    write_results(arguments.output, "item_cache", content, format_table(content))
    print("Next: python -m recipes.student.bench --config recipes/configs/student/esci_item_cached_bench.yaml")


if __name__ == "__main__":
    run(main)
