"""Measure how good the retrieved rationales are: do they argue for the prediction, do they speak of the pair?

    python -m recipes.evaluate.explanations --model runs/esci/bench/gat-0 --pairs runs/esci/pairs \
        --rationales runs/esci/rationales_embedded.parquet --output runs/esci/explanations

For each held-out pair the nearest rationale of each perspective is taken in four ways: `bank` (what the task
`lrkd-relevance` shows), `cosine` (all embeddings by their plain cosine to the latent), `h_cls` (the rationale of the
training pair with the nearest h_cls) and `random` (the mean of 20 draws). Measured of each:

- predicted, gold: the rationale's verdict is the class that the model predicts, that the pair has;
- words: share of the rationale's content words that occur in the pair's query or title;
- query: it holds a content word of the query.

Reads the bank in the student's folder (recipes.rationales.bank) and the embedded rationales that it was built from.
Writes explanations.json and table.md, with intervals by query bootstrap, to `--output`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, command_line, parse, run
from recipes.record import environment, sha256, write_json
from recipes.schemas import load_labels, make_folder, read_pairs

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from recipes.evaluate.latents import Latents

METHODS = ("bank", "cosine", "h_cls", "random")
MEASURES = ("predicted", "gold", "words", "query")
RANDOM_DRAWS = 20
WORD = re.compile(r"[^\W_]+(?:[.-][^\W_]+)*")


@dataclass
class ExplanationsArguments:
    """Options of `recipes.evaluate.explanations`."""

    model: str = field(metadata={"help": "Folder of a student with a rationale bank."})
    rationales: str = field(metadata={"help": "The embedded rationales that the bank was built from."})
    pairs: str = field(metadata={"help": "Folder of pairs."})
    output: str = field(metadata={"help": "Folder to write explanations.json and table.md to."})
    split: str = field(default="test", metadata={"help": "Which file of the pairs folder."})
    labels: str = field(default="esci", metadata={"help": "Label schema: a name in recipes/labels or a YAML file."})
    batch_size: int = field(default=64, metadata={"help": "Pairs a batch."})
    draws: int = field(default=10_000, metadata={"help": "Draws of the bootstrap."})
    seed: int = field(default=0, metadata={"help": "Seed of the draws and of `random`."})


def measure(arguments: ExplanationsArguments) -> dict[str, Any]:
    """Check, encode, retrieve, compare and write; return what explanations.json holds.

    Raises:
        UserError: There is no bank that belongs to the student, or an evaluated pair is among the rationales.
    """
    from modeling_lrkd.bank_lrkd import BANK_FILE, TEXTS_FILE, RationaleBank
    from recipes.evaluate.latents import encode
    from recipes.evaluate.predict import load, schema_order
    from recipes.rationales.bank import read_embedded, read_student

    if min(arguments.batch_size, arguments.draws) < 1:
        raise UserError("batch_size, draws: expected at least 1 each.")
    folder = Path(arguments.model)
    config = read_student(folder)
    if not (folder / BANK_FILE).is_file():
        raise UserError(f"{folder}: no {BANK_FILE}. Build it: python -m recipes.rationales.bank --model {folder} ...")
    try:
        bank = RationaleBank.load(
            folder / BANK_FILE, folder / TEXTS_FILE, folder / "model.safetensors", config["reasoning_dim"]
        )
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    schema = load_labels(arguments.labels)
    pairs = read_pairs(arguments.pairs, [arguments.split])[arguments.split]
    pairs["label"] = schema.canonical_column(pairs["label"], f"{arguments.pairs}/{arguments.split}.parquet")
    rationales = read_embedded(arguments.rationales)
    rationales = rationales[rationales["predicted_label"].notna()].reset_index(drop=True)
    if pairs.empty or rationales.empty:
        raise UserError(f"{arguments.pairs if pairs.empty else arguments.rationales}: no rows to measure with.")
    if (known := pairs["pair_id"].isin(rationales["pair_id"])).any():
        raise UserError(
            f"{arguments.rationales}: holds rationales of {known.sum()} of the pairs to be explained, e.g. "
            f"{pairs['pair_id'][known.to_numpy().argmax()]!r}. Measure on a split without any."
        )
    output = make_folder(arguments.output)
    model, tokenizer = load(arguments.model, schema, device="cpu")
    length = min(tokenizer.model_max_length, 512)
    held_out = encode(model, tokenizer, pairs, arguments.batch_size, length, "held-out pairs")
    sources = rationales.drop_duplicates("pair_id").reset_index(drop=True)
    known_pairs = encode(model, tokenizer, sources, arguments.batch_size, length, "training pairs")
    order = schema_order(model.config.id2label, schema, arguments.model)
    predicted = [schema.names[index] for index in held_out.probabilities[:, order].argmax(axis=1)]

    found = retrieve(bank, rationales, sources, held_out, known_pairs, arguments.seed)
    values = judge(pairs, predicted, found, bank.perspectives)
    result = {
        "pairs": len(pairs),
        "accuracy": float((pairs["label"] == predicted).mean()),
        "perspectives": compare(pairs, values, [*bank.perspectives, "all"], arguments.draws, arguments.seed),
        "facts": {
            "entries": len(bank),
            "weights_sha256": bank.weights_sha256,
            "rationales_sha256": sha256(arguments.rationales),
            "split": arguments.split,
            "draws": arguments.draws,
            "seed": arguments.seed,
            "command": command_line("recipes.evaluate.explanations", arguments),
            "environment": environment(),
        },
    }
    write_json(output / "explanations.json", result)
    (output / "table.md").write_text(format_table(result), encoding="utf-8")
    return result


Found = dict[tuple[str, str], list[tuple[list[str], list[str]]]]  # method, perspective -> by draw: texts, verdicts


def retrieve(
    bank: Any, rationales: pd.DataFrame, sources: pd.DataFrame, held_out: Latents, known: Latents, seed: int
) -> Found:
    """Return the text and verdict of each pair's nearest rationale, by method and perspective."""
    import numpy as np
    import torch
    from tqdm import tqdm

    generator = np.random.default_rng(seed)
    searches = tqdm(held_out.projected, desc="search", unit="pair")
    entries = np.array([[int(best[0]) for best, _ in bank.search(torch.from_numpy(one), 1)] for one in searches])
    source_of = {pair: row for row, pair in enumerate(sources["pair_id"])}
    found: Found = {}
    for number, name in enumerate(bank.perspectives):
        part = rationales[rationales["perspective"] == name]
        if part.empty:
            raise UserError(
                f"the bank knows the perspective {name!r}, the rationales do not: pass those it is made of."
            )
        texts, verdicts = part["rationale"].to_numpy(), part["predicted_label"].to_numpy()
        mine = entries[:, number]
        found["bank", name] = [
            ([bank.text(entry) for entry in mine], [bank.labels[int(bank.verdicts[entry])] for entry in mine])
        ]
        by_rows = {
            "cosine": [nearest(held_out.projected, np.stack(part["cot_embedding"].to_numpy()))],
            "h_cls": [nearest(held_out.pooled, known.pooled[[source_of[pair] for pair in part["pair_id"]]])],
            "random": list(generator.integers(len(part), size=(RANDOM_DRAWS, len(mine)))),
        }
        for method, draws in by_rows.items():
            found[method, name] = [(texts[rows].tolist(), verdicts[rows].tolist()) for rows in draws]
    return found


