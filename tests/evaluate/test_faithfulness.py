import json

import pandas as pd
import pytest

from recipes.arguments import UserError
from recipes.data.bazaar import make_bazaar
from recipes.evaluate.faithfulness import FaithfulnessArguments, faithfulness, judge, near_duplicates, shingles
from recipes.evaluate.faithfulness_report import measure
from recipes.rationales.build import BuildArguments, build
from recipes.rationales.claims import Source, claims, named_verdicts, proper_brands
from recipes.schemas import COMPLETIONS, FAITHFULNESS, PAIRS, RATIONALES, SPLITS, load_labels, read, write
from recipes.teacher.scripted import complete

ESCI = load_labels("esci")
MUG = Source("acme mug 12 oz", "Acme Mug, 1,500 ml, navy, set of two", "us", "Acme")


def made_up(text, source=MUG, brands=("Acme", "Zed Home")):
    return [(one.kind, one.text) for one in claims(text, source, brands) if not one.grounded]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Acme's mug holds 12 oz or 1500 ml, and there are 2 of it.", []),
        ("It holds 13 oz.", [("number", "13")]),
        ("The title says “set of two” and “mug ... navy”.", []),
        ("The title says “set of four”.", [("quoted", "set of four")]),
        ("Zed Home makes better ones.", [("brand", "Zed Home")]),
        ("A blue mug, so it matches.", []),  # navy is blue
        ("A red ceramic mug.", [("attribute", "ceramic"), ("attribute", "red")]),
        ("It fits the kitchen.", []),
        ('Sold by ACMÉ: 12" wide, "Mug" in the title.', []),  # inches open no quotation
        ("", []),
    ],
)
def test_claims_by_hand(text, expected):
    assert made_up(text) == expected


@pytest.mark.parametrize(
    ("title", "text", "expected"),
    [
        ("黒い革の財布 二つ折り", "A black wallet of 2 folds.", []),
        ("ＭＵＧ １２個セット 黒", "A set of 12; 黒 is asked for.", []),  # full width
        ("黒い財布", "The wallet is red: 赤 is written as “赤い財布”.", [("quoted", "赤い財布"), ("attribute", "red")]),
    ],
)
def test_japanese(title, text, expected):
    assert made_up(text, Source("財布", title, "jp"), ()) == expected


def test_ordinary_words_are_no_brands():
    rationales = ["An Original Zed, as original as can be.", "Amazing Choice"]
    assert proper_brands(["Zed", "Original", "Amazing Choice", "zed", "3M"], rationales) == {"Zed", "Amazing Choice"}


def test_a_verdict_is_told_from_a_word():
    assert named_verdicts("The exact size is met, so it is an Exact match.", ESCI) == ["Exact"]
    assert named_verdicts("A substitute teacher's exact size.", ESCI) == []
    assert named_verdicts("It is a substitute for the pen, so Irrelevant.", ESCI) == ["Substitute", "Irrelevant"]


def test_near_duplicates():
    long = "the query asks for a phone and the title sells a case for that phone which is an accessory for it"
    texts = pd.Series([long, f"{long}!", "something else entirely is said here", long.replace("case", "box"), "", ""])
    assert near_duplicates(texts, 0.8, 0) == [None, 0, None, None, None, None]
    assert near_duplicates(texts, 0.5, 0)[3] == 0  # 3 of 18 shingles differ on each side: 16 / 22
    assert shingles("one two") == {"one two"}


COMPLETION = {
    "q1": [("user_intent", "Acme mug of 12 oz, so Exact.", "Exact"), ("business_rule", "13 oz.", "Irrelevant")],
    "q2": [("user_intent", "It is a substitute, so Exact.", "Exact"), ("business_rule", "Fine.", None)],
}


def table():
    pairs = pd.DataFrame({"pair_id": ["q1", "q2"], "query": [MUG.query, "mug"], "product_title": MUG.title,
                          "locale": "us", "label": "Exact", "brand": "Acme"})  # fmt: skip
    rows = [(pair, perspective, 0, text, verdict) for pair, all_of in COMPLETION.items()
            for perspective, text, verdict in all_of]  # fmt: skip
    columns = ["pair_id", "perspective", "sample_index", "rationale", "predicted_label"]
    return pairs, pd.DataFrame(rows, columns=columns)


