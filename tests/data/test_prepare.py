"""recipes.data.prepare: what comes out of good input, and one clear error for each kind of bad input."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.arguments import UserError, parse, read_yaml
from recipes.data.prepare import PrepareArguments, prepare
from recipes.data.splits import Splitter, overlap
from recipes.data.text import normalise
from recipes.schemas import PAIRS, SPLITS, read_pairs
from tests.hub_server import Repository, serve

LABELS = ["Exact", "Substitute", "Complement", "Irrelevant"]


def esci_rows(queries=20, products=5, locale="us", split="train", offset=0):
    """Rows in ESCI's own columns: `products` products for each query, no text twice."""
    return pd.DataFrame(
        {
            "example_id": offset + number,
            "query": f"{locale} {split} query {number // products}",
            "query_id": number // products,
            "product_id": f"B{offset + number:05d}",
            "product_title": f"{locale} {split} title {number}",
            "product_locale": locale,
            "esci_label": "ESCI"[number % 4],
            "small_version": number % 2,
            "large_version": 1,
            "split": split,
            "product_brand": None if number % 3 else "Acme",
        }
        for number in range(queries * products)
    )


@pytest.fixture
def run_prepare(tmp_path):
    """Write a frame to a file, prepare it, and return the three splits and the report."""

    def call(rows, suffix=".parquet", **options):
        if isinstance(rows, pd.DataFrame):
            path = tmp_path / f"rows{suffix}"
            if suffix == ".parquet":
                rows.to_parquet(path)
            elif suffix in (".csv", ".tsv"):
                rows.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
            else:
                rows.to_json(path, orient="records", lines=suffix == ".jsonl", force_ascii=False)
            rows = path
        prepare(PrepareArguments(source=[str(rows)], output=str(tmp_path / "pairs"), **options))
        report = json.loads((tmp_path / "pairs" / "report.json").read_text(encoding="utf-8"))
        return read_pairs(tmp_path / "pairs"), report

    return call


BOTH = pd.concat([esci_rows(), esci_rows(queries=6, split="test", offset=1000)], ignore_index=True)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv", ".json", ".jsonl"])
def test_every_format_gives_the_same_pairs(run_prepare, suffix):
    splits, report = run_prepare(BOTH, suffix, validation_fraction=0.2)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 80, "validation": 20, "test": 30}
    assert list(splits["test"]["pair_id"]) == [str(1000 + number) for number in range(30)]
    assert list(splits["test"]["label"][:4]) == LABELS
    assert splits["test"]["brand"].isna().sum() == 20
    assert report["splits"]["test"]["us"] == {
        "rows": 30, "queries": 6, "titles": 30, "Exact": 8, "Substitute": 8, "Complement": 7, "Irrelevant": 7,
    }  # fmt: skip


def test_its_own_output_goes_through_unchanged(run_prepare, tmp_path):
    splits, _ = run_prepare(BOTH)
    again, _ = run_prepare(tmp_path / "pairs")
    for split in SPLITS:
        pd.testing.assert_frame_equal(splits[split], again[split])


def test_labels_as_words_and_our_own_columns(run_prepare):
    rows = BOTH.rename(columns={"product_locale": "locale", "esci_label": "label", "example_id": "pair_id"})
    rows["label"] = rows["label"].map(dict(zip("ESCI", ["exact", "SUBSTITUTE", "Complement", " I "], strict=True)))
    splits, _ = run_prepare(rows)
    assert list(splits["test"]["label"][:4]) == LABELS


def test_columns_mapping_and_another_schema(run_prepare):
    rows = pd.DataFrame({"q": ["lamp", "pen"] * 5, "name": [f"n{i}" for i in range(10)], "grade": "brand mismatch"})
    rows["q"] += [str(number) for number in range(10)]
    splits, _ = run_prepare(
        rows,
        ".csv",
        columns=["q=query", "name=product_title", "grade=label"],
        default_locale="en",
        labels="aliexpress6",
    )
    assert set(pd.concat(splits.values())["label"]) == {"Brand Mismatch"}
    assert set(splits["train"]["locale"]) == {"en"}


def test_pair_ids_are_stable_and_follow_the_pair(run_prepare):
    rows = BOTH.drop(columns="example_id")
    first = pd.concat(run_prepare(rows)[0].values()).set_index("product_id")["pair_id"]
    second = pd.concat(run_prepare(rows.iloc[::-1])[0].values()).set_index("product_id")["pair_id"]
    assert first.to_dict() == second.to_dict()
    assert first.is_unique
    assert first.str.fullmatch("[0-9a-f]{16}").all()


