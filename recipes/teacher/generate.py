"""Ask a large language model why each pair is relevant or not, from several perspectives.

    # The paper's: Qwen3-14B behind one or several vLLM servers
    python -m recipes.teacher.generate --config recipes/configs/teacher/generate_qwen3_14b.yaml \
        --base_url http://node1:8000/v1 http://node2:8000/v1

    # In process, on one GPU: a base model, or the tuned teacher (its LoRA adapter, and the perspective-free prompt)
    python -m recipes.teacher.generate --config recipes/configs/teacher/generate_qwen3_small.yaml
    python -m recipes.teacher.generate --config recipes/configs/teacher/generate_tuned.yaml --adapter runs/esci/dpo

    # One of four parts, e.g. a task of a job array; recipes.rationales.build takes the four files together
    python -m recipes.teacher.generate --config FILE --shard 0/4

Reads: pairs. Writes: one parquet of completions (every sample one row), OUTPUT.report.json, and OUTPUT.journal.jsonl,
where each completion stands as soon as it has come. Killed at any moment and started again it goes on from there; with
another model, sampling or prompt it refuses to. With nothing left to ask for, it parses the journal again.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from recipes.arguments import UserError, parse, run, to_dict
from recipes.minilm import public_name
from recipes.record import environment, write_json
from recipes.schemas import COMPLETIONS, PERSPECTIVES, SPLITS, read_pairs, write
from recipes.teacher.asking import ask_model, ask_servers, common_settings, reach
from recipes.teacher.journal import Journal, Key, refuse_changes
from recipes.teacher.plan import Plan, Progress, summary, table
from recipes.teacher.prompts import PROMPTS, TEMPLATES, load_prompts


@dataclass
class GenerateArguments:
    """What `recipes.teacher.generate` can be told."""

    pairs: str = field(metadata={"help": "Folder of pairs, one parquet a split."})
    output: str = field(metadata={"help": "Completions to write (parquet)."})
    model: str = field(metadata={"help": "Model: its name on the servers, or a repository or folder."})
    labels: str = field(default="esci", metadata={"help": "Label schema: a name in recipes/labels, or a YAML file."})
    rules: str | None = field(
        default=None, metadata={"help": "Business rules: a name in recipes/rules, or a YAML file (None: as --labels)."}
    )
    examples: str | None = field(
        default=None,
        metadata={"help": "Few-shot examples: a name in recipes/prompts/examples, or a YAML file (None: zero-shot)."},
    )
    templates: str | None = field(
        default=None,
        metadata={"help": "Folder of prompt templates, for a tuned teacher those it learnt (None: recipes/prompts)."},
    )
    perspectives: list[str] = field(
        default_factory=lambda: list(PERSPECTIVES),
        metadata={"help": "Some of user_intent, structured_analysis, business_rule, and unified, the perspective-free "
                          "prompt that a tuned teacher gets."},
    )  # fmt: skip
    splits: list[str] = field(default_factory=lambda: ["train"], metadata={"help": "Splits whose pairs are asked."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many pairs (None: all)."})
    shard: str | None = field(
        default=None, metadata={"help": "I/N: only every N-th pair from the I-th on, into OUTPUT-I-of-N.parquet."}
    )
    samples: int = field(default=5, metadata={"help": "Completions a pair and perspective."})
    temperature: float = field(default=0.7, metadata={"help": "0: greedy."})
    top_p: float | None = field(default=0.99, metadata={"help": "None: the server's default; in process: off."})
    top_k: int | None = field(default=50, metadata={"help": "None: the server's default; in process: off."})
    max_tokens: int = field(default=1024, metadata={"help": "Tokens of a completion, reasoning included."})
    seed: int = field(default=0, metadata={"help": "Each completion's own seed is derived from it."})
    backend: Literal["endpoint", "transformers"] = field(
        default="endpoint", metadata={"help": "OpenAI-compatible servers, or transformers in this process."}
    )
    base_url: list[str] = field(
        default_factory=lambda: ["http://localhost:8000/v1"],
        metadata={"help": "endpoint: addresses of servers of the same model; requests are spread over them."},
    )
    api_key_variable: str | None = field(
        default=None, metadata={"help": "endpoint: name of the environment variable that holds the servers' key."}
    )
    concurrency: int = field(default=64, metadata={"help": "endpoint: requests under way at once, over all servers."})
    timeout: float = field(default=600.0, metadata={"help": "endpoint: seconds for one request."})
    backoff: float = field(
        default=1.0, metadata={"help": "endpoint: seconds before a second try; doubled before each further one."}
    )
    patience: float = field(
        default=600.0, metadata={"help": "endpoint: seconds without any answer after which the run stops."}
    )
    revision: str | None = field(default=None, metadata={"help": "transformers: commit, branch or tag of the model."})
    adapter: str | None = field(default=None, metadata={"help": "transformers: folder of a LoRA adapter of the model."})
    batch_size: int = field(default=16, metadata={"help": "transformers: prompts completed together."})
    device: str | None = field(
        default=None, metadata={"help": "transformers: cpu, cuda ...; a GPU where there is one by default."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Throw away what an earlier run wrote to this output."})


def main() -> None:
    """Run the verb."""
    generate(parse(GenerateArguments, __doc__))


def generate(arguments: GenerateArguments) -> Path:
    """Ask for every completion that is not in the journal, then write the table.

    Returns:
        The parquet file.

    Raises:
        UserError: Something is wrong with the arguments, the servers, the model, or an earlier run's settings; or some
            completions could not be had (all others are written).
    """
    _check(arguments)
    output = shard_path(arguments.output, arguments.shard)
    journal_path = output.with_name(f"{output.name}.journal.jsonl")
    if output.is_file() and not journal_path.is_file() and not arguments.overwrite:
        raise UserError(f"{output}: is there, without a journal. Choose another output, or pass --overwrite.")
    if arguments.backend == "endpoint" and not output.is_file():
        asyncio.run(reach(arguments))  # first of all: what follows can take minutes for a large journal
    plan = make_plan(arguments)
    settings = common_settings(arguments)
    journal = Journal(journal_path, overwrite=arguments.overwrite)
    try:
        if journal.settings is not None:
            refuse_changes(journal.path, {**journal.settings, "refused": None}, {**settings, "refused": None})
        plan.refuse_changed_prompts(journal.done, journal.path)
        done = sum(key in journal.done for key in plan.keys())  # noqa: SIM118 (not a dict)
        _print_start(journal, plan, done)
        missing: dict[Key, str] = {}
        if done < len(plan):
            with Progress(plan, done) as progress:
                if arguments.backend == "endpoint":
                    missing = asyncio.run(ask_servers(arguments, settings, plan, journal, progress))
                else:
                    missing = ask_model(arguments, settings, plan, journal, progress)
        return _finish(arguments, plan, journal, output, missing)
    except KeyboardInterrupt:
        raise UserError(f"stopped by hand; {len(journal.done):,} completions are kept in {journal.path}.") from None
    finally:
        journal.close()


def _check(arguments: GenerateArguments) -> None:
    for name, values, known in (
        ("perspectives", arguments.perspectives, PROMPTS),
        ("splits", arguments.splits, SPLITS),
    ):
        if not values or len(set(values)) < len(values) or not set(values) <= set(known):
            raise UserError(f"{name}: {', '.join(values) or 'none'}: expected some of {', '.join(known)}, each once.")
    for name in ("samples", "max_tokens", "concurrency", "batch_size"):
        if (value := to_dict(arguments)[name]) < 1:
            raise UserError(f"{name}: {value}; expected 1 or more.")
    if arguments.temperature < 0 or (arguments.temperature == 0 and arguments.samples > 1):
        raise UserError(
            f"temperature: {arguments.temperature} with {arguments.samples} samples; expected 0 or more, and above 0 "
            f"where a prompt has several samples (greedy ones are all the same)."
        )
    if arguments.backend == "endpoint" and arguments.adapter is not None:
        raise UserError(
            "adapter: a server loads adapters itself (`vllm serve BASE --enable-lora --lora-modules NAME=FOLDER`, then "
            "--model NAME). Leave --adapter out, or pass --backend transformers."
        )
    if arguments.backend == "endpoint" and not arguments.base_url:
        raise UserError("base_url: none; expected the address of a server, e.g. http://localhost:8000/v1.")
    if wrong := [url for url in arguments.base_url if not url.startswith(("http://", "https://"))]:
        raise UserError(f"base_url: {wrong[0]!r}: expected an address such as http://localhost:8000/v1.")


def shard_path(output: str, shard: str | None) -> Path:
    """Return the file that one shard writes.

    >>> shard_path("runs/c.parquet", "1/4").name
    'c-00001-of-00004.parquet'
    """
    path = Path(output)
    if shard is None:
        return path
    number, of = _shard(shard)
    return path.with_name(f"{path.stem}-{number:05d}-of-{of:05d}{path.suffix}")


def _shard(shard: str) -> tuple[int, int]:
    number, _, of = shard.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise UserError(f"shard: {shard!r}; expected I/N with I from 0 to N - 1, e.g. 0/4.")
    return int(number), int(of)


def make_plan(arguments: GenerateArguments) -> Plan:
    """Read the pairs and what prompts are made of."""
    import pandas as pd

    book = load_prompts(
        arguments.labels,
        arguments.rules or arguments.labels,
        arguments.examples,
        templates=arguments.templates or TEMPLATES,
    )
    pairs = pd.concat(read_pairs(arguments.pairs, arguments.splits).values(), ignore_index=True)
    if arguments.limit is not None:
        pairs = pairs.head(arguments.limit)
    if arguments.shard is not None:
        number, of = _shard(arguments.shard)
        pairs = pairs.iloc[number::of]
    if pairs.empty:
        raise UserError(f"{arguments.pairs}: no pair is left of {', '.join(arguments.splits)} (limit, shard).")
    return Plan(pairs.to_dict("records"), book, arguments.perspectives, arguments.samples)


def _print_start(journal: Journal, plan: Plan, done: int) -> None:
    if journal.damaged:
        print(f"{journal.path}: {journal.damaged} damaged lines; what stood in them is asked for again")
    if other := len(journal.done) - done:
        print(f"{journal.path}: {other:,} of its completions are of no pair, perspective or sample of this run")
    if done:
        print(f"{journal.path}: {done:,} of {len(plan):,} completions are there from an earlier run")


def _finish(arguments: GenerateArguments, plan: Plan, journal: Journal, output: Path, missing: dict[Key, str]) -> Path:
    model = public_name(arguments.model) + (f" + {public_name(arguments.adapter)}" if arguments.adapter else "")
    completions = table(journal, plan, model)
    if completions.empty:
        raise UserError(f"no completion could be had: {next(iter(missing.values()))}")
    write(completions, output, COMPLETIONS)
    counts = summary(completions)
    report = {"perspectives": counts, "missing": len(missing), "settings": journal.settings}
    report |= {"arguments": to_dict(arguments), "environment": environment()}
    report_path = write_json(output.with_name(f"{output.name}.report.json"), report)
    for perspective, numbers in counts.items():
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in numbers["parse_errors"].items())
        print(
            f"{perspective:>20}: {numbers['completions']:,} completions, {numbers['with_label']:.1%} with a label, "
            f"{numbers['mean_tokens']} tokens on average{'; without: ' + reasons if reasons else ''}"
        )
    if arguments.samples > 1 and completions.groupby(["pair_id", "perspective"])["text"].nunique().max() == 1:
        print("all samples of a prompt are the same: the server seems to ignore the temperature")
    print(f"wrote {output} ({len(completions):,} completions) and {report_path.name}")
    if missing:
        (pair_id, perspective, sample), reason = next(iter(missing.items()))
        raise UserError(
            f"{len(missing):,} of {len(plan):,} completions could not be had, e.g. pair {pair_id!r}, {perspective}, "
            f"sample {sample}: {reason}. Run the same command to try again, or go on without them."
        )
    print(f"next: python -m recipes.rationales.build --pairs {arguments.pairs} --completions {output} --output FILE")
    return output


if __name__ == "__main__":
    run(main)
