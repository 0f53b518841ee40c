"""What a student's repository holds, and the facts of its card, read from what training and evaluation recorded."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError
from recipes.publish.folder import read_record, read_statement, to_json
from recipes.publish.sources import base_model_id, folders, public_metrics, require, tokenizer_files
from recipes.record import sha256

if TYPE_CHECKING:
    from hub_cards.facts import BaseModel, BiasAudit, Calibration, Evaluation, Statement
    from recipes.publish.package import Files, PackageArguments

DISTIL = "recipes.student.distill"
EVALUATE = "recipes.evaluate.run"
BIAS = "recipes.evaluate.bias"
CALIBRATE = "recipes.evaluate.calibrate"
WEIGHTS = "model.safetensors"
FIGURES = {
    "confusion.png": "Confusion matrix: gold classes in rows, predicted ones in columns",
    "reliability.png": "Reliability: how often a probability of the top class is right",
    "bias.png": "Audit by brand: relevant products filtered, and what another brand in the title does to the score",
}
# What later steps add to a student: temperature and tiers; where each perspective's reasoning lies; its rationales.
BANK = ("rationale_bank.safetensors", "rationale_bank.txt")
OPTIONAL = ("calibration.json", "perspectives.safetensors", *BANK)
SERVING = Path(__file__).parents[1] / "serve"
FEWEST_QUERIES = 10  # draws of fewer say nothing of how much a score could differ
# Options that name files of the machine that trained; what they held is stated by digest.
_PATHS = ("pairs", "rationales", "votes", "encoder", "encoder_revision", "output")


def package_student(arguments: PackageArguments) -> Files:
    """Collect weights, configuration, code, tokenizer, metrics, figures and, where exported, calibration and ONNX.

    Raises:
        UserError: A file is missing, or the evaluation is of another model.
        CardError: A fact is missing or cannot be.
    """
    from hub_cards.facts import Hardware, StudentFacts, need
    from hub_cards.render import student_card

    statement = read_statement(arguments.facts, "student")
    source, evaluation = folders(arguments, DISTIL, EVALUATE)
    config = read_record(source / "config.json", DISTIL)
    training_file, metrics_file = source / "training.json", evaluation / "metrics.json"
    training, metrics = read_record(training_file, DISTIL), read_record(metrics_file, EVALUATE)
    require(source / WEIGHTS, DISTIL)
    check_weights(source, metrics, metrics_file)

    files: dict[str, Path | bytes] = {
        name: source / name for name in ("config.json", WEIGHTS, *code_files(source, config))
    }
    files |= tokenizer_files(source, DISTIL)
    figures = {f"figures/{name}": shown for name, shown in FIGURES.items() if (evaluation / name).is_file()}
    files |= {name: evaluation / Path(name).name for name in figures}
    onnx = {f"onnx/{path.name}": path for path in sorted((source / "onnx").glob("*")) if path.is_file()}
    files |= onnx
    files |= {name: source / name for name in OPTIONAL if (source / name).is_file()}
    for name in ("handler.py", "requirements.txt"):  # Inference Endpoints look for these two
        if (SERVING / name).is_file():
            files[name] = SERVING / name
    files["metrics.json"] = to_json(public_metrics(metrics, arguments.repo_id))

    labels = [
        config["id2label"][key] for key in sorted(need(config, "id2label", source / "config.json", DISTIL), key=int)
    ]
    facts = StudentFacts(
        repo_id=arguments.repo_id,
        statement=statement,
        base=_base_model(training, training_file, statement),
        data_sha256=need(training, "data_sha256", training_file, DISTIL),
        settings=_settings(need(training, "arguments", training_file, DISTIL)),
        code_commit=need(training, "environment.code_commit", training_file, f"{DISTIL}, in a git checkout,"),
        hardware=Hardware.read(training["environment"], training_file, DISTIL),
        train_seconds=need(training, "train_seconds", training_file, DISTIL),
        evaluation=read_evaluation(metrics, metrics_file, figures),
        parameters=need(training, "parameters", training_file, DISTIL),
        extractor_type=need(config, "extractor_type", source / "config.json", DISTIL),
        labels=labels,
        gains=need(config, "label_gains", source / "config.json", DISTIL),
        train_rows=need(training, "train_rows", training_file, DISTIL),
        guided_rows=need(training, "guided_rows", training_file, DISTIL),
        pairs_per_second=need(metrics, "facts.pairs_per_second", metrics_file, EVALUATE),
        scoring=Hardware.read(need(metrics, "facts.environment", metrics_file, EVALUATE), metrics_file, EVALUATE),
        tasks=tuple(config.get("custom_pipelines", {})),
        has_ranking_view="ranking_view" in config,
        has_calibration="calibration.json" in files,
        calibration=read_calibration(source),
        logit_adjustment=training.get("logit_adjustment", {}).get("tau"),
        separate_layers=config.get("separate_layers", 0),
        onnx=tuple(name for name in onnx if name.endswith(".onnx")),
        bias=read_bias(evaluation / "bias.json", source),
    )
    files["README.md"] = student_card(facts).encode()
    return files


def read_calibration(source: Path) -> Calibration | None:
    """Read what recipes.evaluate.calibrate recorded; None where it recorded nothing.

    Raises:
        UserError: It was fitted for other weights.
    """
    from hub_cards.facts import Calibration

    file = source / "calibration.json"
    record = read_record(file, CALIBRATE) if file.is_file() else {}
    if "splits" not in record:
        return None
    if record["facts"]["weights_sha256"] != sha256(source / WEIGHTS):
        raise UserError(f"{file}: was fitted for other weights than {source / WEIGHTS}. Run {CALIBRATE} again.")
    validation, test = record["splits"]["validation"], record["splits"]["test"]
    return Calibration(
        method=record["method"],
        ece_before=test["before"]["ece"],
        ece_after=test["after"]["ece"],
        confidence=record["confidence"],
        boundaries=[
            (first["threshold"], first["target"], first["relevant_below"], second["relevant_below"])
            for first, second in zip(validation["boundaries"], test["boundaries"], strict=True)
        ],
    )


def code_files(source: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the modules that the configuration names, and the siblings that these import.

    Raises:
        UserError: The configuration names no code, or a module is missing or not Python.
    """
    named = [
        *config.get("auto_map", {}).values(),
        *(task["impl"] for task in config.get("custom_pipelines", {}).values()),
    ]
    if not named:
        raise UserError(f"{source}/config.json: lacks 'auto_map', the code that loads the weights. {DISTIL} writes it.")
    waiting, found = {reference.split(".")[0] for reference in named}, set()
    while waiting:
        module = waiting.pop()
        path = require(source / f"{module}.py", DISTIL)
        found.add(path.name)
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not Python ({error}).") from None
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
        waiting |= {name for name in imported if name and f"{name}.py" not in found}
    return sorted(found)


