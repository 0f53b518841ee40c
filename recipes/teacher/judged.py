"""Completions beside the gold labels: what `sft_data` and `preferences` choose from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError
from recipes.rationales.build import read_completions
from recipes.schemas import PERSPECTIVES, SPLITS, LabelSchema, load_labels, read_pairs
from recipes.teacher.prompts import TEMPLATES, UNIFIED, completion, load_prompts, render

if TYPE_CHECKING:
    import pandas as pd

    from recipes.teacher.prompts import PromptBook

# What a chat template writes between turns. In a rationale it would end the turn in the middle of the training text.
CHAT_MARKUP = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>")


@dataclass(kw_only=True)
class JudgedArguments:
    """Options that `recipes.teacher.sft_data` and `recipes.teacher.preferences` share."""

    pairs: str = field(metadata={"help": "Folder of pairs, one parquet a split."})
    completions: list[str] = field(metadata={"help": "Completions (parquet); several files are joined."})
    output: str = field(metadata={"help": "File to write (parquet)."})
    labels: str = field(metadata={"help": "Label schema: a name in recipes/labels/, or a YAML file."})
    rules: str | None = field(default=None, metadata={"help": "Business rules (None: named as the labels)."})
    templates: str | None = field(
        default=None, metadata={"help": "Folder of prompt templates (None: recipes/prompts)."}
    )
    splits: list[str] = field(default_factory=lambda: ["train"], metadata={"help": "train, validation or both."})
    perspective: str = field(
        default="best", metadata={"help": "For `single`: a perspective, or `best`: the one most often right here."}
    )
    size: int | None = field(default=None, metadata={"help": "Rows to draw (None: all)."})
    same_size_as: str | None = field(default=None, metadata={"help": "Draw as many rows as this parquet file has."})
    seed: int = field(default=0, metadata={"help": "Of what is drawn."})


@dataclass
class Judged:
    """Completions of some pairs, each right or wrong.

    Attributes:
        rows: pair_id, query, product_title, locale, label, perspective, sample_index, rationale, predicted_label,
            right; in the order of the pairs, then perspectives, then samples.
        left_out: Why completions are not among the rows -> how many.
        labels: The label schema.
        book: What the perspective-free prompt is rendered from.
    """

    rows: pd.DataFrame
    left_out: dict[str, int]
    labels: LabelSchema
    book: PromptBook

    def prompt(self, row: Any) -> list[dict[str, str]]:
        """Return the perspective-free prompt of a row: the tuned teacher answers without being told how to look."""
        return render(self.book, UNIFIED, {name: getattr(row, name) for name in ("query", "product_title", "locale")})


def answer(rationale: str, label: str) -> list[dict[str, str]]:
    """Return the assistant's turn: think, then respond, as `recipes.teacher.parse` reads it."""
    return [{"role": "assistant", "content": completion(rationale, label)}]


