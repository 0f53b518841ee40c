"""The tables and parquet files of a published dataset."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from recipes.data.bazaar_rules import STRUCTURES
from recipes.publish.dataset_checks import Source
from recipes.schemas import PERSPECTIVES, SPLITS

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from datasets import DatasetInfo

    Tables = dict[str, dict[str, pa.Table]]  # configuration -> split -> rows

# The three columns that join rationales with embeddings.
KEY = ("pair_id", "perspective", "rationale_index")
RATIONALE_COLUMNS = ("pair_id", "query", "product_title", "locale", "label", *KEY[1:], "rationale", "predicted_label")
ROW_GROUP = 10_000

MEANINGS = {
    "pair_id": "Identifies a pair in every configuration",
    "query": "What the shopper typed",
    "product_title": "The product's title",
    "locale": "Marketplace of the pair",
    "label": "Gold label: one of the classes below",
    "product_id": "The product in its source",
    "brand": "Brand of the product; null: none",
    "color": "Colour of the product",
    "bullet_point": "Bullet points of the product's page",
    "description": "Description of the product",
    "source": "Where the pair comes from",
    "perspective": f"{', '.join(PERSPECTIVES[:2])} or {PERSPECTIVES[2]}",
    "rationale_index": "0, 1, ... among the rationales of a pair and perspective",
    "rationale": "The teacher's reasoning, as it was embedded",
    "predicted_label": "The label that this reasoning arrives at, right or wrong; null: none could be read",
    "cot_embedding": "Embedding of the rationale by the frozen encoder",
    "encoder": "The encoder",
    "encoder_revision": "Its revision, or the hash of its weights",
    "query_kind": "How the query was made",
    "misspelt": "true: the query has a slip of the finger",
    "query_structure": "What the query asks for, as JSON",
    "product_structure": "What the product is, as JSON",
}
ONE_ROW = {
    "pairs": "a query and a product, judged",
    **dict.fromkeys(PERSPECTIVES, "a rationale"),
    "embeddings": "the embedding of a rationale",
    "structures": "what is behind a pair",
}


def to_parquet(tables: Tables) -> tuple[dict[str, bytes], dict[str, DatasetInfo]]:
    """Make `<configuration>/<split>.parquet` of each table.

    Returns:
        Path in the repository -> content, and configuration -> features and sizes, as `datasets` knows them.
    """
    import datasets
    from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo
    from tqdm import tqdm

    datasets.disable_progress_bars()  # one bar over all files instead of one a file
    files: dict[str, bytes] = {}
    infos = {}
    for name, splits in tqdm(tables.items(), desc="parquet", unit="configuration", delay=1):
        recorded = SplitDict()
        for split, table in splits.items():
            rows, content = Dataset(table), io.BytesIO()
            rows.to_parquet(content, batch_size=ROW_GROUP)
            files[f"{name}/{split}.parquet"] = content.getvalue()
            recorded.add(SplitInfo(name=split, num_bytes=table.nbytes, num_examples=len(rows)))
        infos[name] = DatasetInfo(
            features=rows.features,
            splits=recorded,
            download_size=sum(len(files[f"{name}/{split}.parquet"]) for split in splits),
            dataset_size=sum(table.nbytes for table in splits.values()),
        )
    return files, infos


def describe(tables: Tables) -> dict[str, dict[str, Any]]:
    """Say what a row of each configuration is, and what its columns hold."""
    return {
        name: {
            "one_row": ONE_ROW[name],
            "columns": [(field.name, _type(field.type), MEANINGS[field.name]) for field in splits[SPLITS[0]].schema],
        }
        for name, splits in tables.items()
    }


def _type(kind: pa.DataType) -> str:
    import pyarrow as pa

    return f"float32[{kind.list_size}]" if pa.types.is_fixed_size_list(kind) else str(kind)


def configurations(source: Source) -> Tables:
    """Lay out the tables; the columns' types are fixed and the same in every split."""
    import pyarrow as pa

    def strings(rows: pd.DataFrame, columns: list[str]) -> pa.Table:
        types = [(name, pa.int32() if name == "rationale_index" else pa.string()) for name in columns]
        table = pa.Table.from_pandas(rows[columns], schema=pa.schema(types), preserve_index=False)
        return table.replace_schema_metadata(None)

    def by_split(rows: pd.DataFrame, columns: list[str]) -> dict[str, pa.Table]:
        return {split: strings(rows[rows["split"] == split], columns) for split in SPLITS}

    size = source.vectors.shape[1]
    embeddings = {}
    for split in SPLITS:
        chosen = (source.rationales["split"] == split).to_numpy()
        table = strings(source.rationales[chosen], [*KEY, "encoder", "encoder_revision"])
        vectors = pa.FixedSizeListArray.from_arrays(source.vectors[chosen].reshape(-1), size)
        embeddings[split] = table.add_column(len(KEY), "cot_embedding", vectors)
    tables = {"pairs": by_split(source.pairs, [name for name in source.pairs if name != "split"])}
    for perspective in PERSPECTIVES:
        rows = source.rationales[source.rationales["perspective"] == perspective]
        tables[perspective] = by_split(rows, list(RATIONALE_COLUMNS))
    tables["embeddings"] = embeddings
    if source.structures is not None:
        tables["structures"] = by_split(source.structures, [name for name in STRUCTURES.columns if name != "split"])
    return tables


def one_example(source: Source) -> dict[str, Any]:
    """Choose the first training pair with all three perspectives, and one that they disagree on where there is one."""
    rows = source.rationales[source.rationales["split"] == "train"]
    rows = rows.drop_duplicates(["pair_id", "perspective"])
    groups = rows.groupby("pair_id", sort=False)["predicted_label"]
    best = (groups.size() * 10 + groups.nunique(dropna=False)).idxmax()
    chosen = rows[rows["pair_id"] == best]
    pair = chosen.iloc[0]
    return {
        "query": pair["query"],
        "product_title": pair["product_title"],
        "locale": pair["locale"],
        "label": pair["label"],
        "rationales": list(
            chosen[["perspective", "rationale", "predicted_label"]].fillna("").itertuples(index=False, name=None)
        ),
    }
