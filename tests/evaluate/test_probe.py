import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel
from sklearn.metrics import f1_score

from modeling_lrkd import LRKDForSequenceClassification
from recipes.arguments import UserError
from recipes.evaluate.keywords import absent, choose_keywords, label_pairs, normalise, words
from recipes.evaluate.probe import ProbeArguments, probe
from recipes.evaluate.probe_report import format_probe
from recipes.evaluate.probing import fit_and_count, summarise
from recipes.schemas import PAIRS, RATIONALES, load_labels, write
from tests.tiny import save_tiny_encoder, tiny_tokenizer

PAIRS_OF_A_SPLIT, QUERIES = 120, 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It doesn't fit; the brand’s name IMPLIES 3 parts", {"fit", "the", "brand", "name", "implies", "parts"}),
        ("Ｗｉｒｅｌｅｓｓ zapatos de niño", {"wireless", "zapatos", "niño"}),  # NFKC; two letters are too few
        ("無線イヤホンのケースです", {"無線", "イヤホン", "ケース"}),
        ("ｲﾔﾎﾝ 用", {"イヤホン"}),  # half-width; one kanji alone is no word
        ("무선 이어폰은 상품", {"무선", "이어폰은", "상품"}),
    ],
)
def test_words_of_each_script(text, expected):
    assert words(text) == expected


def test_absence_is_of_the_word_or_where_words_have_no_ends_of_the_characters():
    surface = "防水イヤホンケース red shoes"
    found = words(surface)
    assert absent("shoe", surface, found)
    assert not absent("shoes", surface, found)
    assert not absent("イヤホン", normalise(surface), found)  # inside a longer run of katakana
    assert absent("無線", normalise(surface), found)


def test_keywords_are_frequent_absent_and_not_trivial():
    rationales = ["the shoe implies comfort", "implies shoe", "implies a lace", "likely a lace the"]
    surfaces = ["shoe", "shoe", "hat", "hat"]
    assert choose_keywords(rationales, surfaces, 3, 1.0, {"the"}) == ["implies", "lace", "comfort"]  # shoe: in surface
    assert choose_keywords(rationales, surfaces, 3, 0.5, {"the"}) == ["lace", "comfort", "likely"]
    present, lacking = label_pairs(["lace", "shoe"], rationales, surfaces)
    assert present.tolist() == [[False, False, True, True], [True, True, False, False]]
    assert lacking.tolist() == [[True, True, True, True], [False, False, True, True]]


@pytest.fixture(scope="module")
def planted():
    """Two keywords that r_qp gives away and h_cls does not; a third that no scored rationale has."""
    generator = np.random.default_rng(0)
    rows = 2 * PAIRS_OF_A_SPLIT
    present = generator.random((3, rows)) < 0.3
    present[2, PAIRS_OF_A_SPLIT:] = False
    noise = generator.normal(size=(rows, 5)).astype("float32")
    signal = np.hstack([2.0 * present[:2].T + 0.5 * generator.normal(size=(rows, 2)), noise[:, :3]]).astype("float32")
    lacking = generator.random((3, rows)) < 0.9
    is_fit = np.arange(rows) < PAIRS_OF_A_SPLIT
    query = np.arange(rows) // (rows // (2 * QUERIES))
    features = {"guided": {"h_cls": noise, "r_qp": signal}, "control": {"h_cls": noise, "r_qp": noise}}
    counts, skipped = fit_and_count(features, present, lacking, query, is_fit, ~is_fit, 3, "balanced", 0.1, 0)
    return counts, skipped, present, lacking, is_fit, query, features


def test_a_planted_signal_is_found_and_nothing_is_found_where_there_is_none(planted):
    counts, skipped, present, lacking, is_fit, *_ = planted
    eligible = lacking & ~is_fit
    result = summarise(counts, ["one", "two", "none"], present & eligible, eligible, 500, 0)
    assert [keyword for keyword, _ in skipped] == [2]
    assert "to score on" in skipped[0][1]
    assert list(result["keywords"]) == ["one", "two"]
    found = result["differences"]["guided"]["r_qp"]
    assert found["difference"] > 0.3
    assert found["interval"][0] > 0.2
    assert found["p"] < 0.01
    nothing = result["differences"]["control"]["r_qp"]
    assert (nothing["difference"], nothing["interval"], nothing["p"]) == (0, (0, 0), 1)
    assert {values["t_test_over_runs_p"] for values in nothing["keywords"].values()} == {1.0}
    assert result["between_models"]["control"]["difference"] == pytest.approx(-found["difference"])
    share = (present[0] & eligible[0]).sum() / eligible[0].sum()
    always = f1_score((present[0])[eligible[0]], np.ones(eligible[0].sum()))
    assert result["keywords"]["one"]["always"] == pytest.approx(2 * share / (1 + share)) == pytest.approx(always)


def test_f1_intervals_and_tests_against_counts_by_hand():
    # One keyword, two runs, two queries: (true positives, predicted + actual positives).
    h_cls = np.array([[[[1, 0], [1, 1]]], [[[3, 1], [2, 2]]]], dtype=float)
    r_qp = np.array([[[[1, 1], [2, 1]]], [[[2, 2], [4, 2]]]], dtype=float)
    one = np.ones((1, 4), dtype=bool)
    counts = {("m", "h_cls"): h_cls, ("m", "r_qp"): r_qp}
    result = summarise(counts, ["k"], one, one, 2000, 0)
    f1 = {"h_cls": [2 * 1 / 4, 2 * 2 / 4], "r_qp": [2 * 2 / 4, 2 * 3 / 6]}
    for vector, values in f1.items():
        assert result["models"]["m"][vector]["keywords"]["k"] == values
        assert result["models"]["m"][vector]["mean_f1"] == np.mean(values)
    found = result["differences"]["m"]["r_qp"]
    assert found["difference"] == 0.25
    assert found["keywords"]["k"]["t_test_over_runs_p"] == pytest.approx(ttest_rel(f1["r_qp"], f1["h_cls"]).pvalue)
    # Samples of two queries: both first (1/4 of them), both second, or one each.
    both_first = (2 / 2 + 4 / 4) / 2 - (2 / 3 + 2 / 2) / 2
    both_second = (2 / 2 + 2 / 2) / 2 - (0 / 1 + 2 / 2) / 2
    assert found["interval"] == pytest.approx((both_first, both_second))