def nearest(queries: NDArray[np.float32], entries: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the entry of the largest cosine to each query."""
    import numpy as np

    units = entries / np.maximum(np.linalg.norm(entries, axis=1, keepdims=True), 1e-12)
    return np.concatenate([(queries[at : at + 512] @ units.T).argmax(axis=1) for at in range(0, len(queries), 512)])


def content_words(text: str) -> frozenset[str]:
    """Return the words that can tell a product: no stop words, no single letters (digits stay).

    >>> sorted(content_words("The 2.0mm USB-C cable, 2 m"))
    ['2', '2.0mm', 'cable', 'usb-c']
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    words = WORD.findall(text.casefold())
    return frozenset(word for word in words if word not in ENGLISH_STOP_WORDS and (len(word) > 1 or word.isdigit()))


def judge(pairs: pd.DataFrame, predicted: list[str], found: Found, perspectives: list[str]) -> NDArray[np.float64]:
    """Measure each retrieved rationale.

    Returns:
        `(pairs, perspectives and their mean, METHODS, MEASURES)`; of several draws, the mean.
    """
    import numpy as np

    queries = [content_words(text) for text in pairs["query"]]
    both = [words | content_words(title) for words, title in zip(queries, pairs["product_title"], strict=True)]
    gold, guess = pairs["label"].to_numpy(), np.array(predicted, dtype=object)
    values = np.empty((len(pairs), len(perspectives) + 1, len(METHODS), len(MEASURES)))
    for number, name in enumerate(perspectives):
        for column, method in enumerate(METHODS):
            draws = []
            for texts, verdicts in found[method, name]:
                said = [content_words(text) for text in texts]
                words = [len(mine & pair) / max(1, len(mine)) for mine, pair in zip(said, both, strict=True)]
                query = [bool(mine & asked) for mine, asked in zip(said, queries, strict=True)]
                verdict = np.array(verdicts, dtype=object)
                draws.append(np.stack([verdict == guess, verdict == gold, words, query], axis=1).astype(float))
            values[:, number, column] = np.mean(draws, axis=0)
    values[:, -1] = values[:, :-1].mean(axis=1)
    return values


def compare(
    pairs: pd.DataFrame, values: NDArray[np.float64], names: list[str], draws: int, seed: int
) -> dict[str, Any]:
    """Average over pairs, with 95 % intervals over queries; and the bank's difference to the other methods."""
    import numpy as np

    from recipes.evaluate.significance import draw_queries, interval

    query = pairs.groupby(["locale", "query"], sort=False).ngroup().to_numpy()
    flat = values.reshape(len(pairs), -1)
    sums = np.stack([np.bincount(query, weights=column) for column in flat.T], axis=1)  # (queries, columns)
    sizes = np.bincount(query).astype(float)
    drawn = [taken @ sums / (taken @ sizes)[:, None] for taken in draw_queries(len(sizes), draws, seed)]
    shape = (-1, *values.shape[1:])
    means, drawn = values.mean(axis=0), np.concatenate(drawn).reshape(shape)

    def cell(mean: float, samples: NDArray[np.float64]) -> dict[str, Any]:
        return {"mean": float(mean), "interval": list(interval(samples))}

    result: dict[str, Any] = {}
    for number, name in enumerate(names):
        result[name] = {"methods": {}, "bank_minus": {}}
        for column, method in enumerate(METHODS):
            mine, samples = means[number, column], drawn[:, number, column]
            result[name]["methods"][method] = {
                measure: cell(mine[at], samples[:, at]) for at, measure in enumerate(MEASURES)
            }
            if method != "bank":
                gap, gaps = means[number, 0] - mine, drawn[:, number, 0] - samples
                result[name]["bank_minus"][method] = {
                    measure: cell(gap[at], gaps[:, at]) for at, measure in enumerate(MEASURES)
                }
    return result


def format_table(result: dict[str, Any]) -> str:
    """Lay the result out as markdown, all × 100."""

    def row(head: list[str], values: dict[str, Any], sign: str) -> str:
        cells = [
            f"{100 * values[name]['mean']:{sign}.1f} [{100 * values[name]['interval'][0]:{sign}.1f}, "
            f"{100 * values[name]['interval'][1]:{sign}.1f}]"
            for name in MEASURES
        ]
        return f"| {' | '.join([*head, *cells])} |"

    lines = [
        f"{result['pairs']:,} pairs, {result['facts']['entries']:,} rationales in the bank, accuracy of the student "
        f"{100 * result['accuracy']:.1f}. All × 100, 95 % intervals by query bootstrap.",
        "",
        "| perspective | retrieved by | verdict = prediction | verdict = gold | words of the pair | of the query |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in result["perspectives"].items():
        lines += [row([name, method], cells, "") for method, cells in values["methods"].items()]
        lines += [row([name, f"bank - {method}"], cells, "+") for method, cells in values["bank_minus"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure from the command line."""
    arguments = parse(ExplanationsArguments, __doc__)
    print(format_table(measure(arguments)))
    print(f"Wrote {arguments.output}/explanations.json and table.md.")
    print(f"Next: make space MODEL={arguments.model}")


if __name__ == "__main__":
    run(main)
