import hashlib
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace

import pytest

from recipes.arguments import UserError
from recipes.data.bazaar import PRODUCTS, main, make_bazaar, report
from recipes.data.bazaar_catalogue import LOCALES, alternatives, load_catalogue
from recipes.data.bazaar_rules import (
    Ask,
    Offer,
    ask_from_json,
    decide,
    label,
    offer_from_json,
    to_json,
)
from recipes.data.text import normalise
from recipes.schemas import SPLITS, load_labels, read_pairs

TINY = "recipes/configs/tiny/bazaar.yaml"
PHONE = Offer("smartphone", brand="Norvani", family="Aro", model="Aro 12", attributes={"colour": ("navy", "blue")})
CASE = Offer("phone case", host="smartphone", brand="Kabelin", fits_brand="Norvani", fits_models=("Aro 12",))


@pytest.fixture(scope="module")
def bazaar():
    return make_bazaar(3000, seed=7)


@pytest.mark.parametrize(
    ("ask", "offer", "expected"),
    [
        (Ask(("smartphone",)), PHONE, "Strongly Relevant"),
        (Ask(("smartphone",), brand="Norvani", model="Aro 12"), PHONE, "Strongly Relevant"),
        (Ask(("smartphone",), brand="Norvani", family="Aro"), PHONE, "Strongly Relevant"),
        (Ask(("smartphone", "tablet")), PHONE, "Strongly Relevant"),
        (Ask(("smartphone",), attributes={"colour": "blue"}), PHONE, "Strongly Relevant"),  # navy is blue
        (Ask(("smartphone",), attributes={"storage": "64GB"}), PHONE, "Strongly Relevant"),  # not stated
        (Ask(("phone case",), fits_brand="Norvani", fits_model="Aro 12"), CASE, "Strongly Relevant"),
        (Ask(("phone case",), fits_brand="Lumoro"), Offer("phone case", host="smartphone"), "Strongly Relevant"),
        (Ask(("smartphone",)), CASE, "Accessory Mismatch"),
        (Ask(("smartphone",), brand="Norvani", model="Aro 12"), CASE, "Accessory Mismatch"),
        (Ask(("phone case",), hosts=("smartphone",)), PHONE, "Accessory Mismatch"),
        (Ask(("tablet",)), PHONE, "Category Mismatch"),
        (Ask(("tablet",)), CASE, "Category Mismatch"),  # an accessory of something else
        (Ask(("phone charger",), hosts=("smartphone",)), CASE, "Category Mismatch"),  # another accessory
        (Ask(("smartphone",), brand="Lumoro"), PHONE, "Brand Mismatch"),
        (Ask(("smartphone",), brand="Norvani", model="Aro 12 Pro"), PHONE, "Model Mismatch"),
        (Ask(("smartphone",), brand="Norvani", family="Fold"), PHONE, "Model Mismatch"),
        (Ask(("phone case",), fits_brand="Norvani", fits_model="Aro 11"), CASE, "Model Mismatch"),
        (Ask(("phone case",), fits_brand="Lumoro"), CASE, "Model Mismatch"),
        (Ask(("smartphone",), attributes={"colour": "red"}), PHONE, "Attribute Mismatch"),
        (Ask(("smartphone",), excluded={"colour": "blue"}), PHONE, "Attribute Mismatch"),
        (Ask(("phone case",), attributes={"count": "2"}), CASE, "Attribute Mismatch"),  # no count is one piece
    ],
)  # fmt: skip
def test_rules(ask, offer, expected):
    assert label(ask, offer) == expected


def test_a_broader_value_does_not_satisfy_a_narrower_one():
    blue = Offer("smartphone", attributes={"colour": ("blue",)})
    assert label(Ask(("smartphone",), attributes={"colour": "navy"}), blue) == "Attribute Mismatch"


