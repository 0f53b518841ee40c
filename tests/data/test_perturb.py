"""Laws of the perturbations, and values worked out by hand."""

import random
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.arguments import UserError
from recipes.data.bazaar import make_bazaar
from recipes.data.bazaar_rules import Ask, Offer, ask_from_json, label, offer_from_json
from recipes.data.perturb import CHANGING, KINDS, PRESERVING, Pair, augment, perturb, to_pairs
from recipes.schemas import SPLITS, load_labels

PAIR = Pair("acme red mug 12 oz", "Acme red ceramic mug, 12 oz, 500 g, gift box", "us", brand="Acme", rivals=("Zed",))


def apply(kind, pair, seed=0):
    return KINDS[kind](pair, random.Random(seed))


@pytest.fixture(scope="module")
def bazaar():
    frames = make_bazaar(700, seed=5)
    pairs = pd.concat([frames[split] for split in SPLITS], ignore_index=True)
    return pairs, frames["structures"], perturb(pairs, load_labels("aliexpress6"), structures=frames["structures"])


@pytest.mark.parametrize(
    ("kind", "pair", "query", "title"),
    [
        ("case", PAIR, "ACME RED MUG 12 OZ", "acme red ceramic mug, 12 oz, 500 g, gift box"),
        ("units", PAIR, PAIR.query, "Acme red ceramic mug, 12 oz, 0.5kg, gift box"),
        ("query_in_title", replace(PAIR, relevant=False), PAIR.query, f"{PAIR.title} | {PAIR.query}"),
        ("brand_swap", PAIR, PAIR.query, PAIR.title.replace("Acme", "Zed")),
        ("brand_swap_unnamed", replace(PAIR, query="red mug"), "red mug", PAIR.title.replace("Acme", "Zed")),
        ("negation", replace(PAIR, query="mug", title="Red mug"), "mug not red", "Red mug"),
        ("accessory_words", PAIR, PAIR.query, f"Replacement parts for {PAIR.title}"),
        ("accessory_words", replace(PAIR, locale="jp", title="赤いマグ"), PAIR.query, "赤いマグ 専用 交換部品"),
        ("word_order", replace(PAIR, query="red mug"), "mug red", PAIR.title),
    ],
)
def test_by_hand(kind, pair, query, title):
    changed = apply(kind, pair)
    assert (changed.query, changed.title) == (query, title)


@pytest.mark.parametrize(
    ("kind", "pair"),
    [
        ("word_order", replace(PAIR, query="case for phone")),  # order says what is what
        ("word_order", replace(PAIR, query="mug")),
        ("query_in_title", PAIR),  # relevant: the query would be no lie
        ("brand_swap", replace(PAIR, query="red mug")),  # the query names no brand
        ("brand_swap", replace(PAIR, rivals=())),
        ("brand_swap", replace(PAIR, title="Red mug")),
        ("brand_swap_unnamed", PAIR),
        ("brand_swap_unnamed", replace(PAIR, query="zed mug")),  # a rival is named
        ("negation", replace(PAIR, title="Red or blue mug")),  # which colour is it?
        ("negation", PAIR),  # asked for
        ("number_change", replace(PAIR, query="red mug")),
        ("accessory_words", replace(PAIR, query="mug replacement lid")),
        ("accessory_words", replace(PAIR, relevant=False)),
        ("keyword_stuffing", replace(PAIR, locale="de")),  # no words of that language
        ("units", replace(PAIR, title="3M tape for a 5G phone, 1,500 ml")),
    ],
)
def test_does_not_apply(kind, pair):
    assert apply(kind, pair) is None


def test_a_number_and_a_colour_change_to_others():
    title = apply("number_change", PAIR).title
    assert title in {PAIR.title.replace("12", "24"), PAIR.title.replace("12", "36")}
    title = apply("attribute_change", replace(PAIR, title="Acme red mug")).title
    assert title.startswith("Acme ")
    assert title.endswith(" mug")
    assert "red" not in title
    assert not {"burgundy"} & set(title.split())  # a burgundy mug is a red mug


def test_long_titles_are_longer_than_students_read_and_stuffing_says_nothing_new():
    changed = apply("long_title", PAIR)
    assert changed.title.startswith(PAIR.title)
    assert len(changed.title.split()) >= 200
    assert apply("keyword_stuffing", PAIR).title.startswith(f"{PAIR.title}, ")
    assert apply("emoji", PAIR).title.translate({ord(c): None for c in "✨🔥🎁✅💯⭐"}).split() == PAIR.title.split()


def test_a_typo_changes_one_word_and_spares_numbers():
    for seed in range(30):
        before, after = PAIR.title.split(" "), apply("typo_title", PAIR, seed).title.split(" ")
        changed = [one for one, other in zip(before, after) if one != other]
        assert len(before) == len(after)
        assert len(changed) == 1
        assert changed[0].strip(",").isalpha()


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=40), st.text(max_size=60), st.sampled_from(["us", "es", "jp", "de"]), st.integers(0, 9))
def test_any_text_is_taken_and_the_same_seed_gives_the_same(query, title, locale, seed):
    pair = Pair(query, title, locale, brand="Acme", rivals=("Zed", "Q"))
    for kind in KINDS:
        assert apply(kind, pair, seed) == apply(kind, pair, seed)


