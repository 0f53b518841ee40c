"""The rows of a source, checked one by one: what is wrong is named by file, row and column, or dropped and counted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from recipes.arguments import UserError
from recipes.data.sources import SPLIT_NAMES
from recipes.data.text import normalise
from recipes.schemas import LabelSchema

if TYPE_CHECKING:
    import pandas as pd


def clean(
    frame: pd.DataFrame,
    labels: LabelSchema,
    *,
    locales: Sequence[str] = (),
    default_locale: str | None = None,
    version: str = "all",
    blank: str = "error",
    conflicts: str = "error",
    duplicates: str = "error",
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Check what `recipes.data.sources.read_source` returned; the options are those of `recipes.data.prepare`.

    Returns:
        The rows that stay, with canonical label, locale and split, a pair_id, and the keys by which texts are compared
        (`query_key`, `title_key`); and why the other rows went.

    Raises:
        UserError: Naming the first offending file, row and column, and how many rows are like it.
    """
    removed: dict[str, int] = {}

    def drop(reason: str, mask: pd.Series) -> None:
        nonlocal frame
        removed[reason] = int(mask.sum())
        frame = frame[~mask]

    frame = _with_locale(frame, default_locale)
    if locales:
        drop("other locale", ~frame["locale"].isin(_known_locales(frame, locales)))
    if version != "all":
        drop(f"not in the {version} version", ~_in_version(frame, version))
    for key, column in (("query_key", "query"), ("title_key", "product_title")):
        frame = frame.assign(**{key: _keys(frame[column])})
        empty = frame[key] == ""
        if empty.any() and blank == "error":
            raise _refuse(frame, empty, column, "is empty or blank", "Correct it, or pass --blank drop.")
        drop(f"blank {column}", empty)
    frame = _with_label(frame, labels)
    frame = _with_split(frame)

    if "pair_id" in frame and duplicates == "error":
        again = frame["pair_id"].fillna("").str.strip().ne("") & frame.duplicated(["split", "pair_id"])
        if again.any():
            found = f"{frame['pair_id'][again].iloc[0]!r} stands in an earlier row already"
            raise _refuse(frame, again, "pair_id", found, "Correct it, or pass --duplicates drop.")

    # One pair is one product for one query; rows without a product_id are told apart by their title.
    product = frame["product_id"].fillna(frame["product_title"]) if "product_id" in frame else frame["product_title"]
    frame = frame.assign(product=product)
    frame = frame.assign(pair=frame.groupby(["locale", "query", "product"], sort=False).ngroup())
    drop("repeated pair and label", frame.duplicated(["split", "pair", "label"]))
    several = frame.groupby("pair")["label"].transform("nunique") > 1
    if several.any() and conflicts == "error":
        pair = frame[frame["pair"] == frame["pair"][several].iloc[0]]
        found = f"{' and '.join(pair['label'].unique())} for one pair (query {pair['query'].iloc[0]!r})"
        raise _refuse(frame, several, "label", found, "Correct it, or pass --conflicts drop.")
    drop("conflicting labels", several)

    frame = _with_pair_id(frame)
    # The same pair in two splits is not a repeated id but leakage, which is dealt with when splits are made.
    repeated = frame["pair"] != frame.groupby("pair_id")["pair"].transform("first")
    if repeated.any() and duplicates == "error":
        found = f"{frame['pair_id'][repeated].iloc[0]!r} stands for another pair already"
        raise _refuse(frame, repeated, "pair_id", found, "Correct it, or pass --duplicates drop.")
    drop("pair_id of another pair", repeated)
    return frame.drop(columns=["product", "pair"]), removed


def _refuse(frame: pd.DataFrame, mask: pd.Series, column: str, found: str, remedy: str) -> UserError:
    first = frame[mask].iloc[0]
    rows = f" ({int(mask.sum()):,} such rows)" if mask.sum() > 1 else ""
    return UserError(f"{first['file']}: row {first['row']}, column {column!r}: {found}{rows}. {remedy}")