def test_a_split_that_is_both_is_scored_where_it_was_not_fitted(planted):
    *_, present, lacking, is_fit, query, features = planted
    everywhere = np.ones_like(is_fit)
    counts, _ = fit_and_count(
        {"guided": {"r_qp": features["guided"]["r_qp"]}},
        present,
        lacking,
        query,
        everywhere,
        everywhere,
        2,
        "none",
        0.1,
        1,
    )
    scored_queries = (counts["guided", "r_qp"][1].sum(axis=0) > 0).sum(axis=1)  # with any positive at all
    assert (scored_queries <= 0.2 * 2 * QUERIES).all()
    assert (scored_queries > 0).all()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Untrained students, pairs, and rationales that say "implies" where the title has an x."""
    folder = tmp_path_factory.mktemp("probe")
    save_tiny_encoder(folder / "encoder")
    for extractor in ("gat", "cls", "none"):
        LRKDForSequenceClassification.from_encoder(
            str(folder / "encoder"), extractor_type=extractor, reasoning_dim=6, num_labels=4
        ).save_pretrained(folder / extractor)
        tiny_tokenizer().save_pretrained(folder / extractor)
    generator = np.random.default_rng(0)
    tables = []
    for split in ("train", "test"):
        marked = generator.random(60) < 0.4
        pairs = pd.DataFrame(
            {
                "pair_id": [f"{split}-{number}" for number in range(60)],
                "query": [f"shoe {split} {number // 3}" for number in range(60)],
                "product_title": ["xx xx xx" if mark else "red lace" for mark in marked],
                "locale": ["us" if number % 2 else "jp" for number in range(60)],
                "label": load_labels("esci").names[0],
            }
        )
        write(pairs, folder / "pairs" / f"{split}.parquet", PAIRS)
        texts = ["implies sturdy" if mark else "sturdy" for mark in marked]
        tables.append(pairs.assign(perspective="unified", rationale=texts, predicted_label=pairs["label"]).iloc[3:])
    write(pd.concat(tables, ignore_index=True), folder / "rationales.parquet", RATIONALES)
    write(tables[0], folder / "train_only.parquet", RATIONALES)
    return folder


def arguments_of(workspace, *models, **changes):
    given = {
        "pairs": str(workspace / "pairs"),
        "rationales": str(workspace / "rationales.parquet"),
        "output": str(workspace / "out"),
        "runs": 2,
        "draws": 100,
        "c": 1.0,
        **changes,
    }
    return ProbeArguments(models=[str(model) for model in models], **given)


def test_the_whole_way(workspace):
    models = (f"gat={workspace / 'gat'}", workspace / "gat")  # named, and named by its folder
    with pytest.raises(UserError, match="each name once"):
        probe(arguments_of(workspace, *models))
    result = probe(arguments_of(workspace, models[0], f"same={workspace / 'gat'}", projected=True))
    assert json.loads((workspace / "out" / "probe.json").read_text())["keywords"] == result["keywords"]
    assert list(result["keywords"]) == ["implies"]  # "sturdy" is in every rationale
    assert result["pairs"] == {"fit": 57, "scored": 57}
    assert set(result["models"]["gat"]) == {"h_cls", "r_qp", "projected"}
    assert result["models"]["gat"]["r_qp"]["mean_f1"] > 0.9  # x is easy to see
    assert result["models"]["gat"] == result["models"]["same"]
    assert (workspace / "out" / "probe.png").stat().st_size > 1000
    assert (workspace / "out" / "probe.md").read_text() == format_probe(result, markdown=True)
    assert max(map(len, format_probe(result, markdown=False).splitlines())) <= 100

    skipped = probe(arguments_of(workspace, models[0], max_share=1.0, locale="us"))
    assert [text.partition(":")[0] for text in skipped["skipped"]] == ["sturdy"]
    assert "Skipped: sturdy: one class alone" in format_probe(skipped, markdown=False)
    assert skipped["pairs"]["fit"] < 40


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("none", {}, "extractor_type 'none', so no latent reasoning"),
        ("cls", {}, "extractor_type 'cls', so no latent reasoning"),
        ("encoder", {}, "a 'bert' model; expected a student"),
        ("nowhere", {}, "nowhere: not a loadable student"),
        ("gat", {"c": 0.0}, "--c 0.0: expected more than 0"),
        ("gat", {"runs": 1}, "--runs 1: expected at least 2"),
        ("gat", {"rationales": "train_only"}, "no rationale of a pair of .*test.parquet. Make them with .*--splits"),
        ("gat", {"locale": "fr"}, "no rationale of a pair of locale 'fr'"),
        ("gat", {"ignore": ["implies"]}, "no keyword is left. Raise --max_share"),
    ],
)
def test_bad_input_is_refused(workspace, model, changes, message):
    if "rationales" in changes:
        changes = {"rationales": str(workspace / f"{changes['rationales']}.parquet")}
    with pytest.raises(UserError, match=message):
        probe(arguments_of(workspace, workspace / model, **changes))
