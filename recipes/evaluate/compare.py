"""Compare systems scored on the same pairs: means over seeds, intervals, paired tests against a baseline, a plot.

    python -m recipes.evaluate.compare --runs none=runs/eval/none gat=runs/eval/gat --baseline none --output DIR
    python -m recipes.evaluate.compare --runs 'none=runs/eval/none-*' 'gat=runs/eval/gat-*' --baseline none --output DIR
    python -m recipes.evaluate.compare --runs_file runs/esci/runs.jsonl --baseline none --output runs/compare

A run is what recipes.evaluate.run wrote: a folder with predictions.parquet, or that file. `NAME=DIR` given more than
once, or a DIR with a wildcard, is one system with several seeds (`seed` of metrics.json, else 0, 1, ... in order).
A runs file has one JSON object a line with `system`, `predictions` (relative to the runs file) and optional `seed`.

With `--logit_adjustment 1 --pairs PAIRS` every system decides by balanced error (recipes.evaluate.adjust).

Writes compare.json, table.md and plot.png: overall, and for each locale where there are several.

What is computed:
- Mean and standard deviation (n - 1) over seeds.
- 95 % intervals: 10,000 draws of the queries, the same draws for all systems and seeds; in each draw the metric is
  averaged over a system's seeds. They say how far the result depends on the queries, not on the seeds: that is `sd`.
- p-values of a difference to the baseline: from those draws (two-sided, the percentile interval inverted).
- Exact McNemar on accuracy, seed by seed over the seeds that both systems have, combined as twice the median. It
  takes pairs as independent, which pairs of one query are not: trust the bootstrap where the two disagree.
- Holm over the systems compared with the baseline: one family for each metric, test and slice.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, parse, run, to_dict
from recipes.record import write_json

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from recipes.evaluate.runs import Run
    from recipes.evaluate.significance import QueryStatistics
    from recipes.schemas import LabelSchema


@dataclass
class CompareArguments:
    """Options of `recipes.evaluate.compare`."""

    baseline: str = field(metadata={"help": "Name of the system that the others are compared with."})
    output: str = field(metadata={"help": "Folder to write compare.json, table.md and plot.png to."})
    runs: list[str] = field(default_factory=list, metadata={"help": "NAME=DIR ..., wildcards allowed in DIR."})
    runs_file: str | None = field(default=None, metadata={"help": "JSON lines: system, predictions, seed."})
    labels: str = field(default="esci", metadata={"help": "Label schema: a name in recipes/labels or a YAML file."})
    draws: int = field(default=10_000, metadata={"help": "Bootstrap draws."})
    bootstrap_seed: int = field(default=0, metadata={"help": "Seed of the bootstrap."})
    logit_adjustment: float = field(
        default=0.0, metadata={"help": "τ by which all predictions are adjusted (recipes.evaluate.adjust)."}
    )
    pairs: str | None = field(
        default=None, metadata={"help": "For logit_adjustment: folder of the pairs that the systems were trained on."}
    )


def write_comparison(arguments: CompareArguments) -> dict[str, Any]:
    """Read the runs, align them, compare, write; return what compare.json holds.

    Raises:
        UserError: See `compare`; or the output folder cannot be written.
    """
    from recipes.evaluate.adjust import log_offsets
    from recipes.evaluate.runs import list_runs
    from recipes.schemas import load_labels

    schema = load_labels(arguments.labels)
    runs = list_runs(arguments.runs, arguments.runs_file)
    if (arguments.logit_adjustment != 0) != (arguments.pairs is not None):
        raise UserError(
            f"--logit_adjustment {arguments.logit_adjustment} and --pairs {arguments.pairs}: give both, or neither. "
            "The pairs are those of the training, whose classes' shares are taken out."
        )
    offsets = log_offsets(arguments.logit_adjustment, arguments.pairs, schema) if arguments.pairs else None
    comparison = compare(runs, arguments.baseline, schema, arguments.draws, arguments.bootstrap_seed, offsets)
    comparison["arguments"] = to_dict(arguments)
    save_comparison(comparison, Path(arguments.output))
    return comparison


def save_comparison(comparison: dict[str, Any], output: Path) -> None:
    """Write compare.json, table.md and plot.png into the folder `output`.

    Raises:
        UserError: They cannot be written.
    """
    from recipes.evaluate.report import format_slice, plot_comparison

    try:
        output.mkdir(parents=True, exist_ok=True)
        tables = "\n".join(format_slice(name, comparison, markdown=True) for name in comparison["slices"])
        (output / "table.md").write_text(tables, encoding="utf-8")
        plot_comparison(comparison, output / "plot.png")
        write_json(output / "compare.json", comparison)
    except OSError as error:
        raise UserError(f"{output}: could not be written ({error}). Free space or choose another --output.") from None


def compare(
    runs: list[Run],
    baseline: str,
    schema: LabelSchema,
    draws: int,
    bootstrap_seed: int,
    offsets: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """Compare the systems overall and, where there are several locales, in each.

    Raises:
        UserError: The baseline or a rival is missing, a file breaks the contract of predictions, or the runs are not
            on the same pairs and labels.
    """
    systems = list(dict.fromkeys(run.system for run in runs))
    if baseline not in systems or len(systems) < 2:
        raise UserError(
            f"--baseline {baseline}: expected the name of one of at least two systems; "
            f"--runs and --runs_file name: {', '.join(systems) or 'none'}."
        )
    if draws < 100:
        raise UserError(f"--draws {draws}: expected at least 100; with 10000 the smallest p-value is 0.0002.")
    return compare_scored(score(runs, schema, offsets), baseline, draws, bootstrap_seed)


@dataclass
class ScoredRuns:
    """Runs on the same pairs, counted by query: what any of them can be compared by.

    Attributes:
        runs: The runs.
        statistics: Counts and nDCG by query, runs in the order of `runs`.
        right: Which pairs each run classifies right `(runs, pairs)`.
        query: Index of each pair's query `(pairs,)`.
        ranking: One row a query: `locale`, `ndcg` and `contested` (nDCG is missing for the same queries in every run).
    """

    runs: list[Run]
    statistics: QueryStatistics
    right: NDArray[np.bool_]
    query: NDArray[np.int64]
    ranking: pd.DataFrame


def score(runs: list[Run], schema: LabelSchema, offsets: NDArray[np.float64] | None = None) -> ScoredRuns:
    """Read the predictions of the runs and count them by query.

    Args:
        runs: At least one.
        schema: The classes of all.
        offsets: What is taken off everybody's logits before they decide, `(classes,)`; see `recipes.evaluate.adjust`.

    Raises:
        UserError: A file breaks the contract of predictions, or the runs are not on the same pairs and labels.
    """
    import numpy as np

    from recipes.evaluate.adjust import adjust_predictions
    from recipes.evaluate.metrics import ranking_by_query, to_arrays
    from recipes.evaluate.runs import read_aligned
    from recipes.evaluate.significance import query_statistics

    tables = read_aligned(runs, schema)
    if offsets is not None:
        tables = [
            adjust_predictions(table, schema, offsets, str(run.predictions))
            for run, table in zip(runs, tables, strict=True)
        ]
    query = tables[0].groupby(["locale", "query"], sort=False).ngroup().to_numpy()
    arrays = [to_arrays(table, schema, str(run.predictions)) for run, table in zip(runs, tables, strict=True)]
    gold, predicted = arrays[0][0], np.stack([predicted for _, predicted, _ in arrays])
    rankings = [ranking_by_query(table, schema) for table in tables]
    ndcg = np.stack([ranking["ndcg"] for ranking in rankings])
    statistics = query_statistics(query, gold, predicted, ndcg, len(schema.names))
    return ScoredRuns(runs, statistics, predicted == gold, query, rankings[0])


def compare_scored(
    scored: ScoredRuns, baseline: str, draws: int, bootstrap_seed: int, systems: Sequence[str] | None = None
) -> dict[str, Any]:
    """Compare scored runs with those of `baseline`: all, or those of `systems`. Return what compare.json holds."""
    import numpy as np

    chosen_systems = {run.system for run in scored.runs} if systems is None else {*systems, baseline}
    indices = [index for index, run in enumerate(scored.runs) if run.system in chosen_systems]
    indices.sort(key=lambda index: scored.runs[index].system != baseline)  # stable: the others as given
    runs = [scored.runs[index] for index in indices]
    statistics, right = scored.statistics.of_runs(indices), scored.right[indices]
    locales = scored.ranking["locale"].to_numpy()
    slices = {"overall": np.ones(len(locales), dtype=bool)}
    if len(set(locales)) > 1:
        slices |= {locale: locales == locale for locale in sorted(set(locales))}
    return {
        "baseline": baseline,
        "holm_family": "the systems compared with the baseline; one family for each metric, test and slice",
        "draws": draws,
        "bootstrap_seed": bootstrap_seed,
        "slices": {
            name: {
                "pairs": int(chosen[scored.query].sum()),
                "queries": int(chosen.sum()),
                "ndcg_queries": int(scored.ranking["ndcg"][chosen].notna().sum()),
                "ndcg_contested_queries": int(scored.ranking["contested"][chosen].sum()),
                **compare_slice(
                    runs, statistics.select(chosen), right[:, chosen[scored.query]], draws, bootstrap_seed, name
                ),
            }
            for name, chosen in slices.items()
        },
    }


def compare_slice(
    runs: list[Run],
    statistics: QueryStatistics,
    right: NDArray[np.bool_],
    draws: int,
    bootstrap_seed: int,
    name: str,
) -> dict[str, Any]:
    """Compare the systems on the queries of `statistics`.

    Args:
        runs: The first run's system is the baseline.
        statistics: Counts and nDCG by query, runs in the order of `runs`.
        right: Which pairs each run classifies right `(runs, pairs)`.
        draws: Bootstrap draws.
        bootstrap_seed: Seed of the draws.
        name: What the progress bar calls the slice.

    Returns:
        `systems` (system -> seeds, metrics) and `differences` (system -> metric -> difference to the baseline with
        interval and p-values, and `mcnemar`). nDCG is left out where no query has one.
    """
    import numpy as np
    from tqdm import tqdm

    from recipes.evaluate import significance
    from recipes.evaluate.significance import METRICS

    baseline, *others = list(dict.fromkeys(run.system for run in runs))
    members = {s: [index for index, run in enumerate(runs) if run.system == s] for s in (baseline, *others)}
    observed = significance.metrics_of_draws(np.ones((1, len(statistics.gold))), statistics)[0]  # (METRICS, runs)
    drawn: dict[str, list[NDArray[np.float64]]] = {system: [] for system in members}
    with tqdm(total=draws, unit="draw", desc=f"bootstrap {name}", delay=1) as bar:
        for chunk in significance.bootstrap(statistics, draws, bootstrap_seed):
            for system, indices in members.items():
                drawn[system].append(chunk[:, :, indices].mean(axis=2))
            bar.update(len(chunk))
    samples = {system: np.concatenate(chunks) for system, chunks in drawn.items()}  # (draws, METRICS)

    systems: dict[str, Any] = {s: {"seeds": [runs[i].seed for i in members[s]], "metrics": {}} for s in members}
    differences: dict[str, Any] = {system: {} for system in others}
    for position, metric in enumerate(METRICS):
        if np.isnan(observed[position]).any():
            continue
        for system, indices in members.items():
            values = observed[position, indices]
            systems[system]["metrics"][metric] = {
                "mean": float(values.mean()),
                "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
                "interval": significance.interval(samples[system][:, position]),
                "by_seed": values.tolist(),
            }
        for system in others:
            difference = samples[system][:, position] - samples[baseline][:, position]
            means = (systems[name]["metrics"][metric]["mean"] for name in (system, baseline))
            differences[system][metric] = {
                "difference": operator.sub(*means),
                "interval": significance.interval(difference),
                "p": significance.bootstrap_p_value(difference),
            }
    index_of = {(run.system, run.seed): index for index, run in enumerate(runs)}
    for system in others:
        common = [seed for seed in systems[system]["seeds"] if seed in systems[baseline]["seeds"]]
        p_values = [
            significance.exact_mcnemar(right[index_of[system, seed]], right[index_of[baseline, seed]])
            for seed in common
        ]
        if common:
            differences[system]["mcnemar"] = {
                "p": significance.combine_p_values(p_values),
                "by_seed": dict(zip(common, p_values, strict=True)),
            }
    for test in (*METRICS, "mcnemar"):
        family = [differences[system][test] for system in others if test in differences[system]]
        for result, adjusted in zip(family, significance.holm([result["p"] for result in family]), strict=True):
            result["p_holm"] = adjusted
    return {"systems": systems, "differences": differences}


def main() -> None:
    """Compare from the command line."""
    arguments = parse(CompareArguments, __doc__)
    from recipes.evaluate.report import format_slice

    print(format_slice("overall", write_comparison(arguments), markdown=False))
    print(f"Wrote {arguments.output}/compare.json, table.md (each locale too) and plot.png.")
    print("Next: look at the plot, and write down what was learnt, negative results included, in recipes/NOTES.md.")


if __name__ == "__main__":
    run(main)