def _with_locale(frame: pd.DataFrame, default: str | None) -> pd.DataFrame:
    locale = frame["locale"].str.strip().str.lower() if "locale" in frame else None
    if locale is None and default is None:
        found = ", ".join(name for name in frame if name not in ("file", "row", "split"))
        raise UserError(
            f"{frame['file'].iloc[0]}: no column for 'locale' (or product_locale); recognised {found}. "
            "Say which it is, --columns NAME=locale, or pass --default_locale us."
        )
    if locale is None:
        return frame.assign(locale=default)
    missing = locale.isna() | (locale == "")
    if default is not None:
        locale = locale.mask(missing, default)
    elif missing.any():
        raise _refuse(frame, missing, "locale", "is empty", "Correct it, or pass --default_locale.")
    return frame.assign(locale=locale)


def _known_locales(frame: pd.DataFrame, locales: Sequence[str]) -> list[str]:
    wanted = [locale.strip().lower() for locale in locales]
    found = sorted(frame["locale"].unique())
    if unknown := [locale for locale in wanted if locale not in found]:
        raise UserError(f"locales: no row has {', '.join(unknown)}; the source has {', '.join(found)}.")
    return wanted


def _in_version(frame: pd.DataFrame, version: str) -> pd.Series:
    column = f"{version}_version"
    if column not in frame:
        raise UserError(f"{frame['file'].iloc[0]}: no column {column!r}, which --version {version} needs.")
    return frame[column].str.lower().isin(["1", "1.0", "true"])


def _keys(texts: pd.Series) -> pd.Series:
    """Normalise each distinct text once; null becomes the empty string, as blank texts do."""
    from tqdm import tqdm

    distinct = texts.dropna().unique()
    keys = {text: normalise(text) for text in tqdm(distinct, desc=f"Normalising {texts.name}", unit_scale=True)}
    return texts.map(keys).fillna("")


def _with_label(frame: pd.DataFrame, labels: LabelSchema) -> pd.DataFrame:
    distinct = {spelling: labels.canonical(spelling) for spelling in frame["label"].dropna().unique()}
    label = frame["label"].map(distinct)
    unknown = label.isna()
    if unknown.any():
        accepted = ", ".join("/".join([entry.name, *entry.aliases]) for entry in labels.labels)
        found = f"{frame['label'][unknown].iloc[0]!r} is not in the label schema {labels.name!r} ({accepted})"
        raise _refuse(frame, unknown, "label", found, "Correct it, or pass --labels with the schema of this data.")
    return frame.assign(label=label)


def _with_split(frame: pd.DataFrame) -> pd.DataFrame:
    """Call splits train, validation and test; a source without any is all train, to be cut later."""
    if frame["split"].isna().all():
        return frame.assign(split="train")
    names = {name: SPLIT_NAMES.get(name.strip().lower()) for name in frame["split"].dropna().unique()}
    split = frame["split"].map(names)
    if split.isna().any():
        found = f"{frame['split'][split.isna()].iloc[0]!r} is no split; expected train, validation or test"
        raise _refuse(frame, split.isna(), "split", found, "Correct it, or leave the other files out.")
    return frame.assign(split=split)


def _with_pair_id(frame: pd.DataFrame) -> pd.DataFrame:
    """Give each pair without an id the hash of its locale, query and product: the same on every machine and run."""
    pairs = zip(frame["locale"], frame["query"], frame["product"], strict=True)
    if "pair_id" not in frame:
        return frame.assign(pair_id=[_hash(*pair) for pair in pairs])
    missing = frame["pair_id"].isna() | (frame["pair_id"].str.strip() == "")
    if not missing.any():
        return frame
    hashes = frame["query"].mask(~missing)  # a column of the right type
    hashes[missing] = [_hash(*pair) for pair, absent in zip(pairs, missing, strict=True) if absent]
    return frame.assign(pair_id=frame["pair_id"].mask(missing, hashes))


def _hash(locale: str, query: str, product: str) -> str:
    return hashlib.sha256("\x1f".join((locale, query, product)).encode()).hexdigest()[:16]