def test_measured_by_hand():
    pairs, completions = table()
    judged = judge(completions.merge(pairs, on="pair_id"), ESCI).assign(duplicate_of=None)
    assert judged["invented"].tolist() == ["", "number: 13", "", ""]
    assert judged["named"].tolist() == ["Exact", "", "Exact; Substitute", ""]
    assert judged["other_verdict"].tolist() == [0, 0, 1, 0]
    assert judged["faithful"].tolist() == [1, 0, 0, 0]  # the last has no verdict
    report = measure(judged, ESCI, draws=200, seed=0)
    everything = report["groups"]["all"]
    assert everything["shares"]["makes something up"]["value"] == 0.25
    assert everything["shares"]["verdict is right"]["value"] == 0.5
    assert everything["claims"]["number"] | {"interval": None} == {
        "value": 0.5, "interval": None, "rows": 2, "queries": 1,
    }  # fmt: skip
    assert everything["verdicts"]["Exact"]["value"] == 0.5 - 1
    # Right ones have 7 and 7 words, wrong ones 2 and 1.
    assert everything["words_right_minus_wrong"]["value"] == pytest.approx(6.5 - 1.5)
    assert report["together"]["verdicts differ"]["rows"] == 1  # q2 has one verdict only
    assert report["together"]["best and worst class at once"]["value"] == 1


@pytest.fixture
def files(tmp_path):
    pairs, completions = table()
    write(pairs, tmp_path / "pairs" / "train.parquet", PAIRS)
    write(completions, tmp_path / "completions.parquet", COMPLETIONS)
    return {"pairs": str(tmp_path / "pairs"), "completions": [str(tmp_path / "completions.parquet")], "output":
            str(tmp_path / "out"), "splits": ["train"], "draws": 100}  # fmt: skip


def test_the_filter_keeps_what_is_faithful(files, tmp_path):
    report = faithfulness(FaithfulnessArguments(**files))
    assert report["groups"] == json.loads((tmp_path / "out" / "faithfulness.json").read_text())["groups"]
    assert "makes something up" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "plot.png").stat().st_size > 9000
    judged = tmp_path / "out" / "completions.parquet"
    options = {"pairs": files["pairs"], "completions": files["completions"], "output": str(tmp_path / "r.parquet"),
               "strip_label_names": False}  # fmt: skip
    build(BuildArguments(**options, keep="all"))
    assert len(read(options["output"], RATIONALES)) == 4
    build(BuildArguments(**options, keep="all", filter=str(judged)))
    assert read(options["output"], RATIONALES)["pair_id"].tolist() == ["q1"]
    assert json.loads((tmp_path / "r.parquet.report.json").read_text())["removed"]["not faithful"] == 3
    write(read(judged, FAITHFULNESS).iloc[1:], tmp_path / "less.parquet", FAITHFULNESS)
    with pytest.raises(UserError, match=r"has no row for \{'pair_id': 'q1', 'perspective': 'user_intent'"):
        build(BuildArguments(**options, keep="all", filter=str(tmp_path / "less.parquet")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"similarity": 0.0}, "more than 0"), ({"splits": ["dev"]}, "expected some of train"),
     ({"completions": ["none.parquet"]}, "no such file"), ({"draws": 0}, "at least 1")],
)  # fmt: skip
def test_bad_input(files, changes, message):
    with pytest.raises(UserError, match=message):
        faithfulness(FaithfulnessArguments(**{**files, **changes}))


def test_other_pairs_are_refused(files, tmp_path):
    other = pd.DataFrame({"pair_id": ["z"], "query": ["z"], "product_title": ["z"], "locale": "us", "label": "Exact"})
    write(other, tmp_path / "pairs" / "train.parquet", PAIRS)
    with pytest.raises(UserError, match="none of the 4 completions has a pair_id"):
        faithfulness(FaithfulnessArguments(**files))


def test_the_scripted_teacher_makes_nothing_up_that_the_structures_do_not_know():
    """It only speaks of structures; what a perspective imagines (children's things for adults) is the exception."""
    frames = make_bazaar(50, seed=2)
    pairs = pd.concat([frames[split] for split in SPLITS], ignore_index=True)
    completions = complete(pairs, frames["structures"])
    rows = completions.merge(pairs, on="pair_id")
    judged = judge(rows, load_labels("aliexpress6"), frames["structures"])
    assert (judged["invented"] != "").mean() < 0.02
    blind = judge(rows, load_labels("aliexpress6"))  # implied attributes and models in other scripts stand nowhere
    assert (blind["invented"] != "").mean() >= (judged["invented"] != "").mean()
    named = judged["named"] != ""
    assert named.mean() > 0.9  # its endings say the verdict
    assert judged["other_verdict"].mean() < 0.02
