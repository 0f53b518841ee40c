"""Probe targets of guidance: how much of the gold label and of the teacher's verdict do they carry?

    python -m recipes.rationales.probe --pairs runs/esci/pairs --encoder minilm --output runs/esci/probe \
        --rationales mean=runs/esci/rationales_embedded.parquet residual=runs/esci/residual_embedded.parquet
    python -m recipes.rationales.probe --config recipes/configs/tiny/probe.yaml

A linear probe (logistic regression) on what would guide the student, the mean of a pair's embeddings; cross-validated
by normalised query, with intervals over queries; plain, and with the classes weighed alike. Beside it the same probe on
the embeddings of query and title alone, and the majority class.

Reads: rationales with embeddings (recipes.rationales.embed or .targets). Writes: `probe.json`, `table.md`, `probe.png`.
A target that was fitted on some of its pairs (column `target_fitted`) is probed on the others too, as `NAME (unseen)`:
on pairs that a supervised target was fitted on, a probe says what guides the student, not what the text tells.

The verdict of a pair is what most of its rationales predict (the first, where they tie). Where all predict the gold
label (build --keep consistent) the two are one and only the gold label is probed; and such a file leaves out the pairs
that the teacher got wrong: compare it with others on the same pairs (--common). Killed and started again, it goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.record import sha256, write_json
from recipes.schemas import RATIONALES, make_folder, read, read_pairs

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from recipes.rationales.embed import Encoder

HEAD = (
    "accuracy / macro-F1 × 100, 95 % interval by query bootstrap; cross-validated by query. variance: share × 100 of "
    "the target's variance that lies between the classes, which is what eq. 8 sees of them."
)


@dataclass
class ProbeArguments:
    """What `recipes.rationales.probe` can be told."""

    rationales: list[str] = field(metadata={"help": "NAME=PATH of embedded rationales, one or more."})
    encoder: str = field(metadata={"help": "Embeds query and title: Hub id, local folder, or `minilm`."})
    output: str = field(metadata={"help": "Folder of probe.json, table.md and probe.png."})
    revision: str | None = field(default=None, metadata={"help": "Commit, branch or tag of a Hub encoder."})
    pairs: str | None = field(default=None, metadata={"help": "Folder of pairs: probe those of `split` only."})
    split: str = field(default="train", metadata={"help": "Of `pairs`. Settings are not chosen on test."})
    common: bool = field(default=False, metadata={"help": "Probe only the pairs that every file has."})
    folds: int = field(default=5, metadata={"help": "Parts of the queries."})
    strength: float = field(default=0.01, metadata={"help": "Inverse L2 penalty of the probe (scikit-learn's C)."})
    draws: int = field(default=10_000, metadata={"help": "Bootstrap draws of queries."})
    max_length: int = field(default=256, metadata={"help": "Tokens of a query or title."})


def main() -> None:
    """Run the verb."""
    probe(parse(ProbeArguments, __doc__))


def probe(arguments: ProbeArguments) -> dict[str, Any]:
    """Probe every target, and write the table, the numbers and the plot.

    Returns:
        What `probe.json` holds.

    Raises:
        UserError: A file without embeddings, one class, too few queries, or a malformed option.
    """
    from recipes.rationales.embed import find_encoder
    from recipes.rationales.probing import format_probes, plot_probes

    if arguments.folds < 2 or arguments.strength <= 0 or arguments.draws < 1:
        raise UserError("folds, strength, draws: expected at least 2, more than 0, at least 1.")
    files = _files(arguments.rationales)
    targets = {given: _read_target(path, arguments) for given, path in files}
    if arguments.common:
        shared = set.intersection(*(set(frame["pair_id"]) for frame in targets.values()))
        targets = {name: frame[frame["pair_id"].isin(shared)] for name, frame in targets.items()}
    unseen = {f"{name} (unseen)": frame[~frame["fitted"]] for name, frame in targets.items() if frame["fitted"].any()}
    targets |= {name: frame for name, frame in unseen.items() if len(frame)}
    for name, frame in targets.items():
        _check(name, frame, arguments.folds)
    encoder = find_encoder(arguments.encoder, arguments.revision)
    output = make_folder(arguments.output)
    results = _score(targets, encoder, output / "work", arguments)
    content = {
        "command": command_line("recipes.rationales.probe", arguments),
        "arguments": to_dict(arguments),
        "encoder": [encoder.name, encoder.revision],
        "files_sha256": {name: sha256(path) for name, path in files},
        "targets": results,
    }
    write_json(output / "probe.json", content)
    labels = [label for label in ("gold", "verdict") if any(label in result for result in results.values())]
    text = "\n\n".join([HEAD, *(f"## {label}\n\n{format_probes(results, label)}" for label in labels)])
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    plot_probes(results, labels, output / "probe.png")
    shutil.rmtree(output / "work")
    print(text)
    print(f"wrote {output}/probe.json, table.md and probe.png")
    print("next: python -m recipes.student.distill --rationales FILE --pairs DIR --encoder NAME --output DIR")
    return content


def _score(
    targets: dict[str, pd.DataFrame], encoder: Encoder, work: Path, arguments: ProbeArguments
) -> dict[str, dict[str, Any]]:
    import numpy as np
    import pandas as pd
    from tqdm import tqdm

    from recipes.rationales.probing import score, variance_between
    from recipes.rationales.topic import topic_embeddings

    pairs = pd.concat([frame[["query", "product_title"]] for frame in targets.values()]).drop_duplicates()
    place = {texts: row for row, texts in enumerate(pairs.itertuples(index=False, name=None))}
    topics = topic_embeddings(pairs, encoder, work / "topics", arguments.max_length)
    results: dict[str, dict[str, Any]] = {}
    with tqdm(targets.items(), desc="Probing", unit="target") as bar:
        for name, frame in bar:
            bar.set_postfix_str(name)
            results[name] = {"pairs": len(frame), "queries": int(frame["group"].nunique())}
            for label in _labels(frame):
                rows = frame[frame[label].notna()]
                own = topics[[place[texts] for texts in zip(rows["query"], rows["product_title"], strict=True)]]
                predictions = _predict(rows, label, own, work, arguments)
                scores = score(rows[label].to_numpy(), rows["group"].to_numpy(), predictions, arguments.draws)
                results[name][label] = scores
                embeddings, labels = np.stack(rows["embedding"].to_numpy()), rows[label].to_numpy()
                results[name].setdefault("variance_between", {})[label] = variance_between(embeddings, labels)
    return results


def _files(given: list[str]) -> list[tuple[str, str]]:
    files = [entry.partition("=")[::2] for entry in given]
    for entry, (name, path) in zip(given, files, strict=True):
        if not name or not path:
            raise UserError(f"rationales: expected NAME=PATH, got {entry!r}, e.g. mean=rationales_embedded.parquet.")
    names = [name for name, _ in files]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"rationales: {', '.join(sorted(repeated))} is given twice; every target needs its own name.")
    return files


def _read_target(path: str, arguments: ProbeArguments) -> pd.DataFrame:
    """Return a row a pair: `embedding`, the labels `gold` and `verdict`, the query's `group`, and whether `fitted`."""
    from recipes.rationales.topic import query_groups
    from recipes.student.dataset import mean_embeddings

    rows = read(path, RATIONALES)
    if "cot_embedding" not in rows:
        raise UserError(f"{path}: no column 'cot_embedding'; run recipes.rationales.embed on it first.")
    if arguments.pairs is not None:
        rows = rows[rows["pair_id"].isin(read_pairs(arguments.pairs, [arguments.split])[arguments.split]["pair_id"])]
    if rows.empty:
        raise UserError(f"{path}: no rationale of {arguments.pairs or 'any pair'}, split {arguments.split}.")
    by_pair = rows.groupby("pair_id")
    verdicts = by_pair["predicted_label"].agg(lambda labels: next(iter(_most_frequent(labels)), None))
    fitted = by_pair["target_fitted"].any() if "target_fitted" in rows else dict.fromkeys(rows["pair_id"], False)
    pairs = rows.drop_duplicates("pair_id")[["pair_id", "query", "product_title", "label"]].reset_index(drop=True)
    return pairs.rename(columns={"label": "gold"}).assign(
        verdict=pairs["pair_id"].map(verdicts),
        fitted=pairs["pair_id"].map(fitted).astype(bool),
        group=query_groups(pairs),
        embedding=pairs["pair_id"].map(mean_embeddings(rows)),
    )


