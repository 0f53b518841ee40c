"""Tables and plots of a bench, from the runs that are finished: nothing is trained.

    python -m recipes.student.tables --config recipes/configs/student/esci_matrix.yaml

Takes the recipe and options of recipes.student.bench. Writes into the folder of the bench tables/: tables.md,
tables.json, differences-<baseline>.png, accuracy_f1.png, training_time.png; and for each dataset and baseline what
recipes.evaluate.compare writes, every locale too: comparison/ and, for a second baseline, comparison-<baseline>/.

- Table 1: accuracy and macro-F1 by dataset and locale, mean ± sd over seeds, 95 % interval over queries.
- Differences to each baseline, with intervals, and p-values after Holm over all systems of the recipe.
- Ablations, as in Tables 4 and 6: differences to the full system; a Holm family each.
- What each system costs: parameters, and time of training (of a run that was killed, since its last start).
With `--logit_adjustment 1` all systems decide by balanced error (recipes.evaluate.adjust), in folders -adjusted.
Runs that failed or are still to come are named; they are in no figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.arguments import UserError, parse, run, to_dict
from recipes.record import write_json
from recipes.student.plan import BenchArguments, PlannedRun, finished_line, plan

BOOTSTRAP_SEED = 0


def write_tables(arguments: BenchArguments) -> dict[str, Any]:
    """Compare what is finished, write tables and plots, and return what tables.json holds.

    Raises:
        UserError: The recipe is wrong, no run is finished, or the output cannot be written.
    """
    from recipes.evaluate.compare import save_comparison
    from recipes.student.layout import format_markdown, plot_tables

    tables = collect(arguments, plan(arguments))
    adjusted = "-adjusted" if arguments.logit_adjustment else ""
    folder = Path(arguments.output, f"tables{adjusted}")
    for dataset, content in tables["datasets"].items():
        for baseline, comparison in content["comparisons"].items():
            name = f"comparison{adjusted}" + ("" if baseline == arguments.baselines[0] else f"-{baseline}")
            save_comparison(comparison, Path(arguments.output, dataset, name))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tables.md").write_text(format_markdown(tables), encoding="utf-8")
        plot_tables(tables, folder)
        write_json(folder / "tables.json", tables)
    except OSError as error:
        raise UserError(f"{folder}: could not be written ({error}). Free space or choose another --output.") from None
    return tables


def collect(arguments: BenchArguments, planned: Sequence[PlannedRun]) -> dict[str, Any]:
    """Read the finished runs and compare them, dataset by dataset.

    Returns:
        `datasets`: name ("" without datasets) -> `systems` (slice -> system -> metric -> mean, sd, interval),
        `comparisons` (baseline -> what compare.json holds), `ablations` (full system -> the same), and `costs` (system
        -> runs planned and finished, parameters, seconds); `failed` and `unfinished` runs; `blocks`; `arguments`.

    Raises:
        UserError: No run is finished.
    """
    tables: dict[str, Any] = {"datasets": {}, "failed": {}, "unfinished": []}
    for dataset in dict.fromkeys(one.dataset for one in planned):
        lines: dict[str, list[dict[str, Any]]] = {system: [] for system in arguments.systems}
        here = [one for one in planned if one.dataset == dataset]
        for one in here:  # averages after their members
            try:
                line = finished_line(one, arguments.split)
            except UserError as error:  # of other settings
                tables["failed"][one.name] = str(error)
                continue
            members_there = all(one.seed in [found["seed"] for found in lines[member]] for member in one.members)
            if one.failure().is_file():  # finished once or not: the bench's last word, e.g. of other data
                tables["failed"][one.name] = one.failure().read_text(encoding="utf-8").strip()
            elif line is not None and members_there:
                lines[one.system].append(line)
            else:
                tables["unfinished"].append(one.name)
        content = _compare(arguments, here, {system: found for system, found in lines.items() if found})
        content["costs"] = {
            system: {
                "runs_planned": sum(one.system == system for one in here),
                "runs": len(found),
                "parameters": found[0]["parameters"] if found else None,
                "train_seconds": [line["train_seconds"] for line in found],
            }
            for system, found in lines.items()
        }
        tables["datasets"][dataset or ""] = content
    if not any(content["systems"] for content in tables["datasets"].values()):
        why = "".join(f"\n  {name}: {failure}" for name, failure in tables["failed"].items())
        raise UserError(
            f"{arguments.output}: no run of the recipe is finished. python -m recipes.student.bench trains them.{why}"
        )
    placed = {system for systems in arguments.blocks.values() for system in systems}
    rest = [system for system in arguments.systems if system not in placed]
    return {
        **tables,
        "split": arguments.split,
        "blocks": {**arguments.blocks, **({"": rest} if rest else {})},
        "arguments": to_dict(arguments),
    }


def _compare(
    arguments: BenchArguments, planned: Sequence[PlannedRun], lines: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    from recipes.evaluate.adjust import log_offsets
    from recipes.evaluate.compare import compare_scored, score
    from recipes.evaluate.runs import Run
    from recipes.schemas import load_labels

    if not lines:
        return {"systems": {}, "comparisons": {}, "ablations": {}}
    folder = planned[0].folder.parent
    runs = [
        Run(system, line["seed"], folder / line["predictions"]) for system, found in lines.items() for line in found
    ]
    student, tau = planned[0].student, arguments.logit_adjustment
    schema = load_labels(student.labels)
    scored = score(runs, schema, log_offsets(tau, student.pairs, schema) if tau else None)

    def against(baseline: str, systems: Sequence[str] | None = None) -> dict[str, Any]:
        return compare_scored(scored, baseline, arguments.draws, BOOTSTRAP_SEED, systems)

    comparisons = {baseline: against(baseline) for baseline in arguments.baselines if baseline in lines}
    # Without a baseline there is nothing to differ from, but the systems' own figures stand.
    any_comparison = next(iter(comparisons.values())) if comparisons else against(next(iter(lines)))
    return {
        "systems": {
            name: {system: result["metrics"] for system, result in values["systems"].items()}
            for name, values in any_comparison["slices"].items()
        },
        "comparisons": comparisons,
        "ablations": {
            full: against(full, [system for system in others if system in lines])
            for full, others in arguments.ablations.items()
            if full in lines
        },
    }


def where(arguments: BenchArguments) -> str:
    """Say what `write_tables` wrote."""
    adjusted = "-adjusted" if arguments.logit_adjustment else ""
    return (
        f"Wrote {arguments.output}/tables{adjusted}: tables.md, tables.json and plots; every locale and nDCG: table.md "
        f"in {arguments.output}/**/comparison{adjusted}*; runs.jsonl there."
    )


def main() -> None:
    """Write the tables from the command line."""
    arguments = parse(BenchArguments, __doc__)
    from recipes.student.layout import format_terminal

    print(format_terminal(write_tables(arguments)))
    print(where(arguments))
    print("Next: python -m recipes.student.bench with the same recipe trains what is missing.")


if __name__ == "__main__":
    run(main)
