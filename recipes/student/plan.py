"""What a bench will run: systems x seeds x datasets of one recipe, all checked before the first is trained."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from recipes.arguments import UserError, build, check_keys, read_yaml, to_dict
from recipes.record import sha256
from recipes.student.distill import DistillArguments, check_options
from recipes.student.saving import RECORD

OF_A_SYSTEM = ("seeds", "datasets", "members")
OF_THE_BENCH = ("seed", "output")  # what it sets itself: said elsewhere, it would be ignored
NOT_A_SETTING = ("output", "overwrite", "logging_steps", "device")  # another value makes no other student
DEFAULTS = {option.name: option.default for option in fields(DistillArguments)}  # of a run from before an option was


@dataclass
class BenchArguments:
    """Options of a bench."""

    student: str = field(metadata={"help": "Recipe of recipes.student.distill that all systems share."})
    systems: dict = field(
        metadata={"help": "Name -> what differs from the shared recipe; `seeds`; `datasets`, if not all; or `members`, "
                          "the systems whose probabilities are averaged. {dataset} in a path is the dataset's name."}
    )  # fmt: skip
    baseline: str | list[str] = field(metadata={"help": "System, or systems, that the others are compared with."})
    output: str = field(metadata={"help": "Folder of the runs, runs.jsonl, the comparisons and the tables."})
    datasets: dict = field(
        default_factory=dict, metadata={"help": "Name -> pairs, rationales, labels, and what else differs there."}
    )
    pairs: str | None = field(default=None, metadata={"help": "Folder of pairs, instead of the shared recipe's."})
    rationales: str | None = field(default=None, metadata={"help": "Rationales, instead of the shared recipe's."})
    split: str = field(default="test", metadata={"help": "Split that the comparison is made on."})
    workers: int = field(default=1, metadata={"help": "Runs at a time, a process each; 1: in this one."})
    blocks: dict = field(default_factory=dict, metadata={"help": "Heading in the table -> its systems."})
    ablations: dict = field(
        default_factory=dict, metadata={"help": "Full system -> those that are compared with it (Tables 4 and 6)."}
    )
    draws: int = field(default=10_000, metadata={"help": "Bootstrap draws of the comparisons."})
    logit_adjustment: float = field(
        default=0.0,
        metadata={"help": "τ: all systems decide by balanced error in the comparisons (recipes.evaluate.adjust); "
                          "tables and comparisons get folders of their own, -adjusted."},
    )  # fmt: skip

    @property
    def baselines(self) -> list[str]:
        """Systems that the others are compared with."""
        return [self.baseline] if isinstance(self.baseline, str) else self.baseline


@dataclass(frozen=True)
class PlannedRun:
    """One system with one seed on one dataset.

    Attributes:
        system: Its name in the recipe.
        seed: Of the training; of an average, the seed of its members.
        dataset: Its name in the recipe, None where the recipe names no datasets.
        student: What is trained; of an average, the options of its first member.
        members: Systems that are averaged instead.
    """

    system: str
    seed: int
    dataset: str | None
    student: DistillArguments
    members: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the run is called on screen and in file names: `esci/lrkd-gat-0`, or without datasets `lrkd-gat-0`."""
        return f"{'' if self.dataset is None else f'{self.dataset}/'}{self.system}-{self.seed}"

    @property
    def folder(self) -> Path:
        """Where the finished student is."""
        return Path(self.student.output)

    def log(self) -> Path:
        """Where a process of its own, or its failure, is recorded."""
        return self.folder.parent / "logs" / f"{self.folder.name}.log"

    def failure(self) -> Path:
        """One line about why the last attempt failed; no such file where it did not."""
        return self.log().with_suffix(".failed")


