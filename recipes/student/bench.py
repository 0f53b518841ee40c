"""Train and score several systems over several seeds, and compare them.

    python -m recipes.student.bench --config recipes/configs/student/esci_bench.yaml
    python -m recipes.student.bench --config recipes/configs/tiny/bench.yaml

A finished run is one line of `runs.jsonl`; started again, the bench goes on where it was, and systems or seeds added
to the recipe later are trained beside what is there. Each run is a folder that `recipes.student.distill` and
`recipes.evaluate.run` wrote, so any of them can be loaded, resumed or scored alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.arguments import UserError, build, parse, read_yaml, run
from recipes.evaluate.compare import CompareArguments, write_comparison
from recipes.evaluate.run import RunArguments, evaluate
from recipes.student.distill import DistillArguments, distill

RUNS = "runs.jsonl"


@dataclass
class BenchArguments:
    """Options of a bench."""

    student: str = field(metadata={"help": "Recipe of recipes.student.distill that all systems share."})
    systems: dict = field(metadata={"help": "Name -> what differs from the shared recipe, and `seeds`."})
    baseline: str = field(metadata={"help": "System that the others are compared with."})
    output: str = field(metadata={"help": "Folder of the runs, runs.jsonl and the comparison."})
    pairs: str | None = field(default=None, metadata={"help": "Folder of pairs, instead of the shared recipe's."})
    rationales: str | None = field(default=None, metadata={"help": "Rationales, instead of the shared recipe's."})
    split: str = field(default="test", metadata={"help": "Split that the comparison is made on."})


@dataclass(frozen=True)
class PlannedRun:
    """One system with one seed."""

    system: str
    seed: int
    student: DistillArguments


def plan(arguments: BenchArguments) -> list[PlannedRun]:
    """Return every run, all of them checked before the first is trained; systems in turn within a seed.

    Raises:
        UserError: A system has an option that `distill` does not know, no seeds, or the baseline is not a system.
    """
    shared = read_yaml(DistillArguments, arguments.student)
    shared |= {name: value for name in ("pairs", "rationales") if (value := getattr(arguments, name)) is not None}
    if arguments.baseline not in arguments.systems:
        raise UserError(f"baseline {arguments.baseline!r} is not one of the systems {', '.join(arguments.systems)}.")
    known = DistillArguments.__dataclass_fields__
    planned = []
    for position, (system, changes) in enumerate(arguments.systems.items()):
        options = dict(changes)
        seeds = options.pop("seeds", [0])
        unknown = [name for name in options if name not in known]
        if unknown or not seeds:
            problem = f"unknown option {unknown[0]!r}" if unknown else "no seeds"
            raise UserError(f"system {system!r}: {problem}. It takes options of recipes.student.distill, and `seeds`.")
        for seed in seeds:
            output = str(Path(arguments.output, f"{system}-{seed}"))
            student = build(
                DistillArguments, {**shared, **options, "seed": seed, "output": output}, f"system {system!r}"
            )
            planned.append((seed, position, PlannedRun(system, seed, student)))
    return [planned_run for _, _, planned_run in sorted(planned, key=lambda item: item[:2])]


def run_one(planned: PlannedRun, split: str) -> dict[str, Any]:
    """Train, score, and return the line of `runs.jsonl`; what is already there is not done again."""
    student = planned.student
    record = distill(student)
    evaluation = Path(student.output, f"evaluation-{split}")
    if (evaluation / "metrics.json").is_file():
        metrics = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
    else:
        metrics = evaluate(
            RunArguments(
                model=student.output,
                pairs=student.pairs,
                output=str(evaluation),
                split=split,
                labels=student.labels,
                max_length=student.max_length,
                device=student.device,
            )
        )
    overall = metrics["overall"]
    return {
        "system": planned.system,
        "seed": planned.seed,
        "predictions": str(evaluation.relative_to(Path(student.output).parent) / "predictions.parquet"),
        "split": split,
        **{name: overall[name] for name in ("accuracy", "macro_f1", "ndcg")},
        "validation_accuracy": record["validation"]["accuracy"],
        "validation_macro_f1": record["validation"]["macro_f1"],
        "parameters": record["parameters"],
        "train_seconds": record["train_seconds"],
    }


def bench(arguments: BenchArguments) -> dict[str, Any]:
    """Run what is missing, then compare; return what compare.json holds."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading and saving; training keeps its own
    output = Path(arguments.output)
    runs_file = output / RUNS
    planned = plan(arguments)
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for number, one in enumerate(planned, start=1):
        print(f"[{number}/{len(planned)}] {one.system}, seed {one.seed}", flush=True)
        lines[one.system, one.seed] = run_one(one, arguments.split)
        # Rewritten whole: a line of a system that left the recipe must not enter its comparison.
        text = "".join(json.dumps(line) + "\n" for line in lines.values())
        runs_file.write_text(text, encoding="utf-8")
    return write_comparison(
        CompareArguments(
            baseline=arguments.baseline,
            output=str(output / "comparison"),
            runs_file=str(runs_file),
            labels=planned[0].student.labels,
        )
    )


def main() -> None:
    """Run a bench from the command line."""
    arguments = parse(BenchArguments, __doc__)
    from recipes.evaluate.report import format_slice

    comparison = bench(arguments)
    print("\n" + format_slice("overall", comparison, markdown=False))
    print(f"Wrote {arguments.output}/{RUNS}, and table.md, plot.png and compare.json in {arguments.output}/comparison.")
    print("Next: look at the plot; add systems or seeds to the recipe and run it again.")


if __name__ == "__main__":
    run(main)
