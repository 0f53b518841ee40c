"""Train and score a matrix of systems, seeds and datasets, and compare them.

    python -m recipes.student.bench --config recipes/configs/student/esci_bench.yaml
    python -m recipes.student.bench --config recipes/configs/student/esci_matrix.yaml --workers 2
    python -m recipes.student.bench --config recipes/configs/tiny/bench.yaml
    python -m recipes.student.tables --config recipes/configs/student/esci_matrix.yaml       # of what is finished

A finished run is one line of `runs.jsonl`; started again, the bench goes on where it was, and systems, seeds or
datasets added to the recipe later are trained beside what is there. Each run is a folder that
`recipes.student.distill` and `recipes.evaluate.run` wrote, so any of them can be loaded, resumed or scored alone.

A run that fails stops no other: why is in the tables, the details are in `logs/`, the exit status is 1, and the next
start tries it again.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recipes.arguments import UserError, parse, run
from recipes.evaluate.run import RunArguments, evaluate
from recipes.record import sha256
from recipes.schemas import make_folder
from recipes.student.distill import distill, settings_of
from recipes.student.plan import DEFAULTS, BenchArguments, PlannedRun, finished_line, plan
from recipes.student.saving import claim_folder
from recipes.student.tables import write_tables
from recipes.student.workers import run_all, stopping_politely

RUNS = "runs.jsonl"


def train_and_score(planned: PlannedRun, split: str) -> None:
    """Train and score, or average; a student that is already there is not trained again.

    Raises:
        UserError: The data or the settings are not what training, averaging or scoring needs.
    """
    evaluation = planned.folder / f"evaluation-{split}"
    student = planned.student
    if planned.members:
        from recipes.evaluate.ensemble import average

        folders = [planned.folder.with_name(f"{member}-{planned.seed}") for member in planned.members]
        average([folder / evaluation.name / "predictions.parquet" for folder in folders], evaluation, student.labels)
        return
    scored = Path(student.pairs, f"{split}.parquet")
    if Path(student.pairs).is_dir() and not scored.is_file():  # now, not after the training
        raise UserError(f"{scored}: no such file. Expected the pairs to score: choose another `split`, or make it.")
    distill(student)
    if not (evaluation / "metrics.json").is_file():
        evaluate(
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


class Progress:
    """What has become of the runs: on screen, in runs.jsonl, and beside the folder of one that failed."""

    def __init__(self, planned: Sequence[PlannedRun], split: str) -> None:
        self.planned = planned
        self.split = split
        self.lines: dict[str, dict[str, Any]] = {}  # by the run's name, as is the next
        self.failed: dict[str, str] = {}

    def find_finished(self) -> None:
        """Take over what earlier starts have finished, if it was made of the same settings and data."""
        for one in self.planned:
            try:
                if not one.student.overwrite and (line := finished_line(one, self.split)) is not None:
                    if not one.members:
                        claim_folder(one.folder, settings_of(one.student), overwrite=False, defaults=DEFAULTS)
                        check_scored(one, self.split)
                    elif not self._members_finished(one):
                        continue
                    self.lines[one.name] = line
                    one.failure().unlink(missing_ok=True)
            except (UserError, OSError) as error:
                self._fail(one, str(error))
        self._write()

    def missing(self) -> list[PlannedRun]:
        """Return the runs that are to be trained."""
        return [one for one in self._open() if not one.members]

    def ended(self, one: PlannedRun, failure: str | None) -> None:
        """Record a run that has ended, and average what can be averaged now."""
        if failure is not None:
            self._fail(one, failure)
            return
        one.failure().unlink(missing_ok=True)
        line = finished_line(one, self.split)
        assert line is not None, one.name
        self.lines[one.name] = line
        self._say(one, f"accuracy {line['accuracy']:.4f}, macro-F1 {line['macro_f1']:.4f}")
        self._write()
        self.average()

    def average(self) -> None:
        """Average the systems whose members are all there."""
        for one in self._open():
            if one.members and self._members_finished(one):
                self.ended(one, attempt(one, self.split))

    def _members_finished(self, one: PlannedRun) -> bool:
        finished = {(line.get("dataset"), line["seed"], line["system"]) for line in self.lines.values()}
        return all((one.dataset, one.seed, member) in finished for member in one.members)

    def _open(self) -> list[PlannedRun]:
        return [one for one in self.planned if one.name not in self.lines and one.name not in self.failed]

    def _fail(self, one: PlannedRun, failure: str) -> None:
        self.failed[one.name] = " ".join(failure.split())
        one.failure().parent.mkdir(parents=True, exist_ok=True)
        one.failure().write_text(self.failed[one.name] + "\n", encoding="utf-8")
        self._say(one, f"FAILED: {self.failed[one.name]}")

    def _say(self, one: PlannedRun, what: str) -> None:
        # Not `print`: it would write into the progress bar.
        tqdm.write(f"[{len(self.lines) + len(self.failed)}/{len(self.planned)}] {one.name}: {what}", file=sys.stdout)

    def _write(self) -> None:
        # Rewritten whole: a line of a system that left the recipe must not enter its comparison.
        texts: dict[Path, str] = {}
        for one in self.planned:
            if one.name in self.lines:
                file = one.folder.parent / RUNS
                texts[file] = texts.get(file, "") + json.dumps(self.lines[one.name]) + "\n"
        for file, text in texts.items():
            temporary = file.with_name(f".{file.name}.tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(file)


def check_scored(one: PlannedRun, split: str) -> None:
    """Check that a finished run was scored on the pairs that are there now.

    Raises:
        UserError: On others.
    """
    evaluation = one.folder / f"evaluation-{split}"
    pairs = Path(one.student.pairs, f"{split}.parquet")
    facts = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8")).get("facts", {})
    if pairs.is_file() and facts.get("pairs_sha256") not in (None, sha256(pairs)):
        raise UserError(f"{evaluation}: scored on another {pairs} than is there now. Remove it to score the run again.")


def attempt(one: PlannedRun, split: str) -> str | None:
    """Train and score in this process; return why it failed, None if it did not."""
    try:
        train_and_score(one, split)
    except Exception as error:  # whatever stops one run must not stop the others
        one.log().parent.mkdir(parents=True, exist_ok=True)
        one.log().write_text(traceback.format_exc(), encoding="utf-8")
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return None


def bench(arguments: BenchArguments) -> dict[str, Any]:
    """Run what is missing, then write the tables of what is there; return what tables.json holds.

    Raises:
        UserError: The recipe is wrong (see `plan`), or the output cannot be written. A failing run raises nothing.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading and saving; training keeps its own
    planned = plan(arguments)
    make_folder(arguments.output)
    progress = Progress(planned, arguments.split)
    progress.find_finished()
    missing = progress.missing()
    if progress.lines:
        print(f"{len(progress.lines)} of {len(planned)} runs are finished already.")
    if arguments.workers > 1:
        print(f"{arguments.workers} at a time; what each says is in {arguments.output}/**/logs.", flush=True)
        run_all(missing, arguments.workers, arguments.split, progress.ended)
    else:
        for one in missing:
            print(f"{one.system}, seed {one.seed}{'' if one.dataset is None else f', {one.dataset}'}", flush=True)
            progress.ended(one, attempt(one, arguments.split))
    progress.average()
    return write_tables(arguments)


def main() -> None:
    """Run a bench from the command line."""
    arguments = parse(BenchArguments, __doc__)
    from recipes.student.layout import format_terminal
    from recipes.student.tables import where

    with stopping_politely():
        tables = bench(arguments)
    print("\n" + format_terminal(tables))
    print(where(arguments))
    print("Next: look at the plots; add systems or seeds to the recipe and run it again.")
    if tables["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