def test_texts_are_kept_as_they_are(run_prepare):
    texts = [
        "ｆｕｌｌ　ｗｉｄｔｈ",
        "emoji 🎁👩‍👩‍👧",
        "cafe\u0301",
        "タオル（２枚）",
        'quote " and, comma',
        "NA",
        "null",
        "two\nlines",
    ]
    rows = esci_rows(queries=len(texts), products=1).assign(query=texts)
    for suffix in (".csv", ".tsv", ".json", ".jsonl", ".parquet"):
        splits, _ = run_prepare(rows, suffix, test_fraction=0.0, validation_fraction=0.0)
        assert list(splits["train"]["query"]) == texts


def test_a_file_in_another_encoding(run_prepare, tmp_path):
    path = tmp_path / "spanish.csv"
    path.write_text(BOTH.replace("us train query 3", "niña café").to_csv(index=False), encoding="latin-1")
    with pytest.raises(UserError, match=r"spanish\.csv: line 17, byte 6 of it \(0xf1\) is not utf-8.*--encoding"):
        run_prepare(path)
    splits, _ = run_prepare(path, encoding="latin-1", validation_fraction=0.0)
    assert (splits["train"]["query"] == "niña café").sum() == 5


def test_a_byte_order_mark_is_no_part_of_the_first_column(run_prepare, tmp_path):
    for suffix, text in ((".csv", BOTH.to_csv(index=False)), (".jsonl", BOTH.to_json(orient="records", lines=True))):
        path = tmp_path / f"bom{suffix}"
        path.write_text(text, encoding="utf-8-sig")
        assert "1000" in set(run_prepare(path)[0]["test"]["pair_id"])


