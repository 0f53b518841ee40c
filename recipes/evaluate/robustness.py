"""Perturb pairs and measure what that does to students: which predictions flip, and how much accuracy is lost.

    python -m recipes.evaluate.robustness --models none=runs/esci/bench/none-0 gat=runs/esci/bench/gat-0 \
        --pairs runs/esci/pairs --output runs/esci/robustness
    python -m recipes.evaluate.robustness --models gat=runs/demo/students/lrkd-gat-0 --pairs runs/demo/bazaar \
        --labels aliexpress6 --kinds typo brand_swap --output runs/demo/robustness

Kinds that leave the label as it is (a typo, capitals, emoji): a flip is a prediction that changes, a drop is the
accuracy lost on the pairs that the kind applies to. Kinds that change it (another brand, "not red", "parts for ..."):
fooled are the predictions that stay with a relevant class, of those that were so rightly; and, where the structures
behind the pairs say what the new label is (`structures.parquet` beside them, made by recipes.data.bazaar), accuracy.
All with 95 % intervals over queries. What each kind does: recipes/data/perturb_preserving.py, perturb_changing.py.

Writes robustness.json, table.md, plot.png and perturbed.parquet, and each model's probabilities as soon as it is
done, so that a killed run goes on with the next model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.record import environment, sha256, weights_sha256, write_json
from recipes.schemas import load_labels, make_folder, read, read_pairs

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from recipes.data.perturb import Perturbed
    from recipes.schemas import LabelSchema


@dataclass
class RobustnessArguments:
    """Options of `recipes.evaluate.robustness`."""

    models: list[str] = field(metadata={"help": "NAME=DIR ...: students, checkpoint folders or Hub ids."})
    pairs: str = field(metadata={"help": "Folder of pairs, one parquet file a split."})
    output: str = field(metadata={"help": "Folder to write to."})
    split: str = field(default="test", metadata={"help": "Which file of the pairs folder."})
    labels: str = field(default="esci", metadata={"help": "Label schema: a name in recipes/labels or a YAML file."})
    kinds: list[str] = field(default_factory=list, metadata={"help": "Perturbations (none given: all)."})
    limit: int | None = field(default=None, metadata={"help": "So many pairs only, drawn by seed."})
    batch_size: int = field(default=64, metadata={"help": "Pairs a batch."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens (None: the checkpoint's own, 512 at most)."})
    device: str = field(default="auto", metadata={"help": "auto (cuda if there is one), cpu, cuda:1, mps."})
    draws: int = field(default=10_000, metadata={"help": "Bootstrap draws of queries."})
    seed: int = field(default=0, metadata={"help": "Of the perturbations and of the bootstrap."})


def robustness(arguments: RobustnessArguments) -> dict[str, Any]:
    """Perturb, score, measure and write; return what robustness.json holds.

    Raises:
        UserError: An option or a file is not what it should be, or no pair could be perturbed.
    """
    from recipes.data.bazaar_rules import STRUCTURES
    from recipes.data.perturb import KINDS, perturb
    from recipes.evaluate.robustness_report import plot, table

    models = named(arguments.models)
    if unknown := [kind for kind in arguments.kinds if kind not in KINDS]:
        raise UserError(f"--kinds {unknown[0]}: no such perturbation. Choose from {', '.join(KINDS)}.")
    for option in ("batch_size", "limit", "max_length", "draws"):
        if (value := getattr(arguments, option)) is not None and value < 1:
            raise UserError(f"--{option} {value}: expected at least 1.")
    schema = load_labels(arguments.labels)
    file = Path(arguments.pairs, f"{arguments.split}.parquet")
    pairs = read_pairs(arguments.pairs, [arguments.split])[arguments.split]
    if arguments.limit is not None and arguments.limit < len(pairs):
        pairs = pairs.sample(arguments.limit, random_state=arguments.seed).reset_index(drop=True)
    if pairs.empty:
        raise UserError(f"{file}: no rows. Choose another split, or make the pairs again.")
    pairs["label"] = schema.canonical_column(pairs["label"], file)
    structures_file = Path(arguments.pairs, "structures.parquet")
    structures = read(structures_file, STRUCTURES) if structures_file.is_file() else None
    output = make_folder(arguments.output)
    kinds = {kind: KINDS[kind] for kind in arguments.kinds or KINDS}
    perturbed = perturb(pairs, schema, kinds, arguments.seed, structures)
    if perturbed.pairs.empty:
        raise UserError(f"{file}: none of {', '.join(kinds)} applies to any pair: {perturbed.skipped}.")
    changed = perturbed.pairs
    changed.assign(pair_id=pairs["pair_id"].to_numpy()[changed["row"]]).to_parquet(output / "perturbed.parquet")
    texts = _texts(pairs, perturbed)
    systems = {}
    for name, model in models.items():
        probabilities = _score(name, model, texts, schema, arguments, output)
        systems[name] = measure(pairs, perturbed, probabilities, schema, arguments.draws, arguments.seed)
        systems[name]["weights_sha256"] = weights_sha256(model)
    report = {
        "command": command_line("recipes.evaluate.robustness", arguments),
        "pairs": len(pairs),
        "queries": int(pairs.groupby(["locale", "query"]).ngroups),
        "pairs_sha256": sha256(file),
        "new_labels_known": structures is not None,
        "skipped": perturbed.skipped,
        "systems": systems,
        "environment": environment(),
        "arguments": to_dict(arguments),
    }
    (output / "table.md").write_text(table(report), encoding="utf-8")
    plot(report, output / "plot.png")
    write_json(output / "robustness.json", report)
    return report


def named(models: list[str]) -> dict[str, str]:
    """Split NAME=DIR.

    Raises:
        UserError: One is not that, or a name is given twice.
    """
    found: dict[str, str] = {}
    for text in models:
        name, _, model = text.partition("=")
        if not name or not model or name in found or "/" in name:
            raise UserError(f"--models {text}: expected NAME=DIR, each name once, e.g. gat=runs/esci/gat.")
        found[name] = model
    return found


def _texts(pairs: pd.DataFrame, perturbed: Perturbed) -> pd.DataFrame:
    """Put the pairs as they are before the perturbed ones: `pair_id`, `query`, `product_title`."""
    import pandas as pd

    changed = perturbed.pairs
    ids = pairs["pair_id"].to_numpy()[changed["row"]] + "/" + changed["kind"].to_numpy()
    columns = ["pair_id", "query", "product_title"]
    return pd.concat([pairs[columns], changed.assign(pair_id=ids)[columns]], ignore_index=True)


def _score(
    name: str, model: str, texts: pd.DataFrame, schema: LabelSchema, arguments: RobustnessArguments, output: Path
) -> NDArray[np.float32]:
    """Return the probabilities `(texts, classes)` in the order of the schema; read them where they lie already."""
    import numpy as np

    from recipes.evaluate.predict import load, predict, schema_order

    digest = hashlib.sha256(f"{model} {weights_sha256(model)} {arguments.max_length} {schema.names}".encode())
    for column in ("query", "product_title"):
        digest.update("\x00".join(texts[column]).encode())
    file = output / f"probabilities-{name}-{digest.hexdigest()[:16]}.npy"
    if file.is_file():
        return np.load(file)
    student, tokenizer = load(model, schema, device=arguments.device)
    max_length = arguments.max_length or min(tokenizer.model_max_length, 512)
    order = schema_order(student.config.id2label, schema, model)
    print(f"{name}: {len(texts):,} pairs")
    probabilities = predict(student, tokenizer, texts, arguments.batch_size, max_length)[:, order]
    for old in output.glob(f"probabilities-{name}-*.npy"):
        old.unlink()
    temporary = file.with_suffix(".tmp.npy")
    np.save(temporary, probabilities)
    temporary.replace(file)
    return probabilities


def measure(
    pairs: pd.DataFrame,
    perturbed: Perturbed,
    probabilities: NDArray[np.float32],
    schema: LabelSchema,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Compare a student's predictions before and after.

    Args:
        pairs: Contract pairs.
        perturbed: See `recipes.data.perturb.perturb`.
        probabilities: Of the pairs, then of the perturbed ones `(pairs + perturbed, classes)`.
        schema: The classes.
        draws: Bootstrap draws.
        seed: Of the draws.

    Returns:
        `accuracy`; `preserving`: kind -> `flip`, `before`, `after`, `drop` (before minus after); `changing`: kind ->
        `fooled`, and `after` where all new labels are known.
    """
    import numpy as np

    from recipes.data.perturb import CHANGING
    from recipes.evaluate.shares import ratios

    names = np.array(schema.names)
    predicted = names[probabilities.argmax(axis=1)]
    first, changed = predicted[: len(pairs)], perturbed.pairs
    gold = pairs["label"].to_numpy()
    query = pairs.groupby(["locale", "query"], sort=False).ngroup().to_numpy()
    everything = np.ones(len(pairs))
    result: dict[str, Any] = {
        "accuracy": ratios([first == gold], [everything], query, draws, seed).entry(0),
        "preserving": {},
        "changing": {},
    }
    for kind, part in changed.groupby("kind", sort=False):
        rows = part["row"].to_numpy()
        before, after = first[rows], predicted[len(pairs) + part.index.to_numpy()]
        label, applied = part["label"].to_numpy(), np.ones(len(rows))
        if kind not in CHANGING:
            hits = [before != after, before == gold[rows], after == gold[rows]]
            found = ratios(hits, [applied] * 3, query[rows], draws, seed)
            values = {name: found.entry(place) for place, name in enumerate(("flip", "before", "after"))}
            result["preserving"][kind] = {**values, "drop": found.difference(1, 2)}
            continue
        known = part["label"].notna().to_numpy()
        wrong_now = ~known | ~np.isin(label, schema.relevant)
        taken_in = wrong_now & np.isin(gold[rows], schema.relevant) & np.isin(before, schema.relevant)
        hits = [taken_in & np.isin(after, schema.relevant), known & (after == label)]
        found = ratios(hits, [taken_in, known], query[rows], draws, seed)
        result["changing"][kind] = {"fooled": found.entry(0), "after": found.entry(1), "applied": len(rows)}
    return result


def main() -> None:
    """Measure robustness from the command line."""
    arguments = parse(RobustnessArguments, __doc__)
    from recipes.evaluate.robustness_report import table

    print(table(robustness(arguments)))
    print(f"Wrote {arguments.output}/robustness.json, table.md, plot.png and perturbed.parquet.")
    print("Next: train with perturbed pairs: python -m recipes.student.distill --config FILE --augment 0.3")


if __name__ == "__main__":
    run(main)