def test_precedence():
    """Each step repairs what decided before; the next rule in the order then decides."""
    ask = Ask(("smartphone",), brand="Lumoro", model="Luma 9", attributes={"colour": "red"})
    luma = Offer("smartphone", brand="Lumoro", family="Luma", model="Luma 9", attributes={"colour": ("navy", "blue")})
    steps = [
        (CASE, "Accessory Mismatch"),
        (Offer("tablet", brand="Norvani", model="Slab 7"), "Category Mismatch"),
        (PHONE, "Brand Mismatch"),
        (replace(luma, model="Luma 8"), "Model Mismatch"),
        (luma, "Attribute Mismatch"),
        (replace(luma, attributes={"colour": ("burgundy", "red")}), "Strongly Relevant"),
    ]
    assert [label(ask, offer) for offer, _ in steps] == [expected for _, expected in steps]


def test_a_decision_names_what_it_compared():
    decision = decide(Ask(("smartphone",), attributes={"colour": "red"}), PHONE)
    assert (decision.aspect, decision.asked, decision.offered) == ("colour", "red", "navy")


def test_structures_survive_json():
    ask = Ask(("a", "b"), hosts=("c",), brand="d", attributes={"colour": "navy"}, excluded={"material": "wood"})
    assert ask_from_json(to_json(ask)) == ask
    assert offer_from_json(to_json(CASE)) == CASE
    assert offer_from_json(to_json(PHONE)) == PHONE


def test_labels_follow_from_the_stored_structures(bazaar):
    structures = bazaar["structures"].set_index("pair_id")
    for split in SPLITS:
        pairs = bazaar[split]
        known = structures.loc[pairs["pair_id"]]
        assert (known["split"] == split).all()
        rederived = [
            label(ask_from_json(ask), offer_from_json(offer))
            for ask, offer in zip(known["query_structure"], known["product_structure"], strict=True)
        ]
        assert rederived == list(pairs["label"])


def test_no_query_and_no_title_is_in_two_splits(bazaar):
    for column in ("query", "product_title"):
        splits = defaultdict(set)
        for split in SPLITS:
            for text in bazaar[split][column]:
                splits[normalise(text)].add(split)
        assert max(len(found) for found in splits.values()) == 1


def test_a_query_is_one_result_list_without_repeated_titles(bazaar):
    lists = [products for split in SPLITS for _, products in bazaar[split].groupby("query")]
    assert all(len(products) <= PRODUCTS[1] and products["product_title"].is_unique for products in lists)
    assert sum(len(products) >= PRODUCTS[0] for products in lists) > 0.95 * len(lists)
    assert sum((products["label"] == "Strongly Relevant").any() for products in lists) > 0.8 * len(lists)


def test_every_class_locale_and_kind_is_there(bazaar):
    counts = report(bazaar)
    assert set(counts["label"]) == set(load_labels("aliexpress6").names)
    assert min(counts["label"].values()) > 0.05 * counts["pairs"]
    assert set(counts["locale"]) == set(LOCALES)
    assert len(counts["query_kind"]) == 7
    assert counts["misspelt"] > 0
    assert sum(counts["split"].values()) == counts["pairs"] == 3000
    assert counts["split"]["train"] == pytest.approx(2400, abs=50)


def test_a_title_never_writes_what_only_the_model_implies():
    """The student has to learn that every Hush is a Bluetooth headset."""
    frames = make_bazaar(3000, seed=1, locales=["en"])
    titles = {row.pair_id: row.product_title for split in SPLITS for row in frames[split].itertuples()}
    offers = {row.pair_id: offer_from_json(row.product_structure) for row in frames["structures"].itertuples()}
    hush = [pair_id for pair_id, offer in offers.items() if offer.family == "Hush" and "connection" in offer.implied]
    assert hush
    assert not any("bluetooth" in titles[pair_id].lower() for pair_id in hush)


@pytest.mark.parametrize("size", [1, 3, 11, 250])
def test_any_size_comes_out_exactly(size):
    frames = make_bazaar(size)
    assert sum(len(frames[split]) for split in SPLITS) == len(frames["structures"]) == size