def test_files_of_a_folder_are_its_splits(run_prepare, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    rows = BOTH.drop(columns="split")
    rows[:50].to_csv(folder / "train-00000-of-00002.csv", index=False)
    rows[50:100].to_parquet(folder / "train-00001-of-00002.parquet")
    rows[100:].to_json(folder / "test.jsonl", orient="records", lines=True)
    splits, _ = run_prepare(folder)
    assert len(splits["test"]) == 30
    assert len(run_prepare(f"{folder}/train-*.csv", test_fraction=0.0, validation_fraction=0.0)[0]["train"]) == 50


# Splits: sizes, whole queries, leakage


def test_sizes_are_reached_per_locale_by_whole_queries(run_prepare):
    rows = pd.concat(
        [esci_rows(locale=locale, offset=offset) for locale, offset in (("us", 0), ("jp", 1000), ("es", 2000))]
        + [esci_rows(locale=locale, split="test", offset=offset) for locale, offset in (("us", 3000), ("jp", 4000))]
    )
    splits, _ = run_prepare(rows, train_size=42, test_size=11, validation_fraction=0.1, locales=["US", "jp"])
    for split, smallest in (("train", 42), ("test", 11), ("validation", 4)):
        counts = splits[split].groupby("locale").size()
        assert sorted(counts.index) == ["jp", "us"]
        assert counts.between(smallest, smallest + 4).all()  # less than one query of 5 above
        assert (splits[split].groupby("query").size() == 5).all()


def test_draws_depend_on_the_seed_only(run_prepare):
    def queries(rows, seed):
        return set(run_prepare(rows, train_size=30, seed=seed, validation_fraction=0.0)[0]["train"]["query"])

    assert queries(BOTH, 1) == queries(BOTH.sample(frac=1, random_state=0), 1)
    assert queries(BOTH, 1) != queries(BOTH, 2)
    # Another locale more does not change the draw.
    both = queries(pd.concat([BOTH, esci_rows(locale="jp", offset=5000)]), 1)
    assert {query for query in both if query.startswith("us")} == queries(BOTH, 1)


def test_a_source_without_splits_is_cut_by_query(run_prepare):
    splits, report = run_prepare(esci_rows().drop(columns="split"), test_fraction=0.2, validation_fraction=0.25)
    assert [len(splits[split]) for split in SPLITS] == [60, 20, 20]
    assert report["leakage_left"]["train in test"] == {"query": 0, "title": 0}


def leaky():
    """Train row 0 has a test query (in another spelling), row 5 a test title, validation row 2 a test title."""
    rows = pd.concat(
        [esci_rows(), esci_rows(split="validation", offset=500), esci_rows(split="test", offset=1000)],
        ignore_index=True,
    )
    rows.loc[0, "query"] = "ＵＳ  Test, Query 3!"
    rows.loc[5, "product_title"] = "us test TITLE 4."
    rows.loc[102, "product_title"] = "us test title 9"
    rows.loc[7, "product_title"] = "us validation title 1"
    return rows


def test_leakage_goes_from_train_then_validation_never_from_test(run_prepare):
    splits, report = run_prepare(leaky())
    assert [len(splits[split]) for split in SPLITS] == [97, 99, 100]
    assert {"0", "5", "7"}.isdisjoint(splits["train"]["pair_id"])
    assert "502" not in set(splits["validation"]["pair_id"])
    assert report["leakage_removed"] == {
        "train": {"query": 1, "title": 2, "rows": 3},
        "validation": {"query": 0, "title": 1, "rows": 1},
    }
    assert all(counts == {"query": 0, "title": 0} for counts in report["leakage_left"].values())


def test_leakage_can_be_kept_and_is_counted(run_prepare):
    splits, report = run_prepare(leaky(), leakage="keep")
    assert [len(splits[split]) for split in SPLITS] == [100, 100, 100]
    assert report["leakage_left"] == {
        "train in validation": {"query": 0, "title": 1},
        "train in test": {"query": 1, "title": 1},
        "validation in test": {"query": 0, "title": 1},
    }


def test_leakage_can_be_an_error(run_prepare):
    with pytest.raises(UserError, match=r"row 0, column 'query'.*is in train and in test \(2 such rows\)"):
        run_prepare(leaky(), leakage="error")


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_no_query_or_title_on_both_sides_whatever_the_input(data):
    few = st.sampled_from(["a", "A!", "b", "ｂ", "c", "d", "e", "f", "g"])
    rows = data.draw(
        st.lists(st.tuples(few, few, st.sampled_from(["us", "jp"]), st.sampled_from(SPLITS)), min_size=1, max_size=30)
    )
    frame = pd.DataFrame(rows, columns=["query", "product_title", "locale", "split"])
    frame["query_key"], frame["title_key"] = frame["query"].map(normalise), frame["product_title"].map(normalise)
    splitter = Splitter(
        train_size=data.draw(st.none() | st.integers(1, 20)),
        test_size=data.draw(st.none() | st.integers(1, 20)),
        validation_fraction=0.3,
        test_fraction=0.3,
        leakage="drop",
        seed=0,
    )
    splits = splitter(frame)
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not any(mask.any() for mask in overlap(splits[one], splits[other]).values())
    indices = np.concatenate([rows.index for rows in splits.values()])
    assert len(indices) == len(set(indices))


# Filters


def test_version_filter(run_prepare):
    splits, report = run_prepare(BOTH, version="small")
    assert sum(map(len, splits.values())) == 65
    assert report["rows_removed"]["not in the small version"] == 65
    with pytest.raises(UserError, match="no column 'large_version'"):
        run_prepare(BOTH.drop(columns="large_version"), version="large")


def test_only_the_columns_asked_for_are_written(run_prepare):
    rows = BOTH.assign(product_description="long", product_bullet_point="longer", other=1)
    required = [name for name, column in PAIRS.columns.items() if column.required]
    assert list(run_prepare(rows, keep_columns=[])[0]["test"]) == [*required, "product_id"]
    assert "description" in run_prepare(rows, keep_columns=["description"])[0]["test"]


# Bad input


def broken(row, column, value):
    rows = BOTH.astype({column: object})
    rows.loc[row, column] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            BOTH.drop(columns="product_title"),
            r"no column for 'product_title'.*found example_id, query.*--columns NAME=",
        ),
        (BOTH.drop(columns="product_locale"), r"no column for 'locale'.*--default_locale"),
        (broken(7, "query", "  \u3000\u200b"), r"rows\.parquet: row 7, column 'query': is empty or blank\. .*--blank"),
        (broken(8, "product_title", None), r"row 8, column 'product_title': is empty or blank"),
        (broken(9, "esci_label", "Z"), r"row 9, column 'label': 'Z' is not in the label schema 'esci' \(Exact/E, Sub"),
        (broken(9, "esci_label", None), r"row 9, column 'label'"),
        (broken(3, "product_locale", ""), r"row 3, column 'locale': is empty"),
        (broken(3, "split", "holdout"), r"row 3, column 'split': 'holdout' is no split"),
        (broken(3, "split", None), r"row 3, column 'split'"),
        (broken(4, "example_id", 2), r"row 4, column 'pair_id': '2' stands in an earlier row already.*--duplicates"),
        (
            pd.concat([BOTH, BOTH[6:7]], ignore_index=True),
            rf"row {len(BOTH)}, column 'pair_id': '6' stands in an earlier",
        ),
        (broken(104, "example_id", 2), r"row 104, column 'pair_id': '2' stands for another pair"),
        (
            pd.concat([BOTH, BOTH[:1].assign(esci_label="I", example_id=99999)], ignore_index=True),
            r"row 0, column 'label': Exact and Irrelevant for one pair \(query 'us train query 0'\) \(2 such rows\)",
        ),
    ],
)
def test_a_broken_row_is_named(run_prepare, tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        run_prepare(rows)
    assert not (tmp_path / "pairs").exists()


def test_the_row_that_is_named_is_the_row_of_its_file(run_prepare, tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    BOTH[:60].to_csv(folder / "a.csv", index=False)
    broken(90, "esci_label", "?")[60:].to_csv(folder / "b.csv", index=False)
    with pytest.raises(UserError, match=r"b\.csv: row 30, column 'label'"):
        run_prepare(folder)


def test_bad_rows_can_be_dropped_and_are_counted(run_prepare):
    rows = pd.concat([broken(7, "query", " "), BOTH[:1].assign(esci_label="I", example_id=99)], ignore_index=True)
    rows.loc[9, "product_title"] = None
    rows.loc[21, "example_id"] = 20
    splits, report = run_prepare(rows, blank="drop", conflicts="drop", duplicates="drop", validation_fraction=0.0)
    assert report["rows_removed"] == {
        "blank query": 1,
        "blank product_title": 1,
        "repeated pair and label": 0,
        "conflicting labels": 2,
        "pair_id of another pair": 1,
    }
    assert len(splits["train"]) == 96


def test_repeated_rows_are_merged(run_prepare):
    rows = pd.concat([BOTH, BOTH[:10], BOTH[:5].assign(example_id=range(7000, 7005))])
    splits, report = run_prepare(rows, duplicates="drop")
    assert report["rows_removed"]["repeated pair and label"] == 15
    assert sum(map(len, splits.values())) == len(BOTH)


def test_the_same_pair_in_train_and_test_is_leakage(run_prepare):
    splits, report = run_prepare(pd.concat([BOTH, BOTH[100:103].assign(split="train")]), validation_fraction=0.0)
    assert report["leakage_removed"]["train"]["rows"] == 3
    assert [len(splits[split]) for split in SPLITS] == [100, 0, 30]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"query": "q"', r"a\.jsonl: line 1, column 14: not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl: row 0: expected an object, found list"),
        ("a.jsonl", "", r"a\.jsonl: no rows"),
        ("a.json", '{"query": "q"}', r"a\.json: expected an array of objects"),
        ("a.json", "[{]", r"a\.json: line 1, column 3: not JSON"),
        (
            "a.jsonl",
            '{"query": "\\ud83d", "product_title": "t", "label": "E"}',
            r"a\.jsonl: row 0, column 'query': half of a surrogate pair",
        ),
        ("a.csv", "", r"a\.csv: no column for 'query'"),
        ("a.csv", "query,product_title,label\na,b,E\na,b\n", r"a\.csv: not a readable csv file \(.*Row #3"),
        ("a.parquet", "PAR1 not really", r"a\.parquet: not a readable parquet file"),
        ("a.xlsx", "", r"a\.xlsx: cannot read \.xlsx"),
    ],
)
def test_an_unreadable_file_is_named(run_prepare, tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        run_prepare(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"locales": ["us", "mx"]}, r"locales: no row has mx; the source has us\."),
        ({"columns": ["title:product_title"]}, r"columns: 'title:product_title': expected theirs=ours"),
        ({"columns": ["nowhere=query"]}, r"`columns` maps 'nowhere', which is not there; found example_id"),
        ({"keep_columns": ["price"]}, r"keep_columns: 'price': expected some of"),
        ({"validation_fraction": 1.5}, r"validation_fraction, test_fraction: 1\.5"),
        ({"train_size": 0}, r"train_size, test_size: 0"),
        ({"labels": "nope"}, r"label schema 'nope': no such file"),
        ({"revision": "v1"}, r"`subset` and `revision` are for Hub datasets"),
    ],
)
def test_a_wrong_option_is_named(run_prepare, options, message):
    with pytest.raises(UserError, match=message):
        run_prepare(BOTH, **options)


