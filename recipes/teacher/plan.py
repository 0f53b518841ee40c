"""What `recipes.teacher.generate` has to ask for, and the table that comes of it."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError
from recipes.schemas import COMPLETIONS
from recipes.teacher.journal import Journal, Key
from recipes.teacher.parse import parse_completion, reason_code
from recipes.teacher.prompts import PromptBook, prompt_hash, render

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Task:
    """One completion to ask for."""

    pair_id: str
    perspective: str
    sample_index: int
    messages: list[dict[str, str]]
    prompt_hash: str

    @property
    def key(self) -> Key:
        """What tells it apart from all others."""
        return self.pair_id, self.perspective, self.sample_index

    def record(self, text: str, sampling: str, finish_reason: str | None, completion_tokens: int) -> dict[str, Any]:
        """Make the line of the journal."""
        return {
            "pair_id": self.pair_id,
            "perspective": self.perspective,
            "sample_index": self.sample_index,
            "prompt_hash": self.prompt_hash,
            "sampling": sampling,
            "text": text,
            "finish_reason": finish_reason,
            "completion_tokens": completion_tokens,
        }


@dataclass(frozen=True)
class Plan:
    """Every completion of a run: pairs in order, perspectives within a pair, samples within a perspective.

    Attributes:
        pairs: Rows of the contract pairs.
        book: What prompts are made of.
        perspectives: Whose prompts.
        samples: Completions a pair and perspective.
    """

    pairs: list[dict[str, Any]]
    book: PromptBook
    perspectives: Sequence[str]
    samples: int

    def __len__(self) -> int:
        return len(self.pairs) * self.per_pair

    @property
    def per_pair(self) -> int:
        """Completions of one pair."""
        return len(self.perspectives) * self.samples

    def keys(self) -> Iterator[Key]:
        """List the keys, in order, without rendering anything."""
        for pair in self.pairs:
            for perspective in self.perspectives:
                for sample in range(self.samples):
                    yield pair["pair_id"], perspective, sample

    @cached_property
    def _pair(self) -> dict[str, dict[str, Any]]:
        return {pair["pair_id"]: pair for pair in self.pairs}

    def task(self, pair_id: str, perspective: str, sample_index: int) -> Task:
        """Render the prompt of one completion."""
        messages = render(self.book, perspective, self._pair[pair_id])
        return Task(pair_id, perspective, sample_index, messages, prompt_hash(messages))

    def tasks(self, done: Container[Key]) -> Iterator[Task]:
        """Render what is not done, in order, as it is asked for."""
        for key in self.keys():
            if key not in done:
                yield self.task(*key)

    def batches(self, size: int, done: Container[Key]) -> Iterator[list[Task]]:
        """Cut the whole plan into batches, and render those in which something is not done."""
        keys = self.keys()
        while batch := list(itertools.islice(keys, size)):
            if any(key not in done for key in batch):
                yield [self.task(*key) for key in batch]

    def refuse_changed_prompts(self, done: Mapping[Key, str], source: Path) -> None:
        """Render the prompts of what is done again, and compare.

        Raises:
            UserError: A template, label, rule, example or pair is not what it was.
        """
        from tqdm import tqdm

        hashes: dict[tuple[str, str], set[str]] = {}
        for (pair_id, perspective, _), digest in done.items():
            hashes.setdefault((pair_id, perspective), set()).add(digest)
        for pair in tqdm(self.pairs if hashes else [], desc="Checking prompts", unit="pair", delay=1):
            for perspective in self.perspectives:
                before = hashes.get((pair["pair_id"], perspective))
                if before and before != {now := prompt_hash(render(self.book, perspective, pair))}:
                    raise UserError(
                        f"{source}: its completions were made with another prompt: pair {pair['pair_id']!r}, "
                        f"perspective {perspective}: prompt_hash was {min(before)[:12]}, is {now[:12]}. A template, "
                        f"label, rule, example, or the pair itself has changed. Nothing was sent. Restore it, choose "
                        f"another --output, or pass --overwrite to throw these completions away."
                    )


def request_seed(seed: int, *names: object) -> int:
    """Derive a seed, 31 bits, from that of the run and the names of what is drawn.

    >>> request_seed(0, "p1", "unified", 0), request_seed(0, "p1", "unified", 1)
    (1093783340, 987192734)
    """
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def table(journal: Journal, plan: Plan, model: str) -> pd.DataFrame:
    """Parse the completions of a plan: contract completions, and `finish_reason` and `completion_tokens`."""
    import pandas as pd
    from tqdm import tqdm

    order = {key: place for place, key in enumerate(plan.keys())}
    rows: dict[int, dict[str, Any]] = {}
    for record in tqdm(journal.records(), total=len(journal.done), desc="Parsing", unit="completion", delay=1):
        key = record["pair_id"], record["perspective"], record["sample_index"]
        if key in order:
            parsed = parse_completion(record["text"], plan.book.schema)
            rows[order[key]] = {
                **record,
                "model": model,
                "rationale": parsed.rationale,
                "predicted_label": parsed.predicted_label,
                "parse_error": parsed.parse_error,
            }
    columns = [*COMPLETIONS.columns, "finish_reason", "completion_tokens"]
    return pd.DataFrame([rows[place] for place in sorted(rows)], columns=columns)


def summary(completions: pd.DataFrame) -> dict[str, Any]:
    """Count, a perspective: completions, those with a label, reasons of the others, length, and distinct samples."""
    report = {}
    for perspective, rows in completions.groupby("perspective", sort=False):
        unread = rows["parse_error"].dropna()
        distinct = rows.groupby("pair_id")["text"].nunique() / rows.groupby("pair_id")["text"].size()
        report[perspective] = {
            "completions": len(rows),
            "with_label": round(float(rows["predicted_label"].notna().mean()), 4),
            "parse_errors": unread.map(reason_code).value_counts().to_dict(),
            "cut_by_max_tokens": int((rows["finish_reason"] == "length").sum()),
            "mean_tokens": round(float(rows["completion_tokens"].mean()), 1),
            "distinct_samples": round(float(distinct.mean()), 4),
        }
    return report


class Progress:
    """A progress bar over completions, which also shows pairs a second and tokens a second."""

    def __init__(self, plan: Plan, done: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=len(plan), initial=done, desc="Generating", unit="completion", dynamic_ncols=True)
        self.per_pair = plan.per_pair
        self.started = time.monotonic()
        self.completions = self.tokens = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def add(self, completions: int, tokens: int) -> None:
        """Count what has come."""
        self.completions += completions
        self.tokens += tokens
        seconds = max(time.monotonic() - self.started, 1e-3)
        pairs = self.completions / self.per_pair / seconds
        self.bar.set_postfix_str(f"{pairs:.2f} pairs/s, {self.tokens / seconds:.0f} tokens/s", refresh=False)
        self.bar.update(completions)