def test_structures_and_texts_change_together(bazaar):
    """The new label is what the rules say of the changed structures; a preserving kind changes neither."""
    pairs, structures, perturbed = bazaar
    seen = to_pairs(pairs, load_labels("aliexpress6"), structures)
    for kind, function in KINDS.items():
        for pair_id, pair, gold in zip(pairs["pair_id"], seen, pairs["label"]):
            changed = function(pair, random.Random(f"{kind} 0 {pair_id}"))
            if changed is None:
                continue
            if kind in PRESERVING:
                assert label(changed.ask, changed.offer) == gold
            else:
                assert (changed.ask, changed.offer) != (pair.ask, pair.offer)
    changing = perturbed.pairs[perturbed.pairs["kind"].isin(CHANGING)]
    assert changing["label"].notna().all()
    gold = pairs["label"].to_numpy()[changing["row"]]
    was_relevant = changing[gold == "Strongly Relevant"]
    assert (was_relevant["label"] != "Strongly Relevant").all()
    assert dict(was_relevant.groupby("kind")["label"].agg(set)) == {
        "accessory_words": {"Accessory Mismatch"},
        "attribute_change": {"Attribute Mismatch"},
        "brand_swap": {"Brand Mismatch"},
        "negation": {"Attribute Mismatch"},
        "number_change": {"Attribute Mismatch"},
    }


def test_a_swapped_brand_that_nobody_named_is_no_mismatch(bazaar):
    pairs, structures, perturbed = bazaar
    known = structures.set_index("pair_id")
    swapped = perturbed.pairs[perturbed.pairs["kind"] == "brand_swap_unnamed"]
    assert len(swapped) > 30
    for row, gold in zip(swapped["row"], swapped["label"]):
        entry = known.loc[pairs["pair_id"][row]]
        ask, offer = ask_from_json(entry["query_structure"]), offer_from_json(entry["product_structure"])
        assert label(ask, replace(offer, brand="Nobody")) == gold


def test_a_maker_that_is_also_the_devices_is_not_swapped():
    offer = Offer("phone case", host="smartphone", brand="Norvani", fits_brand="Norvani")
    pair = Pair("norvani phone case", "Norvani phone case for Norvani", "en", True, "Norvani", ("Kabelin",),
                Ask(("phone case",), brand="Norvani"), offer)  # fmt: skip
    assert apply("brand_swap", pair) is None


def test_rows_do_not_depend_on_each_other(bazaar):
    pairs, structures, perturbed = bazaar
    some = pairs.iloc[::3].reset_index(drop=True)
    # Rivals of the bazaar come from its catalogue; of other pairs from the query's other products.
    again = perturb(some, load_labels("aliexpress6"), structures=structures).pairs
    ids = pairs["pair_id"].to_numpy()
    expected = perturbed.pairs.assign(pair_id=ids[perturbed.pairs["row"]]).set_index(["pair_id", "kind"])
    found = again.assign(pair_id=some["pair_id"].to_numpy()[again["row"]]).set_index(["pair_id", "kind"])
    columns = ["query", "product_title", "label"]
    pd.testing.assert_frame_equal(found[columns].sort_index(), expected.loc[found.index, columns].sort_index())


def test_what_is_skipped_is_counted():
    pairs = pd.DataFrame({"pair_id": ["a", "b", "c", "d"], "query": ["mug"] * 4, "product_title": ["Mug"] * 4,
                          "locale": "us", "label": "Exact"})  # fmt: skip
    answers = iter([None, PAIR, replace(PAIR, query=" "), replace(PAIR, query="mug", title="Mug")])
    result = perturb(pairs, load_labels("esci"), {"mine": lambda pair, rng: next(answers)})
    assert result.skipped == {"mine": {"does not apply": 1, "changes nothing": 1, "empties a text": 1}}
    assert result.pairs[["row", "kind", "query"]].to_numpy().tolist() == [[1, "mine", PAIR.query]]


def test_structures_of_other_pairs_are_refused(bazaar):
    pairs, structures, _ = bazaar
    with pytest.raises(UserError, match="no row for pair"):
        perturb(pairs, load_labels("aliexpress6"), structures=structures.iloc[1:])


def test_augment_changes_the_share_it_is_told_and_keeps_the_rest(bazaar):
    pairs, _, _ = bazaar
    schema = load_labels("aliexpress6")
    columns = ["query", "product_title"]
    changed = augment(pairs, schema, 0.4, [], seed=1)
    share = (changed[columns] != pairs[columns]).any(axis=1).mean()
    assert 0.35 < share < 0.45
    others = [name for name in pairs if name not in columns]
    pd.testing.assert_frame_equal(changed[others], pairs[others])
    pd.testing.assert_frame_equal(changed, augment(pairs, schema, 0.4, [], seed=1))
    assert not changed.equals(augment(pairs, schema, 0.4, [], seed=2))
    pd.testing.assert_frame_equal(augment(pairs, schema, 0.0, [], seed=1), pairs)
    everything = augment(pairs, schema, 1.0, [], seed=1)
    # A title that ends with the query would tell the student that the product is irrelevant.
    assert not (everything["product_title"] == pairs["product_title"] + " | " + pairs["query"]).any()
    spam = augment(pairs, schema, 1.0, ["query_in_title"], seed=1)
    assert (spam["product_title"] == pairs["product_title"] + " | " + pairs["query"]).any()
    upper = augment(pairs, schema, 1.0, ["case"], seed=1)
    assert (upper["query"] == pairs["query"].str.upper()).all()


@pytest.mark.parametrize(
    ("share", "kinds", "message"),
    [(1.5, [], "share from 0 to 1"), (0.5, ["negation"], "'negation' is not a perturbation that leaves the label")],
)
def test_augment_refuses(bazaar, share, kinds, message):
    with pytest.raises(UserError, match=message):
        augment(bazaar[0], load_labels("aliexpress6"), share, kinds, seed=0)