def test_no_such_source(run_prepare, tmp_path):
    for source in (tmp_path / "nowhere.csv", tmp_path / "*.csv", tmp_path / "no" / "folder"):
        with pytest.raises(UserError, match="no such file"):
            run_prepare(source)


# The recipe, the Hub, the real data


def test_the_papers_recipe_parses():
    config = "recipes/configs/data/esci.yaml"
    assert read_yaml(PrepareArguments, config)["source"] == ["tasksource/esci"]
    arguments = parse(PrepareArguments, None, ["--config", config, "--output", "pairs"])
    assert (arguments.train_size, arguments.test_size, arguments.locales) == (100_000, 10_000, ["us", "es", "jp"])


def parquet(frame):
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return buffer.getvalue()


def test_a_dataset_of_the_hub(tmp_path):
    # As tasksource/esci has it: labels as words, no split column, splits by file.
    words = BOTH.drop(columns="split").replace({"esci_label": dict(zip("ESCI", LABELS, strict=True))})
    repository = Repository(
        {
            "README.md": b"---\nlicense: apache-2.0\n---\n# Pairs\n",
            "data/train-00000-of-00001.parquet": parquet(words[:100]),
            "data/test-00000-of-00001.parquet": parquet(words[100:]),
        }
    )
    with serve({("datasets", "shop/pairs"): repository}) as hub:

        def call(*options):
            command = [sys.executable, "-m", "recipes.data.prepare", "--output", str(tmp_path / "pairs"), *options]
            environment = hub.environment(tmp_path / "hf")
            return subprocess.run(command, check=False, env=environment, capture_output=True, text=True)

        done = call("--source", "shop/pairs", "--version", "large")
        assert done.returncode == 0, done.stderr
        splits = read_pairs(tmp_path / "pairs")
        assert len(splits["test"]) == 30
        assert len(splits["train"]) + len(splits["validation"]) == 100
        report = json.loads((tmp_path / "pairs" / "report.json").read_text())
        assert report["commit"] == repository.commit

        missing = call("--source", "shop/nothing")
        assert missing.returncode == 2
        assert re.match(
            r"error: shop/nothing: .*the Hub does not give it.*doesn't exist", missing.stderr.splitlines()[-1]
        )