def judge(arguments: JudgedArguments) -> Judged:
    """Read completions and set the gold labels beside them.

    Completions without a rationale or without a readable label are left out: they are neither right nor wrong.

    Raises:
        UserError: A file breaks its contract, a split is unknown or not for training, or no completion belongs to
            these pairs.
    """
    import pandas as pd

    pairs, completions, splits, labels = arguments.pairs, arguments.completions, arguments.splits, arguments.labels
    if unknown := [split for split in splits if split not in SPLITS]:
        raise UserError(f"splits: {', '.join(unknown)}: expected some of {', '.join(SPLITS)}.")
    if "test" in splits:
        raise UserError("splits: test pairs are for measuring; a teacher that saw their labels would measure nothing.")
    schema = load_labels(labels)
    book = load_prompts(labels, arguments.rules or labels, templates=arguments.templates or TEMPLATES)
    gold = pd.concat(read_pairs(pairs, splits).values(), ignore_index=True)
    gold["label"] = schema.canonical_column(gold["label"], pairs)
    found = read_completions(completions, schema)
    rows = found.merge(gold[["pair_id", "query", "product_title", "locale", "label"]], on="pair_id")
    if rows.empty:
        raise UserError(
            f"{', '.join(completions)}: none of the {len(found):,} completions has a pair_id of {pairs} "
            f"({', '.join(splits)}). Were they made from other pairs?"
        )
    text = rows["rationale"].fillna("").str.strip()
    reasons = {
        "no rationale": text == "",
        "no readable label": rows["predicted_label"].isna(),
        "chat markup in the rationale": text.str.contains(CHAT_MARKUP),
    }
    left_out = {"pair not in these splits": len(found) - len(rows)}
    keep = pd.Series(True, index=rows.index)
    for reason, flawed in reasons.items():
        left_out[reason] = int((keep & flawed).sum())
        keep &= ~flawed
    rows = rows[keep]
    if rows.empty:
        raise UserError(f"{', '.join(completions)}: no completion has both a rationale and a label ({left_out}).")
    place = {name: number for number, name in enumerate((*PERSPECTIVES, UNIFIED))}
    order = pd.Series(range(len(gold)), index=gold["pair_id"])
    rows = rows.assign(
        rationale=text[keep],
        right=rows["predicted_label"] == rows["label"],
        _pair=rows["pair_id"].map(order),
        _perspective=rows["perspective"].map(place).fillna(len(place)),
    )
    rows = rows.sort_values(["_pair", "_perspective", "sample_index"], ignore_index=True)
    return Judged(rows.drop(columns=["_pair", "_perspective", "file"]), left_out, schema, book)


def by_pair(rows: pd.DataFrame) -> Iterator[list[Any]]:
    """Yield the rows of each pair, which lie together, as named tuples.

    Not through pandas: it takes milliseconds a group, and a paper's worth of completions has 100,000 of them.
    """
    for _, group in groupby(rows.itertuples(index=False), key=lambda row: row.pair_id):
        yield list(group)


def best_perspective(rows: pd.DataFrame) -> str:
    """Return the perspective that is right most often; the earlier one where two are equal."""
    share = rows[rows["perspective"].isin(PERSPECTIVES)].groupby("perspective")["right"].mean()
    if share.empty:
        raise UserError(f"no completion of {', '.join(PERSPECTIVES)}; found {', '.join(rows['perspective'].unique())}.")
    return max(share.index, key=lambda name: (share[name], -PERSPECTIVES.index(name)))


def one_perspective(rows: pd.DataFrame, perspective: str) -> pd.DataFrame:
    """Return the rows of one perspective, `best` being the one that is right most often.

    Raises:
        UserError: There are none.
    """
    name = best_perspective(rows) if perspective == "best" else perspective
    chosen = rows[rows["perspective"] == name]
    if chosen.empty:
        known = ", ".join(rows["perspective"].unique())
        raise UserError(f"perspective: no completion of {name!r}; the completions hold {known}.")
    return chosen


def wanted_size(size: int | None, same_size_as: str | None) -> int | None:
    """Return how many rows are wanted: a number, as many as another file has, or None for all.

    Raises:
        UserError: Both are given, the number is not positive, or the file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if same_size_as is None:
        if size is not None and size < 1:
            raise UserError(f"size: {size}; expected 1 or more.")
        return size
    if size is not None:
        raise UserError("size and same_size_as: give one of them.")
    try:
        return int(pq.read_metadata(same_size_as).num_rows)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"same_size_as: {same_size_as}: not a readable parquet file ({error}).") from None


def draw(rows: pd.DataFrame, size: int | None, seed: int, name: str) -> pd.DataFrame:
    """Draw `size` rows without repetition, in their order.

    Raises:
        UserError: There are fewer; drawing some twice would not be a matched size.
    """
    if size is None:
        return rows
    if len(rows) < size:
        raise UserError(
            f"size: {size:,} {name} are wanted and {len(rows):,} are there. Generate more samples a pair "
            "(recipes.teacher.generate --samples), or ask for fewer."
        )
    return rows.sample(n=size, random_state=seed).sort_index(ignore_index=True)
