"""Run recipes.teacher.generate over partitions of the pairs as a Ray Data job, on one machine or a cluster.

    # One worker a GPU, each with its own copy of the model
    python -m recipes.teacher.generate_ray --config recipes/configs/teacher/generate_qwen3_small.yaml \
        --partitions 64 --workers 4 --gpus_per_worker 1

    # Workers that only send requests, spread over a cluster (`ray start` elsewhere; --address auto)
    python -m recipes.teacher.generate_ray --config recipes/configs/teacher/generate_qwen3_14b.yaml \
        --partitions 64 --workers 8 --address auto

Takes every option of recipes.teacher.generate. Each partition is one of its shards (OUTPUT-I-of-N.parquet, with a
journal of its own), so a job that was killed goes on where each of its partitions was; then the shards are joined into
OUTPUT. The folder of OUTPUT must be one that every machine sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from recipes.arguments import UserError, parse, run, to_dict
from recipes.record import write_json
from recipes.schemas import COMPLETIONS, write
from recipes.teacher.generate import GenerateArguments, generate, make_plan, shard_path


@dataclass
class GenerateRayArguments(GenerateArguments):
    """What `recipes.teacher.generate_ray` can be told, beside the options of `recipes.teacher.generate`."""

    partitions: int = field(default=16, metadata={"help": "Shards of the pairs; the same number when run again."})
    workers: int = field(default=1, metadata={"help": "Partitions worked on at once."})
    gpus_per_worker: float = field(default=0.0, metadata={"help": "GPUs that each worker gets to itself."})
    cpus_per_worker: float = field(default=1.0, metadata={"help": "CPU cores that Ray sets aside for each worker."})
    address: str | None = field(default=None, metadata={"help": "Ray cluster to join, or auto (None: this machine)."})


class Worker:
    """Generates partition by partition; a failure comes back as text, so that one stops no other."""

    def __init__(self, arguments: GenerateArguments, partitions: int) -> None:
        self.arguments, self.partitions = arguments, partitions

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Generate one partition.

        Args:
            row: `id`, the number of the partition.

        Returns:
            `id`, and `error`, empty where all went well.
        """
        number = int(row["id"])
        try:
            generate(replace(self.arguments, shard=f"{number}/{self.partitions}"))
        except UserError as error:
            return {"id": number, "error": str(error)}
        return {"id": number, "error": ""}


def main() -> None:
    """Run the verb."""
    generate_ray(parse(GenerateRayArguments, __doc__))


def generate_ray(arguments: GenerateRayArguments) -> Path:
    """Generate all partitions, then join them.

    Returns:
        The joined parquet file.

    Raises:
        UserError: A number is not positive, or some partitions failed (all others are kept).
    """
    import ray

    if arguments.shard is not None:
        raise UserError("shard: the partitions are the shards here; leave it out, and pass --partitions.")
    for name in ("partitions", "workers"):
        if (value := to_dict(arguments)[name]) < 1:
            raise UserError(f"{name}: {value}; expected 1 or more.")
    names = {entry.name for entry in fields(GenerateArguments)}
    # Workers run in other folders, perhaps on other machines.
    shared = {name: str(Path(to_dict(arguments)[name]).resolve()) for name in ("pairs", "output")}
    own = GenerateArguments(**{name: value for name, value in to_dict(arguments).items() if name in names} | shared)
    if (pairs := len(make_plan(own).pairs)) < arguments.partitions:
        raise UserError(f"partitions: {arguments.partitions} of {pairs} pairs; expected no more than one a pair.")
    code = {"working_dir": str(Path(__file__).parents[2]), "excludes": ["runs", ".venv*", ".git"]}
    ray.init(address=arguments.address, runtime_env=code if arguments.address else None, include_dashboard=False)
    try:
        results = (
            ray.data.range(arguments.partitions, override_num_blocks=arguments.partitions)
            .map(
                Worker,
                fn_constructor_args=(own, arguments.partitions),
                concurrency=arguments.workers,
                num_cpus=arguments.cpus_per_worker,
                num_gpus=arguments.gpus_per_worker or None,
            )
            .take_all()
        )
    finally:
        ray.shutdown()
    if failed := [result for result in results if result["error"]]:
        raise UserError(
            f"{len(failed)} of {arguments.partitions} partitions are not finished, e.g. number {failed[0]['id']}: "
            f"{failed[0]['error']} The same command goes on with what is missing."
        )
    return join(arguments)


def join(arguments: GenerateRayArguments) -> Path:
    """Join the shards into one table, in the order of the partitions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards = [shard_path(arguments.output, f"{n}/{arguments.partitions}") for n in range(arguments.partitions)]
    whole = pa.concat_tables([pq.read_table(shard) for shard in shards], promote_options="permissive")
    output = write(whole, arguments.output, COMPLETIONS)
    write_json(output.with_name(f"{output.name}.report.json"), {"arguments": to_dict(arguments)})
    print(f"wrote {output} ({len(whole):,} completions of {len(shards)} partitions)")
    print(f"next: python -m recipes.rationales.build --pairs {arguments.pairs} --completions {output} --output FILE")
    return output


if __name__ == "__main__":
    run(main)
