"""What scores one partition after another for `recipes.serve.score`, in this process or as a Ray actor."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError
from recipes.serve.partitions import Partition, Storage, read_partition, write_partition

if TYPE_CHECKING:
    import pyarrow as pa

ADDED = ("probabilities", "predicted_label", "score", "tier")


@dataclass(frozen=True)
class Job:
    """What a worker needs to score a partition."""

    model: str
    input: str
    output: str
    query_column: str
    product_column: str
    keep_invalid: bool
    backend: str
    precision: str
    threads: int
    max_length: int | None


class Worker:
    """Scores partition by partition; a failure comes back as text, so that one stops no other."""

    def __init__(self, job: Job) -> None:
        from transformers import AutoConfig

        import modeling_lrkd  # noqa: F401  registers the lrkd configuration
        from recipes.serve.scorer import Scorer

        self.job = job
        self.source, self.target = Storage(job.input), Storage(job.output)
        self.scorer = Scorer(
            job.model,
            job.backend,  # type: ignore[arg-type]
            precision=job.precision,  # type: ignore[arg-type]
            threads=job.threads,
            max_length=job.max_length,
        )
        config = AutoConfig.from_pretrained(job.model)
        self.gains, self.thresholds = config.ranking_gains(), config.tier_thresholds

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score one partition.

        Args:
            row: The fields of a `Partition`.

        Returns:
            `number`, `rows`, and `error`, empty where all went well.
        """
        partition = Partition(int(row["number"]), str(row["path"]), int(row["start"]), int(row["stop"]))
        try:
            table = self.add_results(read_partition(self.source, partition), partition)
            write_partition(self.target, partition, table)
        except UserError as error:
            return {"number": partition.number, "rows": 0, "error": f"{partition.path}: {error}"}
        return {"number": partition.number, "rows": len(table), "error": ""}

    def add_results(self, table: pa.Table, partition: Partition) -> pa.Table:
        """Return the rows of a partition with what is scored of them."""
        import pyarrow as pa

        texts = [table.column(name).to_pylist() for name in (self.job.query_column, self.job.product_column)]
        valid = [all(text is not None and text.strip() for text in pair) for pair in zip(*texts, strict=True)]
        if not all(valid) and not self.job.keep_invalid:
            row = partition.start + valid.index(False)
            raise UserError(f"row {row}: null or blank text. Correct it, or pass --invalid null.")
        pairs = [pair for pair, usable in zip(zip(*texts, strict=True), valid, strict=True) if usable]
        results = self.scorer.score(pairs)
        columns: dict[str, list[Any]] = {name: [] for name in ADDED}
        for usable in valid:
            probabilities = next(results) if usable else None
            score = None if probabilities is None else float(probabilities.astype("float64") @ self.gains)
            columns["probabilities"].append(probabilities)
            columns["predicted_label"].append(
                None if probabilities is None else self.scorer.labels[int(probabilities.argmax())]
            )
            columns["score"].append(score)
            tiered = score is not None and self.thresholds is not None
            columns["tier"].append(bisect_right(self.thresholds, score) if tiered else None)
        kinds = (pa.list_(pa.float32()), pa.string(), pa.float64(), pa.int8())
        for (name, values), kind in zip(columns.items(), kinds, strict=True):
            table = table.append_column(name, pa.array(values, kind))
        return table
