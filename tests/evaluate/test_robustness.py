import json

import numpy as np
import pandas as pd
import pytest

from recipes.arguments import UserError
from recipes.data.perturb import Perturbed
from recipes.evaluate.robustness import RobustnessArguments, measure, robustness
from recipes.evaluate.shares import ratios
from recipes.schemas import PAIRS, load_labels, write

ESCI = load_labels("esci").names
KINDS = ["emoji", "case", "brand_swap_unnamed", "negation", "accessory_words"]


def test_by_hand():
    """Three pairs of two queries; E, E, I are predicted E, S, I, and what the perturbations do is counted by hand."""
    pairs = pd.DataFrame({"pair_id": list("abc"), "query": ["x", "x", "y"], "locale": "us",
                          "label": ["Exact", "Exact", "Irrelevant"]})  # fmt: skip
    changed = pd.DataFrame(
        [(0, "typo", "Exact"), (1, "typo", "Exact"), (2, "typo", "Irrelevant"),
         (0, "negation", None), (1, "negation", None),
         (0, "brand_swap", "Substitute"), (2, "brand_swap", "Irrelevant")],
        columns=["row", "kind", "label"],
    )  # fmt: skip
    predicted = [0, 1, 3, 1, 1, 3, 0, 0, 1, 3]
    probabilities = np.eye(4, dtype=np.float32)[predicted]
    result = measure(pairs, Perturbed(changed), probabilities, load_labels("esci"), draws=200, seed=0)
    assert result["accuracy"]["value"] == pytest.approx(2 / 3)
    typo = result["preserving"]["typo"]
    assert [typo[name]["value"] for name in ("flip", "before", "after")] == pytest.approx([1 / 3, 2 / 3, 1 / 3])
    assert typo["drop"]["value"] == pytest.approx(1 / 3)
    assert typo["flip"]["rows"] == 3
    assert typo["drop"]["interval"] == [0, 0.5]  # query y alone: none; query x alone: one of two
    negation = result["changing"]["negation"]  # of a and b only a was rightly relevant before, and it still is
    assert (negation["fooled"]["value"], negation["fooled"]["rows"], negation["applied"]) == (1, 1, 2)
    assert negation["after"]["value"] is None
    swap = result["changing"]["brand_swap"]
    assert (swap["fooled"]["value"], swap["after"]["value"]) == (0, 1)


def test_a_difference_of_a_ratio_with_itself_is_nothing_and_weights_are_queries():
    rng = np.random.default_rng(0)
    hits, query = rng.integers(0, 2, 60), rng.integers(0, 12, 60)
    result = ratios([hits, hits], [np.ones(60)] * 2, query, draws=300)
    assert result.difference(0, 1) | {"queries": 0} == {"value": 0.0, "interval": [0.0, 0.0], "p": 1.0, "queries": 0}
    assert result.entry(0)["value"] == pytest.approx(hits.mean())
    assert result.entry(0)["queries"] == len(set(query))
    one_query = ratios([hits], [np.ones(60)], np.zeros(60), draws=300).entry(0)
    assert one_query["interval"] == pytest.approx([hits.mean()] * 2)  # one query: nothing to resample


@pytest.fixture
def folder(tmp_path):
    pairs = pd.DataFrame({
        "pair_id": [f"p{n}" for n in range(12)], "query": [f"red shoe {n // 3}" for n in range(12)],
        "product_title": ["Acme red shoe for kids", "Zed blue shoe, wool, men", "oak table"] * 4, "locale": "us",
        "label": ["Exact", "Substitute", "Irrelevant"] * 4, "brand": ["Acme", "Zed", None] * 4,
    })  # fmt: skip
    write(pairs, tmp_path / "pairs" / "test.parquet", PAIRS)
    return tmp_path


def options(folder, **changes):
    values = {"pairs": str(folder / "pairs"), "output": str(folder / "out"), "draws": 100, **changes}
    return RobustnessArguments(**values)


def test_two_students_are_measured_and_a_killed_run_goes_on(folder, build_checkpoint, monkeypatch):
    checkpoint = build_checkpoint(ESCI)
    both = [f"one={checkpoint}", f"two={checkpoint}"]
    report = robustness(options(folder, models=both, kinds=KINDS))
    assert report["systems"]["one"] == report["systems"]["two"]
    assert report == json.loads((folder / "out" / "robustness.json").read_text())
    assert report["skipped"]["brand_swap_unnamed"]["does not apply"] == 4
    assert report["systems"]["one"]["preserving"]["case"]["flip"]["rows"] == 12
    assert "fooled" in (folder / "out" / "table.md").read_text()
    assert (folder / "out" / "plot.png").stat().st_size > 9000

    def killed(*_, **__):
        raise AssertionError("scored again")

    monkeypatch.setattr("recipes.evaluate.predict.load", killed)
    assert robustness(options(folder, models=both, kinds=KINDS))["systems"] == report["systems"]
    with pytest.raises(AssertionError, match="scored again"):  # other texts are scored anew
        robustness(options(folder, models=both, seed=3, kinds=KINDS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["folder"]}, "expected NAME=DIR"),
        ({"models": ["a=x", "a=y"]}, "each name once"),
        ({"kinds": ["typos"]}, "no such perturbation. Choose from typo"),
        ({"limit": 0}, "at least 1"),
        ({"kinds": ["units"]}, "none of units applies"),
        ({"models": ["a=missing"]}, "not a loadable sequence classifier"),
    ],
)
def test_bad_input(folder, changes, message):
    with pytest.raises(UserError, match=message):
        robustness(options(folder, **{"models": ["a=b"], **changes}))