def _most_frequent(labels: pd.Series) -> list[str]:
    """Labels, the most frequent first; those that tie in the order of the file."""
    return list(labels.value_counts(sort=False).sort_values(ascending=False, kind="stable").index)


def _labels(frame: pd.DataFrame) -> list[str]:
    """`gold`, and `verdict` where it is another and not missing throughout."""
    other = frame["verdict"].notna().any() and not (frame["verdict"] == frame["gold"]).all()
    return ["gold", "verdict"] if other else ["gold"]


def _check(name: str, frame: pd.DataFrame, folds: int) -> None:
    from recipes.rationales.probing import check_folds

    for label in _labels(frame):
        rows = frame[frame[label].notna()]
        check_folds(rows[label].to_numpy(), rows["group"].to_numpy(), folds, f"{name}, {label}")


def _predict(
    rows: pd.DataFrame, label: str, topics: np.ndarray, work: Path, arguments: ProbeArguments
) -> dict[str, np.ndarray]:
    """Predict a label from query and title, and from the target; what a run before a kill predicted is kept."""
    import numpy as np

    from recipes.rationales.probing import probe_predictions

    labels, groups = rows[label].to_numpy(dtype=object), rows["group"].to_numpy()
    majority = rows[label].value_counts().index[0]
    predictions = {"query and title": topics, "query and title, balanced": topics}
    embeddings = np.stack(rows["embedding"].to_numpy())
    predictions |= {"target": embeddings, "target, balanced": embeddings}
    for name, features in predictions.items():
        # Targets of the same pairs share the probe on query and title.
        settings = json.dumps([name, arguments.folds, arguments.strength, [*labels]]).encode()
        file = work / f"{hashlib.sha256(features.tobytes() + settings).hexdigest()}.json"
        if not file.is_file():
            found = probe_predictions(
                features, labels, groups, arguments.folds, arguments.strength, name.endswith("balanced")
            )
            write_json(file, found.tolist())
        predictions[name] = np.array(json.loads(file.read_text(encoding="utf-8")), dtype=object)
    return predictions | {"majority": np.full(len(rows), majority, dtype=object)}


if __name__ == "__main__":
    run(main)