def plan(arguments: BenchArguments) -> list[PlannedRun]:
    """Return every run in the order in which they are to be trained, so that the table grows evenly.

    First everything of the lowest seed: dataset by dataset, systems as the recipe has them, averages last.

    Raises:
        UserError: A system has an option that `distill` does not know or will not take, no seeds, an unknown dataset
            or member; a baseline, block or ablation names what is no system; a name cannot be that of a folder.
    """
    for name, least in (("workers", 1), ("draws", 100), ("logit_adjustment", 0)):  # as the tables want them
        if getattr(arguments, name) < least:
            raise UserError(f"{name}: expected at least {least}, got {getattr(arguments, name)}.")
    shared = read_yaml(DistillArguments, arguments.student)
    given = {name: value for name in ("pairs", "rationales") if (value := getattr(arguments, name)) is not None}
    if given and arguments.datasets:
        raise UserError(f"{' and '.join(given)}: the recipe has `datasets`; say it there, for each of them.")
    _check_names(arguments)
    datasets = {name: there or {} for name, there in arguments.datasets.items()} or {None: {}}
    keyed = []
    for column, (dataset, there) in enumerate(datasets.items()):
        if not isinstance(there, dict):
            raise UserError(f"dataset {dataset!r}: expected options, e.g. {{pairs: DIR}}; found {there!r}.")
        check_keys(DistillArguments, there, f"dataset {dataset!r}")
        if own := [name for name in OF_THE_BENCH if name in there]:
            raise UserError(f"dataset {dataset!r}: {own[0]!r} is set by the bench, run by run. Take it out.")
        for row, (system, changes) in enumerate(arguments.systems.items()):
            if not isinstance(changes, dict | None):
                raise UserError(f"system {system!r}: expected options, e.g. {{seeds: [0, 1]}}; found {changes!r}.")
            options = dict(changes or {})
            seeds = options.pop("seeds", [0])
            members = options.pop("members", None)
            chosen = options.pop("datasets", list(datasets))
            _check_system(arguments, system, options, seeds, members, chosen)
            members = tuple(members or ())
            if dataset not in chosen:
                continue
            if members:
                options = dict(arguments.systems[members[0]] or {})
                options = {name: value for name, value in options.items() if name not in OF_A_SYSTEM}
            for seed in seeds:
                values = {**shared, **given, **there, **options, "seed": seed}
                values["output"] = str(Path(arguments.output, dataset or "", f"{system}-{seed}"))
                values = {
                    name: value.replace("{dataset}", str(dataset)) if isinstance(value, str) else value
                    for name, value in values.items()
                }
                student = build(DistillArguments, values, f"system {system!r}")
                try:
                    check_options(student)
                except UserError as error:
                    raise UserError(f"system {system!r}: {error}") from None
                keyed.append(((seed, column, bool(members), row), PlannedRun(system, seed, dataset, student, members)))
    planned = [run for _, run in sorted(keyed, key=lambda item: item[0])]
    _check_members(planned)
    return planned


def _check_names(arguments: BenchArguments) -> None:
    for name in (*arguments.systems, *arguments.datasets):
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(
                f"{name!r}: a system or dataset names a folder; use letters, digits, '-', '_', '+', '.', and quotes "
                "around what YAML takes for a number or a truth value."
            )
    known = ", ".join(arguments.systems)
    named: list[tuple[str, Any]] = [
        ("baseline", arguments.baselines),
        *((f"block {title!r}", systems) for title, systems in arguments.blocks.items()),
        ("ablations of", list(arguments.ablations)),
        *((f"ablations of {full!r}", systems) for full, systems in arguments.ablations.items()),
    ]
    for what, systems in named:
        if not isinstance(systems, list):
            raise UserError(f"{what}: expected a list of systems, e.g. [{known}]; found {systems!r}.")
        for system in systems:
            if system not in arguments.systems:
                raise UserError(f"{what} {system!r} is not one of the systems {known}.")