def check_weights(source: Path, metrics: Mapping[str, Any], file: Path) -> None:
    """Refuse an evaluation of other weights.

    Raises:
        UserError: The digest in the evaluation is another one.
        MissingFact: There is none.
    """
    from hub_cards.facts import need

    evaluated = need(metrics, "facts.weights_sha256", file, f"{EVALUATE} --model {source}")
    if evaluated != sha256(source / WEIGHTS):
        raise UserError(
            f"{file}: is of other weights (sha256 {evaluated[:12]}..., model {metrics['facts'].get('model')!r}) than "
            f"{source / WEIGHTS}. Evaluate this one: python -m {EVALUATE} --model {source} ..."
        )


def read_evaluation(metrics: Mapping[str, Any], file: Path, figures: Mapping[str, str]) -> Evaluation:
    """Read what `recipes.evaluate.run` measured, with its intervals.

    Raises:
        MissingFact: metrics.json was written before it held what the card states.
    """
    from hub_cards.facts import Evaluation, Score, Slice, need
    from hub_cards.render import METRICS

    def of(name: str, values: Mapping[str, Any], where: str) -> Slice:
        ends = need(metrics, f"intervals.{where}", file, EVALUATE)
        enough = values["queries"] >= FEWEST_QUERIES
        scores = {
            metric: Score(values[metric], tuple(ends[metric]) if metric in ends and enough else None)
            for metric in METRICS
            if values.get(metric) is not None
        }
        return Slice(name, values["rows"], scores)

    for name in ("accuracy", "macro_f1", "ece", "rows", "per_class"):
        need(metrics, f"overall.{name}", file, EVALUATE)
    slices = [of("overall", metrics["overall"], "overall")]
    locales = need(metrics, "locales", file, EVALUATE)
    if len(locales) > 1:
        slices += [of(locale, values, f"locales.{locale}") for locale, values in locales.items()]
    conventions = need(metrics, "conventions", file, EVALUATE)
    return Evaluation(
        split=need(metrics, "facts.split", file, EVALUATE),
        pairs_sha256=need(metrics, "facts.pairs_sha256", file, EVALUATE),
        date=need(metrics, "facts.date", file, EVALUATE),
        slices=slices,
        conventions={name: conventions[name] for name in ("macro_f1", "score", "ndcg", "ece") if name in conventions},
        draws=need(metrics, "intervals.draws", file, EVALUATE),
        seed=need(metrics, "intervals.seed", file, EVALUATE),
        per_class=metrics["overall"]["per_class"],
        figures=figures,
    )