def test_locales_can_be_chosen():
    frames = make_bazaar(200, locales=["jp", "fr"])
    assert set(frames["train"]["locale"]) == {"jp", "fr"}


def test_another_seed_is_another_bazaar(bazaar):
    other = make_bazaar(3000, seed=8)
    assert not other["train"]["query"].head(50).isin(bazaar["train"]["query"]).all()


def test_same_options_give_the_same_bytes_whatever_the_hash_seed(tmp_path):
    digests = []
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        subprocess.run(
            [sys.executable, "-m", "recipes.data.bazaar", "--config", TINY, "--output", str(folder)],
            env={"PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
        )
        files = sorted(folder.glob("*.parquet"))
        assert [file.stem for file in files] == ["structures", "test", "train", "validation"]
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]
    pairs = read_pairs(folder)
    assert sum(map(len, pairs.values())) == 400


def test_a_tiny_bazaar_has_empty_splits_that_can_be_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bazaar", "--output", str(tmp_path), "--size", "1"])
    main()
    assert {split: len(frame) for split, frame in read_pairs(tmp_path).items()} == {
        "train": 1,
        "validation": 0,
        "test": 0,
    }
    assert "recipes.teacher.scripted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "0"], "size: 0 pairs"),
        (["--size", "-5"], "size: -5 pairs"),
        (["--locales", "en", "de"], "'de' is not in the catalogue; choose from en, es, ko, jp, pt, fr"),
        (["--locales", "en", "en"], "each once"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["bazaar", "--output", str(tmp_path / "out"), *options])
    with pytest.raises(UserError, match=message):
        main()
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["bazaar", "--output", str(tmp_path / "file" / "out")])
    with pytest.raises(UserError, match="not a folder to write to"):
        main()


def test_the_catalogue_is_large_enough():
    catalogue = load_catalogue()
    assert len(catalogue.main) >= 25
    assert all(catalogue.categories[key].accessories and catalogue.categories[key].brands for key in catalogue.main)


def test_the_catalogue_says_everything_in_every_locale():
    catalogue = load_catalogue()
    for category in catalogue.categories.values():
        assert set(category.names) == set(LOCALES)
        assert category.host or set(category.uses) == set(LOCALES)
    for attribute in catalogue.words["attributes"].values():
        assert set(attribute["phrase"]) == set(LOCALES)
        for spelling in attribute.get("values", {}).values():
            assert isinstance(spelling, str) or set(spelling) - {"is"} == set(LOCALES)


def test_the_catalogue_refers_only_to_what_it_has():
    catalogue = load_catalogue()
    attributes = catalogue.words["attributes"]
    for category in catalogue.categories.values():
        assert set(category.attributes) <= set(attributes)
        assert set(category.near) <= set(catalogue.main)
        for name, values in category.attributes.items():
            entries = attributes[name].get("values", {})
            if any(isinstance(entry, dict) for entry in entries.values()):
                assert set(values) <= set(entries)
        for values in category.implied.values():
            assert all(value in category.attributes[name] for name, value in values.items())
        models = {name for pairs in category.brands.values() for pair in pairs for name in pair}
        assert set(category.implied) <= models
    for shared in catalogue.words["shared"]:
        assert set(shared["categories"]) <= set(catalogue.main)


def test_a_name_means_one_category_unless_it_is_declared_shared():
    catalogue = load_catalogue()
    for locale in LOCALES:
        owners = defaultdict(set)
        for category in catalogue.categories.values():
            for name in category.names[locale] + alternatives(category.uses.get(locale, category.key)):
                owners[normalise(name)].add(category.key)
        assert [name for name, keys in owners.items() if len(keys) > 1] == []
        shared = {
            normalise(name) for entry in catalogue.words["shared"] for name in alternatives(entry["names"][locale])
        }
        assert shared & set(owners) == set()