def _check_system(
    arguments: BenchArguments,
    system: str,
    options: Mapping[str, Any],
    seeds: Any,
    members: Any,
    datasets: Any,
) -> None:
    unknown = [name for name in options if name not in DEFAULTS]
    problem = None
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), [*DEFAULTS, *OF_A_SYSTEM], n=1)
        problem = f"unknown option {unknown[0]!r}" + (f" (did you mean {close[0]!r}?)" if close else "")
    elif own := [name for name in OF_THE_BENCH if name in options]:
        problem = f"{own[0]!r} is set by the bench, run by run; seeds are a list, `seeds: [0, 1]`"
    elif not seeds:
        problem = "no seeds"
    elif not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        problem = f"seeds {seeds!r}: expected a list of whole numbers from 0 on"
    elif len(set(seeds)) < len(seeds):
        problem = f"seeds {seeds!r}: one is named twice"
    elif members is not None and (not isinstance(members, list) or len({*map(str, members)}) < max(2, len(members))):
        problem = f"members {members!r}: expected a list of two systems or more, each once"
    elif members and options:
        problem = f"has `members`, so nothing is trained and {next(iter(options))!r} means nothing"
    elif strange := [name for name in members or () if name not in arguments.systems]:
        problem = f"member {strange[0]!r} is not one of the systems {', '.join(arguments.systems)}"
    elif not isinstance(datasets, list):
        problem = f"datasets {datasets!r}: expected a list of names"
    elif strange := [name for name in datasets if name not in (arguments.datasets or {None: {}})]:
        problem = (
            f"dataset {strange[0]!r} is not one of {', '.join(arguments.datasets) or 'the recipe, which has none'}"
        )
    if problem:
        raise UserError(
            f"system {system!r}: {problem}. A system takes options of recipes.student.distill, `seeds`, `datasets`, or "
            "`members`."
        )


def _check_members(planned: list[PlannedRun]) -> None:
    trained = {(run.dataset, run.seed, run.system) for run in planned if not run.members}
    for run in planned:
        for member in run.members:
            if (run.dataset, run.seed, member) not in trained:
                raise UserError(
                    f"system {run.system!r}: its member {member!r} is not trained with seed {run.seed}"
                    f"{'' if run.dataset is None else f' on {run.dataset}'}. Give it that seed, or take it out."
                )


def check_settings(run: PlannedRun) -> None:
    """Check that what a finished run's folder holds is what the recipe asks for.

    Raises:
        UserError: It was trained with another setting.
    """
    if run.members:
        return
    found = json.loads((run.folder / RECORD).read_text(encoding="utf-8"))["arguments"]
    for name, value in to_dict(run.student).items():
        before = found.get(name, DEFAULTS.get(name))
        if name not in NOT_A_SETTING and before != value:
            raise UserError(
                f"{run.folder}: holds a student with {name} = {before!r}, not {value!r}. Give the system another name, "
                "or remove the folder."
            )


def finished_line(run: PlannedRun, split: str) -> dict[str, Any] | None:
    """Return the line of runs.jsonl of a run, None while it is not finished.

    `train_seconds` and `parameters` of an average are the sums of its members'. One of other members, or of what these
    predicted before they were trained again, is not finished.

    Raises:
        UserError: See `check_settings`.
    """
    evaluation = run.folder / f"evaluation-{split}" / "metrics.json"
    if not evaluation.is_file() or not (run.members or (run.folder / RECORD).is_file()):
        return None
    check_settings(run)
    trained = [run.folder.with_name(f"{member}-{run.seed}") for member in run.members] or [run.folder]
    if not all((folder / RECORD).is_file() for folder in trained):
        return None
    metrics = json.loads(evaluation.read_text(encoding="utf-8"))
    if run.members and not _is_average_of([folder / evaluation.parent.name for folder in trained], metrics):
        return None
    records = [json.loads((folder / RECORD).read_text(encoding="utf-8")) for folder in trained]
    overall = metrics["overall"]
    return {
        "system": run.system,
        "seed": run.seed,
        **({} if run.dataset is None else {"dataset": run.dataset}),
        "predictions": f"{run.folder.name}/{evaluation.parent.name}/predictions.parquet",
        "split": split,
        **{name: overall[name] for name in ("accuracy", "macro_f1", "ndcg")},
        **{
            f"validation_{name}": None if run.members else records[0]["validation"][name]
            for name in ("accuracy", "macro_f1")
        },
        "parameters": sum(record["parameters"] for record in records),
        "train_seconds": round(sum(record["train_seconds"] for record in records), 1),
    }


def _is_average_of(evaluations: list[Path], metrics: Mapping[str, Any]) -> bool:
    files = [folder / "predictions.parquet" for folder in evaluations]
    averaged = sorted(member["sha256"] for member in metrics.get("facts", {}).get("members", ()))
    return all(file.is_file() for file in files) and averaged == sorted(map(sha256, files))
