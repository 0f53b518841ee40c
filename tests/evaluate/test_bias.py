import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import fisher_exact

from recipes.arguments import UserError
from recipes.data.bazaar_rules import Ask, Offer
from recipes.data.perturb import Pair, to_pairs
from recipes.evaluate.bias import BiasArguments, bias, device_brand, first_party, measure, swap_brands, within_queries
from recipes.schemas import PAIRS, load_labels, write

ESCI = load_labels("esci")


def arguments(**changes):
    values = {"model": "m", "pairs": "p", "output": "o", "draws": 100, "fewest": 2, "swaps": 2, **changes}
    return BiasArguments(**values)


def table():
    return pd.DataFrame({
        "pair_id": list("abcdef"), "query": ["mug", "mug", "mug", "acme hat", "acme hat", "case"], "locale": "us",
        "product_title": ["Acme mug", "Zed mug", "Mug", "Acme hat", "Zed hat", "Zed case for Acme"],
        "label": ["Exact", "Exact", "Exact", "Exact", "Substitute", "Exact"],
        "brand": ["Acme", "Zed", None, "Acme", "Zed", "Zed"],
    })  # fmt: skip


def test_swaps_and_third_parties_by_hand():
    pairs = to_pairs(table(), ESCI)
    swapped = swap_brands(pairs, 3, seed=0)
    # Two titles whose query names no brand and has a rival; "acme hat" names one; "case" has one product.
    assert swapped[["row", "product_title", "brand"]].to_numpy().tolist() == [
        [0, "Zed mug", "Zed"],
        [1, "Acme mug", "Acme"],
    ]
    parties = first_party(pairs)
    assert parties[["row", "product_title"]].to_numpy().tolist() == [[5, "Acme case for Acme"]]
    assert device_brand(pairs[5], {"Acme", "Zed"}) == "Acme"
    assert device_brand(pairs[0], {"Acme", "Zed"}) is None
    offer = Offer("phone case", host="smartphone", brand="Kabelin", fits_brand="Norvani")
    assert device_brand(Pair("q", "t", "en", ask=Ask(("phone case",)), offer=offer), set()) == "Norvani"


def test_measured_by_hand():
    frame = table()
    pairs = to_pairs(frame, ESCI)
    swapped = pd.concat([swap_brands(pairs, 3, 0), first_party(pairs)], ignore_index=True)
    #                   a    b    c    d    e    f   | a to Zed, b to Acme, f to Acme
    scores = np.array([0.9, 0.5, 0.7, 0.8, 0.2, 0.4, 0.7, 0.8, 0.9])
    result = measure(frame, pairs, swapped, scores, scores < 0.45, arguments())
    assert result["swaps"]["change"]["value"] == pytest.approx((-0.2 + 0.3) / 2)
    assert result["swaps"]["absolute_change"]["value"] == pytest.approx(0.25)
    assert result["swaps"]["decision_flips"]["value"] == 0
    assert (result["swaps"]["tried"], result["swaps"]["pairs"]) == (2, 2)
    assert result["filtered_wrongly"]["value"] == pytest.approx(1 / 5)  # f; e is not relevant
    acme, zed = result["brands"]["Acme"], result["brands"]["Zed"]
    assert (acme["value"], acme["expected"], acme["products"], acme["queries"]) == (0, 0, 2, 2)
    assert (zed["value"], zed["expected"]) == (0.5, 0.5)  # the one that is filtered is the only one of its query
    assert zed["p_holm"] == 1
    assert result["third_party"]["third"]["value"] == 1
    assert result["third_party"]["first"]["value"] is None
    assert result["third_party"]["change"]["value"] == pytest.approx(0.5)
    assert result["put_in"] == {}  # one query is too few for a test


