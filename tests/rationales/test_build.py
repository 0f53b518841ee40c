"""recipes.rationales.build: which completions become rationales."""

import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.arguments import UserError, parse
from recipes.rationales.build import BuildArguments, build, read_completions, select
from recipes.schemas import COMPLETIONS, PAIRS, PERSPECTIVES, RATIONALES, load_labels, read, write

PAIR_ROWS = pd.DataFrame(
    {
        "pair_id": ["p1", "p2", "p3"],
        "query": ["red pen", "phone", "lamp"],
        "product_title": ["Red pen", "Phone case", "Desk lamp"],
        "locale": "us",
        "label": ["Exact", "Complement", "Exact"],
    }
)


def completion(pair_id, perspective, predicted_label, rationale="Because of that.", sample_index=0):
    return {
        "pair_id": pair_id,
        "perspective": perspective,
        "sample_index": sample_index,
        "rationale": rationale,
        "predicted_label": predicted_label,
    }


COMPLETION_ROWS = pd.DataFrame(
    [
        completion("p2", "business_rule", "C", "A case is an accessory, so C."),
        completion("p1", "structured_analysis", "Exact", "Colour and type agree."),
        completion("p1", "user_intent", "S", "She wants blue."),
        completion("p1", "user_intent", "exact", "A writer wants red.", sample_index=2),
        completion("p1", "user_intent", "E", "Red it is.", sample_index=1),
        completion("p2", "user_intent", None, "Unparsed."),
        completion("p2", "structured_analysis", "complement", None),
        completion("p3", "business_rule", "E", "So Exact."),
        completion("p1", "unified", "E", "All in all it fits."),
        completion("elsewhere", "unified", "E"),
    ]
)


@pytest.fixture
def run_build(tmp_path):
    """Write pairs and completions, build, and return rationales and report."""
    for split, rows in (("train", PAIR_ROWS[:2]), ("validation", PAIR_ROWS[2:]), ("test", PAIR_ROWS[:0])):
        write(rows, tmp_path / "pairs" / f"{split}.parquet", PAIRS)

    def call(rows=COMPLETION_ROWS, **options):
        write(rows, tmp_path / "completions.parquet", COMPLETIONS)
        options.setdefault("completions", [str(tmp_path / "completions.parquet")])
        output = tmp_path / "rationales.parquet"
        build(BuildArguments(pairs=str(tmp_path / "pairs"), output=str(output), **options))
        report = json.loads((tmp_path / "rationales.parquet.report.json").read_text(encoding="utf-8"))
        return read(output, RATIONALES), report

    return call


def test_consistent_rationales_in_the_order_of_pairs_and_perspectives(run_build):
    rows, report = run_build()
    assert rows[["pair_id", "perspective", "rationale", "predicted_label"]].to_numpy().tolist() == [
        ["p1", "user_intent", "Red it is.", "Exact"],  # sample 0 is wrong, so sample 1 is the first
        ["p1", "structured_analysis", "Colour and type agree.", "Exact"],
        ["p2", "business_rule", "A case is an accessory.", "Complement"],
    ]
    assert report["removed"] == {
        "pair not in these splits": 2,
        "other perspective": 1,
        "no rationale": 1,
        "predicts another label": 2,
        "nothing but a verdict": 0,
    }
    assert (report["pairs"], report["pairs_with_rationale"]) == (2, 2)
    assert report["perspectives"]["business_rule"] == {"rationales": 1, "mean_words": 5.0}


def test_all_samples(run_build):
    rows, _ = run_build(samples="all")
    assert list(rows["rationale"][:2]) == ["Red it is.", "A writer wants red."]


def test_concatenation_has_one_row_a_pair(run_build):
    rows, _ = run_build(target="concatenation", separator=" </s> ", samples="all")
    assert list(rows["pair_id"]) == ["p1", "p2"]
    assert set(rows["perspective"]) == {"concatenation"}
    assert rows["rationale"][0] == "Red it is. </s> A writer wants red. </s> Colour and type agree."


def test_concatenation_keeps_the_label_only_where_all_agree(run_build):
    rows, _ = run_build(target="concatenation", keep="all")
    assert rows["rationale"][0] == "She wants blue.\nColour and type agree."
    assert rows["predicted_label"].isna().tolist() == [True, True]


