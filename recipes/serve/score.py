"""Score any number of pairs: parquet in, the same rows with probabilities, label, score and tier out.

    python -m recipes.serve.score --model MODEL --input runs/esci/pairs/test.parquet --output runs/esci/scored
    python -m recipes.serve.score --model MODEL --input FOLDER --output FOLDER --workers 2      # Ray, this machine
    python -m recipes.serve.score --model MODEL --input s3://bucket/pairs --output s3://bucket/scored \
        --workers 64 --threads 4 --address auto                                                  # Ray, a cluster

Reads `query` and `product_title`; every other column passes through. Adds `probabilities` (in the order of the labels
in _manifest.json), `predicted_label`, `score`, the expected gain, and `tier`. Killed at any moment, driver or worker,
and started again with the same command, it scores only the partitions that are missing. One worker runs here, in this
process; several are a Ray Data job (extra `ray`). `--model` is a student or, faster, what `recipes.serve.export` made
of one; on a cluster its folder must be one that every machine sees.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from recipes.arguments import UserError, parse, run, to_dict
from recipes.record import environment, sha256, weights_sha256
from recipes.serve.partitions import (
    MANIFEST,
    Partition,
    Storage,
    find_inputs,
    plan,
    rows_of,
)
from recipes.serve.score_worker import ADDED, Job, Worker


@dataclass
class ScoreArguments:
    """Options of `recipes.serve.score`."""

    model: str = field(metadata={"help": "Folder of a student, or of its export."})
    input: str = field(metadata={"help": "Parquet file or folder of them: local, s3://..., hf://..."})
    output: str = field(metadata={"help": "Folder of the results: local, or s3://..."})
    query_column: str = field(default="query", metadata={"help": "Column with the query."})
    product_column: str = field(default="product_title", metadata={"help": "Column with the product's title."})
    partition_rows: int = field(default=50_000, metadata={"help": "Rows a file of results: what a kill can cost."})
    invalid: Literal["refuse", "null"] = field(
        default="refuse", metadata={"help": "Rows with null or blank text: an error, or results of null."}
    )
    workers: int = field(default=1, metadata={"help": "Partitions scored at once; above 1 a Ray Data job."})
    threads: int | None = field(default=None, metadata={"help": "Cores a worker (None: all of them, shared out)."})
    address: str | None = field(default=None, metadata={"help": "Ray cluster to join, or auto (None: this machine)."})
    backend: Literal["auto", "torch", "onnx", "openvino"] = field(default="auto", metadata={"help": "Engine."})
    precision: Literal["auto", "float32", "bfloat16", "int8"] = field(default="auto", metadata={"help": "Of it."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a pair (None: the model's)."})


def score(arguments: ScoreArguments) -> dict[str, Any]:
    """Score what is missing; return what `_manifest.json` says.

    Raises:
        UserError: An input or option is not usable, the output is of another model or input, or partitions failed
            (all others are kept).
    """
    from tqdm import tqdm

    from recipes.serve.scorer import progress_interval

    for name in ("partition_rows", "workers", "threads"):
        value = to_dict(arguments)[name]
        if value is not None and value < 1:
            raise UserError(f"{name}: expected 1 or more, got {value}.")
    on_ray = arguments.workers > 1 or arguments.address is not None
    if on_ray and importlib.util.find_spec("ray") is None:
        raise UserError("ray is not installed; several workers need it: pip install -e '.[ray]' -c constraints.txt")
    source, target = Storage(arguments.input), Storage(arguments.output)
    if arguments.output.startswith("hf://"):
        raise UserError(
            f"output: {arguments.output}: results go to a folder or s3://; `hf upload` takes a folder there."
        )
    if f"{target.open()[1]}/".startswith(f"{source.open()[1]}/"):  # the next run would take them for its input
        raise UserError(f"output: {arguments.output} is the input, or lies in it. Choose another folder.")
    job, settings = _job(arguments)
    settings["inputs"] = find_inputs(source, (arguments.query_column, arguments.product_column), ADDED)
    _check_output(target, settings)
    manifest = {**settings, "complete": False}
    partitions = plan(settings["inputs"], arguments.partition_rows)
    done = {p.number: p.stop - p.start for p in partitions if rows_of(target, p) == p.stop - p.start}
    missing = [partition for partition in partitions if partition.number not in done]
    if done and missing:
        print(f"{len(done)} of {len(partitions)} partitions are there; going on with the others.")
    failed = []
    if missing:
        worker = Worker(job)  # says what is wrong with model or options, before the output is theirs
        target.write(MANIFEST, json.dumps(manifest, indent=2).encode())
        results = _with_ray(job, missing, arguments) if on_ray else _here(worker, missing)
        del worker  # Ray's have models of their own
        total = sum(p.stop - p.start for p in partitions)
        with tqdm(total=total, unit="row", desc="score", mininterval=progress_interval()) as bar:
            bar.update(sum(done.values()))
            for result in results:
                bar.update(result["rows"])
                if result["error"]:
                    failed.append(result)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(partitions)} partitions are not scored, e.g. {failed[0]['error']} The same command "
            "goes on with what is missing."
        )
    counts = [rows_of(target, partition) for partition in partitions]
    if counts != [partition.stop - partition.start for partition in partitions]:
        raise UserError(f"{arguments.output}: rows are missing that were written. Run the same command again.")
    manifest |= {"complete": True, "rows": sum(p.stop - p.start for p in partitions), "partitions": len(partitions)}
    manifest["environment"] = environment()
    target.write(MANIFEST, json.dumps(manifest, indent=2).encode())
    return manifest


def _job(arguments: ScoreArguments) -> tuple[Job, dict[str, Any]]:
    """Choose engine and threads once, for all workers; and say what decides the results."""
    from transformers import AutoConfig

    import modeling_lrkd  # noqa: F401  registers the lrkd configuration
    from recipes.serve.plan import FILES, plan_for
    from recipes.serve.scorer import usable_cores

    folder = Path(arguments.model).resolve()
    if not (folder / "config.json").is_file():
        raise UserError(f"{arguments.model}: no config.json there. Pass the folder of a student or of its export.")
    try:
        config = AutoConfig.from_pretrained(folder)
        gains = config.ranking_gains()
    except (AttributeError, OSError, ValueError) as error:
        raise UserError(f"{arguments.model}: {error}") from None
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{arguments.model}: no tokenizer.json there. Save the tokenizer with the student.")
    chosen = plan_for(folder, arguments.backend, arguments.precision)
    cores = usable_cores()
    threads = arguments.threads or max(1, cores // arguments.workers)
    if arguments.address is None and arguments.workers * threads > cores:
        print(
            f"workers: {arguments.workers} of {threads} threads on {cores} cores; they take turns, more is not faster."
        )
    # Workers run in other folders.
    ends = [value if "://" in value else str(Path(value).resolve()) for value in (arguments.input, arguments.output)]
    job = Job(
        str(folder),
        *ends,
        query_column=arguments.query_column,
        product_column=arguments.product_column,
        keep_invalid=arguments.invalid == "null",
        backend=chosen.backend,
        precision=chosen.precision,
        threads=threads,
        max_length=arguments.max_length,
    )
    form = FILES.get(chosen.form)
    settings = {
        "model_sha256": weights_sha256(folder),
        "form": chosen.form,
        "form_sha256": None if form is None else sha256(folder / form),
        "tokenizer_sha256": sha256(folder / "tokenizer.json"),
        "labels": [config.id2label[index] for index in range(len(config.id2label))],
        "label_gains": gains,
        "temperature": config.temperature,
        "class_scales": config.class_scales,
        "class_biases": config.class_biases,
        "tier_thresholds": config.tier_thresholds,
        **{
            name: to_dict(arguments)[name]
            for name in ("query_column", "product_column", "partition_rows", "invalid", "max_length")
        },
    }
    return job, settings


def _check_output(target: Storage, settings: dict[str, Any]) -> None:
    """Check that what the output holds, if anything, is of these settings."""
    advice = "Choose another output folder, or delete that one."
    found = target.read_json(MANIFEST)
    if found is None:
        if strangers := target.names(".parquet"):  # they would pass for finished partitions, or be written over
            raise UserError(f"{target.uri}: holds {strangers[0]}, but no {MANIFEST} says of what. {advice}")
        return
    for name in settings:
        before, now, what = found.get(name), settings[name], f"another {name}"
        if before == now or (name == "invalid" and before == "refuse"):  # what was finished then had no such row
            continue
        if name == "inputs":  # of many files, the one that differs
            old, new = ({item["path"]: item for item in items} for items in (before or [], now))
            path = min(path for path in {**old, **new} if old.get(path) != new.get(path))
            before, now, what = old.get(path), new.get(path), f"{what}: {path}"
        raise UserError(f"{target.uri}: holds results with {what}: {before!r:.200}, not {now!r:.200}. {advice}")


def _here(worker: Worker, partitions: list[Partition]) -> Iterator[dict[str, Any]]:
    for partition in partitions:
        yield worker(asdict(partition))


def _with_ray(job: Job, partitions: list[Partition], arguments: ScoreArguments) -> Iterator[dict[str, Any]]:
    """Score on Ray actors; one that dies is started again and its partition with it."""
    import ray

    from recipes.serve.scorer import usable_cores

    workers = min(arguments.workers, len(partitions))
    code = {"working_dir": str(Path(__file__).parents[2]), "excludes": ["runs", ".venv*", ".git"]}
    address = arguments.address
    ray.init(address=address, runtime_env=code if address else None, include_dashboard=False, log_to_driver=False)
    try:
        # More than there are would wait for ever.
        cores = job.threads if address else min(job.threads, usable_cores() / workers)
        yield from (
            ray.data.from_items([asdict(partition) for partition in partitions], override_num_blocks=len(partitions))
            .map(Worker, fn_constructor_args=(job,), concurrency=workers, num_cpus=cores)
            .iter_rows()
        )
    finally:
        ray.shutdown()


def main() -> None:
    """Run the verb."""
    arguments = parse(ScoreArguments, __doc__)
    manifest = score(arguments)
    print(f"Scored {manifest['rows']:,} rows ({manifest['form']}): {arguments.output}, {manifest['partitions']} files.")
    print("Next: read them with pandas.read_parquet or datasets.load_dataset('parquet', data_dir=...).")


if __name__ == "__main__":
    run(main)