def test_a_model_that_hates_a_brand_is_found_and_a_fair_one_is_not():
    rng = np.random.default_rng(0)
    rows = [(f"mug {n // 2}", brand) for n in range(120) for brand in [("Acme", "Zed", "Qux")[n % 3]]]
    frame = pd.DataFrame(rows, columns=["query", "brand"]).assign(
        locale="us", label="Exact", pair_id=[f"p{n}" for n in range(120)],
        product_title=lambda f: f["brand"] + " mug " + f["query"],
    )  # fmt: skip
    pairs = to_pairs(frame, ESCI)
    swapped = swap_brands(pairs, 2, 0)
    titles = pd.concat([frame["product_title"], swapped["product_title"]]).to_numpy()
    fair = 0.8 + 0.01 * rng.standard_normal(len(titles))
    hates = fair - 0.5 * np.array([title.startswith("Zed") for title in titles])
    for scores, expected in ((fair, set()), (hates, {"Zed"})):
        result = measure(frame, pairs, swapped, scores, scores < 0.5, arguments(draws=1000))
        assert {
            brand for brand, entry in result["brands"].items() if entry["p_holm"] < 0.001 and entry["value"] > 0.5
        } == expected
        lower = {b for b, entry in result["put_in"].items() if entry["p_holm"] < 0.05 and entry["value"] < -0.1}
        assert lower == expected


def test_within_one_query_it_is_fishers_test_and_strangers_do_not_matter():
    rng = np.random.default_rng(1)
    hits, brand = rng.random(30) < 0.4, rng.random(30) < 0.3
    table = [[(hits & brand).sum(), (~hits & brand).sum()], [(hits & ~brand).sum(), (~hits & ~brand).sum()]]
    expected, p = within_queries(hits, brand, np.zeros(30, dtype=int))
    assert p == pytest.approx(fisher_exact(table).pvalue)
    assert expected == pytest.approx(hits.mean())
    more_hits, no_brand = np.append(hits, [True] * 9), np.append(brand, [False] * 9)
    assert within_queries(more_hits, no_brand, np.repeat([0, 1], [30, 9])) == (expected, p)
    # Two queries of two products, one the brand's, both times the one that is filtered: (1/2)^2, and the same for none.
    both = np.array([True, False, True, False])
    assert within_queries(both, both, np.array([0, 0, 1, 1])) == (0.5, pytest.approx(0.5))


@pytest.fixture
def folder(tmp_path):
    write(table(), tmp_path / "pairs" / "test.parquet", PAIRS)
    return tmp_path


def test_from_files(folder, build_checkpoint):
    checkpoint = str(build_checkpoint(ESCI.names))
    options = {"model": checkpoint, "pairs": str(folder / "pairs"), "output": str(folder / "out")}
    report = bias(arguments(**options))
    assert report == json.loads((folder / "out" / "bias.json").read_text())
    assert report["filtered"] == "predicted Irrelevant"
    assert (folder / "out" / "bias.png").stat().st_size > 9000
    assert "brand swaps" in (folder / "out" / "bias.md").read_text()
    everything = bias(arguments(**options, filtered_below=2.0))
    assert everything["filtered_wrongly"]["value"] == 1
    nothing = bias(arguments(**options, filtered_below=-1.0))
    assert nothing["filtered_wrongly"]["value"] == 0
    file = Path(checkpoint, "config.json")
    config = json.loads(file.read_text())
    biases = [50.0 if config["id2label"][str(index)] == "Irrelevant" else 0.0 for index in range(len(ESCI.names))]
    file.write_text(json.dumps({**config, "class_biases": biases}))  # audited as it is served: everything is Irrelevant
    assert bias(arguments(**options))["filtered_wrongly"]["value"] == 1


@pytest.mark.parametrize(
    ("changes", "message"), [({"swaps": 0}, "--swaps 0: expected at least 1"), ({"split": "train"}, "no such file")]
)
def test_bad_input(folder, changes, message):
    with pytest.raises(UserError, match=message):
        bias(arguments(pairs=str(folder / "pairs"), output=str(folder / "out"), **changes))


def test_pairs_without_brands(folder):
    write(table().drop(columns="brand"), folder / "pairs" / "test.parquet", PAIRS)
    with pytest.raises(UserError, match="no pair has a `brand`"):
        bias(arguments(pairs=str(folder / "pairs"), output=str(folder / "out")))