def test_one_perspective_and_unified(run_build):
    assert list(run_build(target="business_rule")[0]["pair_id"]) == ["p2"]
    assert list(run_build(target="unified")[0]["rationale"]) == ["All in all it fits."]


def test_splits_and_rationales_that_are_only_a_verdict(run_build):
    rows, report = run_build(splits=["validation", "train"])
    assert report["removed"]["nothing but a verdict"] == 1
    assert "p3" not in set(rows["pair_id"])
    assert report["coverage_by_label"] == {"Complement": 1.0, "Exact": 0.5}
    kept, _ = run_build(splits=["validation"], strip_label_names=False)
    assert list(kept["rationale"]) == ["So Exact."]


def test_several_files(run_build, tmp_path):
    write(COMPLETION_ROWS[:3], tmp_path / "a.parquet", COMPLETIONS)
    write(COMPLETION_ROWS[3:], tmp_path / "b.parquet", COMPLETIONS)
    rows, _ = run_build(completions=[str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")])
    pd.testing.assert_frame_equal(rows, run_build()[0])
    with pytest.raises(UserError, match=r"a\.parquet: pair_id 'p2'.*is in an earlier file too"):
        run_build(completions=[str(tmp_path / "a.parquet"), str(tmp_path / "a.parquet")])


rows_strategy = st.lists(
    st.tuples(
        st.sampled_from(["p1", "p2", "p3", "x"]),
        st.sampled_from([*PERSPECTIVES, "unified"]),
        st.integers(0, 3),
        st.sampled_from(["Exact", "Complement", None]),
        st.sampled_from([None, " ", "text"]),
    ),
    unique_by=lambda row: row[:3],
    max_size=20,
)


@settings(deadline=None, max_examples=60)
@given(rows_strategy)
def test_every_completion_is_kept_or_counted_once(rows):
    names = ["pair_id", "perspective", "sample_index", "predicted_label", "rationale"]
    frame = pd.DataFrame(rows, columns=names).astype({"rationale": object, "predicted_label": object})
    try:
        kept, counts = select(frame, PAIR_ROWS, BuildArguments(pairs="p", completions=["c"], output="o"))
    except UserError:
        assert not (frame["pair_id"].isin(PAIR_ROWS["pair_id"]) & frame["perspective"].isin(PERSPECTIVES)).any()
        return
    assert len(kept) + sum(counts.values()) == len(frame)
    assert (kept["label"] == kept["predicted_label"]).all()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            COMPLETION_ROWS.assign(pair_id="x" + COMPLETION_ROWS["pair_id"]),
            {},
            "none of the 10 completions has a pair_id",
        ),
        (
            COMPLETION_ROWS,
            {"target": "unified", "splits": ["validation"]},
            "no completion of unified; found business_r",
        ),
        (COMPLETION_ROWS, {"splits": ["dev"]}, "splits: dev: expected some of train"),
        (COMPLETION_ROWS.assign(predicted_label="Z"), {}, "label 'Z' is not in the schema 'esci'"),
        (COMPLETION_ROWS.assign(predicted_label="I"), {}, "no rationale is left of 10 completions"),
        (COMPLETION_ROWS, {"labels": "aliexpress6"}, "column 'label': label 'Exact' is not in the schema"),
        (COMPLETION_ROWS, {"completions": ["nowhere.parquet"]}, "nowhere.parquet: no such file. Expected completions"),
    ],
)
def test_bad_input(run_build, tmp_path, rows, options, message):
    with pytest.raises(UserError, match=message):
        run_build(rows, **options)
    assert not (tmp_path / "rationales.parquet").exists()


def test_unparsed_labels_stay_null(tmp_path):
    write(COMPLETION_ROWS, tmp_path / "c.parquet", COMPLETIONS)
    labels = read_completions([str(tmp_path / "c.parquet")], load_labels("esci"))["predicted_label"]
    assert labels.isna().sum() == 1
    assert set(labels.dropna()) == {"Exact", "Substitute", "Complement"}


def test_the_papers_recipe_parses():
    arguments = parse(
        BuildArguments,
        None,
        ["--config", "recipes/configs/rationales/build.yaml", "--pairs", "p", "--completions", "c", "--output", "o"],
    )
    assert (arguments.target, arguments.keep, arguments.splits) == ("unified", "consistent", ["train"])