@pytest.fixture
def esci_folder():
    """The folder of real ESCI pairs: LRKD_ESCI, or beside the checkout."""
    default = Path(__file__).parents[2] / ".." / "shared" / "data" / "esci"
    folder = Path(os.environ.get("LRKD_ESCI", default))
    if not (folder / "pairs.parquet").is_file():
        pytest.skip("no real ESCI pairs: set LRKD_ESCI to their folder")
    return folder


@pytest.mark.esci
def test_real_esci(run_prepare, esci_folder):
    splits, report = run_prepare(esci_folder / "pairs.parquet", leakage="keep")
    counts = {split: rows.groupby("locale").size().to_dict() for split, rows in splits.items()}
    assert counts == {
        "train": {"us": 5015, "es": 193, "jp": 237},
        "validation": {"us": 813, "es": 40, "jp": 42},
        "test": {"us": 2015, "es": 86, "jp": 119},
    }
    labels = {split: rows["label"].value_counts()[LABELS].tolist() for split, rows in splits.items()}
    assert labels == {"train": [3026, 1512, 220, 687], "validation": [527, 214, 28, 126], "test": [1160, 701, 61, 298]}
    # One query is in two locales, one title differs from another in a no-break space only.
    assert report["leakage_left"]["train in test"] == {"query": 1, "title": 1}
    dropped, _ = run_prepare(esci_folder / "pairs.parquet")
    assert {split: len(rows) for split, rows in dropped.items()} == {"train": 5443, "validation": 895, "test": 2220}


def test_csv_cells_beyond_the_usual_limit_are_read(run_prepare):
    rows = BOTH.astype({"product_title": object})
    rows.loc[0, "product_title"] = "x" * (csv.field_size_limit() + 1)
    splits, _ = run_prepare(rows, ".csv", validation_fraction=0.0)
    assert splits["train"]["product_title"].str.len().max() > csv.field_size_limit()
