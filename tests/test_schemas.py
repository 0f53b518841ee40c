"""The column contracts and the label schemas."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.arguments import UserError
from recipes.schemas import (
    COMPLETIONS,
    PAIRS,
    PREDICTIONS,
    RATIONALES,
    SFT,
    check,
    load_labels,
    read,
    read_pairs,
    write,
)

PAIR_ROWS = pd.DataFrame(
    {
        "pair_id": ["a", "b", "c"],
        "query": ["red pen", "ペン", "🎁"],
        "product_title": ["Pen", "Pen", "Box"],
        "locale": "us",
        "label": "Exact",
    }
)
RATIONALE_ROWS = PAIR_ROWS.assign(perspective="unified", rationale="Because.", predicted_label=[None, "Exact", None])
PREDICTION_ROWS = PAIR_ROWS.drop(columns="product_title").assign(
    predicted_label="Exact", probabilities=[[0.5, 0.5]] * 3
)
COMPLETION_ROWS = pd.DataFrame(
    {"pair_id": ["a"], "perspective": "unified", "sample_index": 0, "rationale": [None], "predicted_label": [None]}
)


@pytest.mark.parametrize(
    ("rows", "contract"),
    [
        (PAIR_ROWS, PAIRS),
        (PAIR_ROWS.assign(brand=None, other=1), PAIRS),
        (PAIR_ROWS[:0], PAIRS),
        (PAIR_ROWS.astype({"locale": "category"}), PAIRS),
        (RATIONALE_ROWS, RATIONALES),
        (RATIONALE_ROWS.assign(cot_embedding=[np.ones(4, dtype=np.float32)] * 3), RATIONALES),
        (PREDICTION_ROWS, PREDICTIONS),
        (COMPLETION_ROWS, COMPLETIONS),
    ],
)
def test_what_is_written_is_read(tmp_path, rows, contract):
    path = write(rows, tmp_path / "new" / "rows.parquet", contract)
    back = read(path, contract)
    assert list(back) == list(rows)
    assert back["pair_id"].tolist() == rows["pair_id"].tolist()
    assert [file.name for file in path.parent.iterdir()] == ["rows.parquet"]


def test_a_table_keeps_its_own_types(tmp_path):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(6, dtype=np.float32)), 2)
    table = pa.Table.from_pandas(RATIONALE_ROWS).append_column("cot_embedding", vectors)
    path = write(table, tmp_path / "rows.parquet", RATIONALES)
    assert pq.read_schema(path).field("cot_embedding").type == pa.list_(pa.float32(), 2)


@pytest.mark.parametrize(
    ("rows", "contract", "message"),
    [
        (PAIR_ROWS.drop(columns="label"), PAIRS, r"column 'label' is missing from pairs, which recipes\.data\.prepare"),
        (PAIR_ROWS.assign(query=[1, 2, 3]), PAIRS, "column 'query' holds int64; expected string"),
        (PAIR_ROWS.assign(query=None), PAIRS, "column 'query' holds null; expected string"),
        (PAIR_ROWS.assign(query=["x", None, "y"]), PAIRS, r"row 1, column 'query': is null; expected a string"),
        (PAIR_ROWS.assign(product_title=["x", "y", " \t\u3000"]), PAIRS, "row 2, column 'product_title': is empty or"),
        (
            PAIR_ROWS.assign(pair_id=["a", "b", "a"]),
            PAIRS,
            "row 2 repeats pair_id='a'; pair_id must be unique",
        ),
        (RATIONALE_ROWS.assign(cot_embedding="x"), RATIONALES, "column 'cot_embedding' holds .*; expected vector"),
        (
            RATIONALE_ROWS.assign(cot_embedding=[[1.0, 2.0], [1.0], [1.0, 2.0]]),
            RATIONALES,
            "row 1, column 'cot_embedding': has 1 numbers; expected 2, as in row 0",
        ),
        (
            RATIONALE_ROWS.assign(cot_embedding=[[1.0, 2.0], [1.0, 2.0], [float("nan"), 1.0]]),
            RATIONALES,
            "row 2, column 'cot_embedding': has NaN or infinite numbers",
        ),
        (
            PREDICTION_ROWS.assign(probabilities=[[0.5, 0.5], [float("inf"), 0], [0, 1]]),
            PREDICTIONS,
            "row 1, column 'probabilities'",
        ),
        (COMPLETION_ROWS.assign(sample_index=0.5), COMPLETIONS, "column 'sample_index' holds double; expected integer"),
        (
            pd.concat([COMPLETION_ROWS] * 2),
            COMPLETIONS,
            r"row 1 repeats pair_id='a', perspective='unified', sample_index=(np\.int64\(0\)|0); ",
        ),
    ],
)
def test_a_broken_table_is_neither_written_nor_read(tmp_path, rows, contract, message):
    path = tmp_path / "rows.parquet"
    with pytest.raises(UserError, match=message) as error:
        write(rows, path, contract)
    assert str(path) in str(error.value)
    assert not path.exists()
    rows.to_parquet(path, index=False)
    with pytest.raises(UserError, match=message):
        read(path, contract)


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.parquet: no such file\. Expected pairs, made by recipes\.data"):
        read(tmp_path / "nowhere.parquet", PAIRS)
    path = write(PAIR_ROWS, tmp_path / "rows.parquet", PAIRS)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"rows\.parquet: not a readable parquet file .* Make it again with"):
        read(path, PAIRS)


def test_a_disk_that_refuses_leaves_the_old_file(tmp_path, monkeypatch):
    path = write(PAIR_ROWS, tmp_path / "rows.parquet", PAIRS)

    def full(table, where):
        where.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(UserError, match=r"rows\.parquet: could not be written .*No space left"):
        write(PAIR_ROWS[:1], path, PAIRS)
    assert len(read(path, PAIRS)) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["rows.parquet"]


def test_pairs_are_a_folder_of_splits(tmp_path):
    write(PAIR_ROWS, tmp_path / "train.parquet", PAIRS)
    assert list(read_pairs(tmp_path, ["train"])) == ["train"]
    with pytest.raises(UserError, match=r"validation\.parquet: no such file"):
        read_pairs(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read_pairs(tmp_path / "nowhere")


words = st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=5)


@given(st.lists(words, unique=True, min_size=1, max_size=5))
def test_any_text_that_is_not_blank_passes(texts):
    rows = pa.table(dict.fromkeys(PAIRS.columns, texts))
    check(rows, PAIRS, source="here")


# Label schemas


def test_esci():
    esci = load_labels("esci")
    assert esci.names == ["Exact", "Substitute", "Complement", "Irrelevant"]
    assert esci.gains == [1.0, 0.1, 0.01, 0.0]
    assert esci.label2id["Complement"] == 2
    assert esci.id2label[3] == "Irrelevant"
    assert [esci.canonical(spelling) for spelling in ("e", " SUBSTITUTE ", "C", "x", "")] == [
        "Exact", "Substitute", "Complement", None, None,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["esci", "aliexpress6"])
def test_every_spelling_is_one_class(name):
    schema = load_labels(name)
    assert [schema.canonical(class_name) for class_name in schema.names] == schema.names
    assert all(label.definition and 0 <= label.gain <= 1 for label in schema.labels)


def test_a_column_of_labels():
    column = pd.Series(["E", None, "irrelevant"], name="label", dtype=object)
    assert load_labels("esci").canonical_column(column, "here").tolist()[::2] == ["Exact", "Irrelevant"]
    with pytest.raises(UserError, match=r"here: row 1, column 'label': label 'Z' is not in the schema 'esci' \(Ex"):
        load_labels("esci").canonical_column(pd.Series(["E", "Z"], name="label"), "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x", "not a label schema"),
        ("- x", "not a label schema"),
        ("name: [", r"not a label schema \([^\n]*\); compare recipes/labels/esci\.yaml\.$"),
        ("name: x\nrelevant: [a]\nlabels:\n  - {name: a, gain: 1, definition: d}", "two classes or more, found a"),
        ("name: x\nrelevant: []\nlabels:\n  - nmae: a", "not a label schema"),
        ("name: x\nrelevant: [b]\nlabels:\n  - {name: a, gain: 1, definition: d}", "`relevant` must name classes"),
        (
            "name: x\nrelevant: [a]\nlabels:\n"
            "  - {name: a, gain: 1, definition: d}\n  - {name: a, gain: 0, definition: d}",
            "each class once",
        ),
        (
            "name: x\nrelevant: [a]\nlabels:\n  - {name: a, gain: 1, definition: d, translations: {en: good}}",
            "a: expected a list of words, found 'good'",
        ),
        (
            "name: x\nrelevant: [a]\nlabels:\n  - {name: a, gain: 1, definition: d, translations: [good]}",
            "a: `translations` must be",
        ),
        (
            "name: x\nrelevant: [a]\nlabels:\n  - {name: a, gain: 1, definition: d, aliases: [b]}\n"
            "  - {name: c, gain: 0, definition: d, translations: {en: [B]}}",
            "'B' stands for a and for c",
        ),
    ],
)
def test_a_broken_label_schema_is_named(tmp_path, text, message):
    path = tmp_path / "labels.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_labels(str(path))
    assert str(path) in str(error.value)


def test_no_such_label_schema():
    with pytest.raises(UserError, match=r"label schema 'nope': no such file\. Known: aliexpress6, esci"):
        load_labels("nope")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "row 0, column 'prompt': has no message; expected one or more"),
        ([{"role": "user", "content": None}, {"role": "user", "content": "x"}], "a message without content"),
        ("plain text", r"holds .*string; expected messages \(role, content\)"),
        ([1.0, 2.0], r"holds list.*; expected messages \(role, content\)"),
    ],
)
def test_messages_have_a_role_and_a_content(prompt, message, tmp_path):
    turns = [{"role": "assistant", "content": "yes"}]
    rows = [
        {"prompt": value, "completion": turns, "pair_id": "1", "perspective": "unified"}
        for value in (prompt, prompt or [{"role": "user", "content": "x"}])
    ]
    with pytest.raises(UserError, match=message):
        write(pd.DataFrame(rows), tmp_path / "sft.parquet", SFT)
