"""Go on pre-training a base model on platform text before it is tuned (CRSD's domain-adaptive pre-training).

    python -m recipes.teacher.pretrain --data runs/esci/pairs/train.parquet --model Qwen/Qwen3-0.6B-Base \
        --output runs/esci/teacher/adapted
    # An adapter, for `recipes.teacher.sft --adapter`
    python -m recipes.teacher.pretrain ... --lora_rank 64
    python -m recipes.teacher.pretrain --config recipes/configs/tiny/teacher_pretrain.yaml

The text is the marketplace's own, without labels: each query with the titles and attributes of its products, one
document a query. arXiv 2510.11056 names the stage and no more: this composition and the settings are ours. Causal
language modelling on every token; a document longer than `max_length` goes on in the next sequence. Resumes, and
records, as recipes.teacher.sft.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import parse, run
from recipes.schemas import PAIRS, read
from recipes.student.saving import claim_folder
from recipes.teacher.tuning import (
    TuningArguments,
    base_of,
    check_numbers,
    commit_of,
    load_model,
    load_tokenizer,
    new_lora,
    settings,
    train,
    training_options,
    with_adapter,
)

if TYPE_CHECKING:
    import pandas as pd

ATTRIBUTES = ("brand", "color", "bullet_point", "description")


@dataclass(kw_only=True)
class PretrainArguments(TuningArguments):
    """Options of `python -m recipes.teacher.pretrain`; the settings are ours."""

    data: str = field(
        metadata={"help": "Pairs whose text is read (parquet); train.parquet, so that tests stay unseen."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Rank of an adapter; 0: every weight."})
    epochs: int = field(default=1, metadata={"help": "Passes over the text."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of a sequence."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    batch_size: int = field(default=8, metadata={"help": "Sequences a device takes at once."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Batches an optimizer step adds up."})
    warmup_ratio: float = field(default=0.03, metadata={"help": "Share of the steps."})


def documents(pairs: pd.DataFrame) -> Iterator[str]:
    r"""Yield one document a query: the query, then each title with the attributes that are known.

    >>> import pandas as pd
    >>> pairs = pd.DataFrame({"query": ["mug", "mug"], "product_title": ["Red mug", "Mug"], "color": ["red", None]})
    >>> list(documents(pairs))
    ['mug\n- Red mug\n  color: red\n- Mug']
    """
    for query, group in pairs.groupby("query", sort=False):
        lines = [query]
        for row in group.drop_duplicates("product_title").to_dict("records"):
            lines.append(f"- {row['product_title']}")
            lines += [f"  {name}: {row[name]}" for name in ATTRIBUTES if isinstance(row.get(name), str) and row[name]]
        yield "\n".join(lines)


def main() -> None:
    """Run the verb."""
    arguments = parse(PretrainArguments, __doc__)
    record = pretrain(arguments)
    print(f"wrote {arguments.output} after {record['steps']:,} steps, {record['train_seconds']:.0f} s")
    option = "--model" if arguments.lora_rank == 0 and arguments.adapter is None else "--adapter"
    print(f"next: python -m recipes.teacher.sft {option} {arguments.output} --data SFT.parquet --output DIR")


def pretrain(arguments: PretrainArguments) -> dict[str, Any]:
    """Train on platform text; a finished folder is left as it is. Returns the record written to `training.json`.

    Raises:
        UserError: The pairs break their contract, or the output folder holds another teacher.
    """
    check_numbers(arguments, "max_length", "learning_rate", "batch_size", "gradient_accumulation_steps")
    name, revision = base_of(arguments)
    files = {"train": arguments.data} | ({"validation": arguments.validation} if arguments.validation else {})
    texts = {split: list(documents(read(path, PAIRS))) for split, path in files.items()}
    finished = claim_folder(Path(arguments.output), settings(arguments), arguments.overwrite, "teacher")
    if finished is not None:
        print(f"{arguments.output} already holds this teacher; --overwrite trains it again.")
        return finished

    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = load_tokenizer(name, revision, arguments.chat_template)
    data = {
        split: Dataset.from_dict({"input_ids": _chunks(lines, tokenizer, arguments)}) for split, lines in texts.items()
    }
    model = load_model(name, revision, arguments)
    base_commit = commit_of(model) or revision
    trainer = SFTTrainer(
        model if arguments.adapter is None else with_adapter(model, arguments.adapter),
        args=SFTConfig(**training_options(arguments)),
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        peft_config=new_lora(arguments) if arguments.adapter is None else None,
    )
    facts = {"verb": "pretrain", "base_model": name, "base_revision": base_commit, "train_rows": len(data["train"])}
    return train(trainer, arguments, settings(arguments), facts)


def _chunks(texts: list[str], tokenizer: Any, arguments: PretrainArguments) -> list[list[int]]:
    """Tokenise, end each document with the eos token, and cut what is longer than a sequence into several."""
    from tqdm import tqdm

    size = arguments.max_length
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    chunks = []
    for text in tqdm(texts, desc="Tokenising documents", unit="document", delay=1):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + end
        chunks += [ids[start : start + size] for start in range(0, len(ids), size)]
    return chunks


if __name__ == "__main__":
    run(main)