def read_bias(file: Path, source: Path) -> BiasAudit | None:
    """Read what `recipes.evaluate.bias` found of these weights; None where it was not run.

    Raises:
        UserError: It is of other weights.
        MissingFact: It lacks what the card states.
    """
    from hub_cards.facts import BiasAudit, Score, need
    from recipes.evaluate.bias_report import flagged

    if not file.is_file():
        return None
    report = read_record(file, BIAS)
    audited = need(report, "weights_sha256", file, BIAS)
    if audited != sha256(source / WEIGHTS):
        raise UserError(
            f"{file}: is of other weights (sha256 {audited[:12]}...) than {source / WEIGHTS}. Audit this one: "
            f"python -m {BIAS} --model {source} ..., or remove the file."
        )

    def score(entry: Mapping[str, Any] | None) -> Score | None:
        if entry is None or entry["value"] is None:
            return None
        return Score(entry["value"], tuple(entry["interval"]) if entry["queries"] >= FEWEST_QUERIES else None)

    swaps, brands, party = report["swaps"] or {}, need(report, "brands", file, BIAS), report["third_party"] or {}
    wrongly = need(report, "filtered_wrongly", file, BIAS)
    return BiasAudit(
        split=need(report, "split", file, BIAS),
        filtered=need(report, "filtered", file, BIAS),
        swaps=swaps.get("tried", 0),
        swapped_pairs=swaps.get("pairs", 0),
        change=score(swaps.get("absolute_change")),
        decision_flips=score(swaps.get("decision_flips")),
        filtered_wrongly=Score(wrongly["value"], tuple(wrongly["interval"])),
        brands=len(brands),
        differing={brand: brands[brand]["value"] for brand in flagged(brands)},
        third_party=score(party.get("difference")),
    )


def _base_model(training: Mapping[str, Any], file: Path, statement: Statement) -> BaseModel:
    from hub_cards.facts import BaseModel, need

    revision, digest = training.get("encoder_commit"), training.get("encoder_sha256")
    if revision is None:
        need(training, "encoder_sha256", file, DISTIL)  # one of the two says which weights they were
    recorded = need(training, "encoder", file, DISTIL)
    return BaseModel(base_model_id(recorded, statement, file), revision, digest)


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in options.items() if name not in _PATHS}
    return {**kept, "labels": Path(kept["labels"]).stem}
