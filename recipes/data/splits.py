"""Train, validation and test: whole queries drawn by seed, and nothing of a held-out split left in training."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Splitter:
    """Cuts rows with `query`, `locale`, `split`, `query_key`, `title_key` (see `recipes.data.text`) into three splits.

    The source's own test and validation rows are used where it has them; otherwise they are carved out of train, by
    query. A query or title that is also held out is removed from train first and from validation second, never from
    test, and before train is drawn, so that the sizes asked for are reached.

    Attributes:
        train_size: Rows of train per locale: whole queries are drawn until it is reached. None: all.
        test_size: The same for test.
        validation_fraction: Rows of validation, as a part of train, where the source has no such split.
        test_fraction: Rows of test, at most, as a part of all, where the source has no such split.
        leakage: `drop`, `keep`, or `error` (the source's own splits overlap).
        seed: Of the draws.
        dropped: What was removed: split -> rows whose query, or title, is held out.
    """

    train_size: int | None
    test_size: int | None
    validation_fraction: float
    test_fraction: float
    leakage: str
    seed: int
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)

    def __call__(self, frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """Return split -> rows, each in the order of the source."""
        train, validation, test = (frame[frame["split"] == name] for name in ("train", "validation", "test"))
        own_validation, own_test = len(validation) > 0, len(test) > 0
        if own_test:
            test = self._draw(test, "test", lambda rows: self.test_size)
        else:
            test = self._draw(train, "test", lambda rows: min(self.test_size or rows, round(self.test_fraction * rows)))
            train = train.drop(test.index)
        train = self._without(train, test, "train", "test", own_test)
        validation = self._without(validation, test, "validation", "test", own_test)
        if not own_validation:
            fraction = self.validation_fraction
            validation = self._draw(
                train, "validation", lambda rows: round(fraction * min(self.train_size or rows, rows))
            )
            train = train.drop(validation.index)
        train = self._without(train, validation, "train", "validation", own_validation)
        return {
            "train": self._draw(train, "train", lambda rows: self.train_size),
            "validation": validation,
            "test": test,
        }

    def _draw(self, rows: pd.DataFrame, split: str, size: Callable[[int], int | None]) -> pd.DataFrame:
        """Draw whole queries, locale by locale, until `size` (of the locale's number of rows) is reached."""
        import numpy as np

        chosen = np.zeros(len(rows), dtype=bool)
        locales = rows["locale"].to_numpy()
        for locale in sorted(rows["locale"].unique()):
            positions = np.flatnonzero(locales == locale)
            wanted = size(len(positions))
            if wanted is None or wanted >= len(positions):
                chosen[positions] = True
                continue
            queries, of_row, counts = np.unique(
                rows["query_key"].to_numpy()[positions], return_inverse=True, return_counts=True
            )
            # A generator for each split and locale: another locale more or less does not change the draw.
            generator = np.random.default_rng([self.seed, zlib.crc32(f"{split}/{locale}".encode())])
            order = generator.permutation(len(queries))
            before = np.cumsum(counts[order]) - counts[order]
            drawn = np.zeros(len(queries), dtype=bool)
            drawn[order[before < wanted]] = True
            chosen[positions] = drawn[of_row]
        return rows[chosen]

    def _without(
        self, rows: pd.DataFrame, held_out: pd.DataFrame, name: str, held_out_name: str, own: bool
    ) -> pd.DataFrame:
        """Remove the rows whose query or title is held out; `own`: the source itself made the split `held_out`."""
        shared = overlap(rows, held_out)
        leaking = shared["query"] | shared["title"]
        counts = self.dropped.setdefault(name, {"query": 0, "title": 0, "rows": 0})
        if self.leakage == "error" and own and leaking.any():
            first = rows[leaking].iloc[0]
            what = "query" if shared["query"][leaking].iloc[0] else "product_title"
            raise UserError(
                f"{first['file']}: row {first['row']}, column {what!r}: {first[what]!r} is in {name} and in "
                f"{held_out_name} ({leaking.sum()} such rows). --leakage drop removes them from {name}."
            )
        if self.leakage == "keep":
            return rows
        counts["query"] += int(shared["query"].sum())
        counts["title"] += int(shared["title"].sum())
        counts["rows"] += int(leaking.sum())
        return rows[~leaking]


def overlap(rows: pd.DataFrame, held_out: pd.DataFrame) -> dict[str, Any]:
    """Return, for query and title, which of `rows` have one that is in `held_out` too, in whichever locale."""
    return {name: rows[f"{name}_key"].isin(held_out[f"{name}_key"].unique()) for name in ("query", "title")}
