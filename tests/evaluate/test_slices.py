import json

import numpy as np
import pandas as pd
import pytest

from recipes.arguments import UserError
from recipes.data.bazaar import make_bazaar
from recipes.evaluate.metrics import evaluate_predictions
from recipes.evaluate.slices import SlicesArguments, query_slices, slices
from recipes.evaluate.taxonomy import KINDS, TaxonomyArguments, direction, kind, measure, taxonomy
from recipes.evaluate.transfer import TransferArguments, merge, read_map, transfer
from recipes.schemas import COMPLETIONS, LABELS_FOLDER, PAIRS, PREDICTIONS, load_labels, read, write

BINARY_FILE = str(LABELS_FOLDER / "transfer" / "binary.yaml")
ESCI, ALI, BINARY = (load_labels(name) for name in ("esci", "aliexpress6", BINARY_FILE))


def frame(rows, **columns):
    values = [dict(zip(("query", "product_title", "label"), row)) for row in rows]
    table = pd.DataFrame(values).assign(locale="us", **columns)
    return table.assign(pair_id=[f"p{n}" for n in range(len(table))])


def test_slices_by_hand():
    train = frame([("red mug", "x", "Exact"), ("red hat", "x", "Exact"), ("acme mug", "x", "Exact")])
    pairs = frame(
        [("red acme mug without lid", "a", "Exact"), ("red acme mug without lid", "b", "Exact"),
         ("mug", "c", "Exact"), ("case for 12", "d", "Exact")], brand=["Acme", None, "Zed", None],
    )  # fmt: skip
    table = query_slices(pairs, train)
    assert table["products"].tolist() == ["2-9 products", "1 product", "1 product"]
    assert table["words"].tolist() == ["5+ words", "1-2 words", "3-4 words"]
    assert table["seen"].tolist() == ["0 train queries", "1-4 train queries", "0 train queries"]  # lid, mug (2), case
    assert table["says"].tolist() == [
        ("names a brand", "leaves something out"), ("none of these",), ("names a number", "for a device"),
    ]  # fmt: skip


def test_the_bazaar_has_categories_and_kinds():
    frames = make_bazaar(120, seed=1)
    pairs = frames["train"]
    table = query_slices(pairs, frames["test"], frames["structures"])
    assert set(table["kind"]) <= {
        "plain",
        "accessory",
        "long_tail",
        "model_only",
        "ambiguous",
        "use_case",
        "brand_only",
    }
    assert table["category"].notna().all()
    assert len(table) == pairs.groupby(["locale", "query"]).ngroups


@pytest.fixture
def folder(tmp_path):
    rows = [(f"{'red ' * (n % 2)}shoe {n // 3}", "Acme red shoe", ESCI.names[n % 3]) for n in range(60)]
    pairs = frame(rows)
    for split in ("train", "test"):
        write(pairs, tmp_path / "pairs" / f"{split}.parquet", PAIRS)
    for name, right in (("good", 0.9), ("bad", 0.3)):
        rng = np.random.default_rng(0)
        said = [label if rng.random() < right else ESCI.names[3] for label in pairs["label"]]
        predictions = pairs[["pair_id", "query", "locale", "label"]].assign(
            predicted_label=said, probabilities=[np.eye(4)[ESCI.label2id[label]] for label in said]
        )
        write(predictions, tmp_path / name / "predictions.parquet", PREDICTIONS)
    return tmp_path


def options(folder, **changes):
    values = {"runs": [f"good={folder}/good", f"bad={folder}/bad"], "baseline": "bad", "draws": 100,
              "pairs": str(folder / "pairs"), "output": str(folder / "out"), **changes}  # fmt: skip
    return SlicesArguments(**values)


def test_slices_add_up(folder):
    report = slices(options(folder, fewest=2))
    assert json.loads(json.dumps(report)) == json.loads((folder / "out" / "slices.json").read_text())
    everything = report["slices"]["all"]["all"]
    assert everything["pairs"] == 60
    for way in ("words", "products"):
        parts = report["slices"].get(way, {"one": everything}).values()
        assert sum(part["pairs"] for part in parts) == 60
        for system in ("good", "bad"):
            accuracy = [part["pairs"] * part["systems"][system]["metrics"]["accuracy"]["mean"] for part in parts]
            assert sum(accuracy) == pytest.approx(60 * everything["systems"][system]["metrics"]["accuracy"]["mean"])
    assert everything["differences"]["good"]["accuracy"]["difference"] > 0
    assert "words: 1-2 words" in (folder / "out" / "table.md").read_text()
    alone = slices(options(folder, runs=[f"bad={folder}/bad"], fewest=1000))
    assert list(alone["slices"]) == ["all"]
    assert alone["left_out"]["words"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"baseline": "x"}, "expected one of good, bad"), ({"draws": 5}, "at least 100"),
     ({"split": "validation"}, "no such file")],
)  # fmt: skip
def test_bad_slices(folder, changes, message):
    with pytest.raises(UserError, match=message):
        slices(options(folder, **changes))


def test_other_pairs_cannot_be_sliced(folder):
    write(read(folder / "pairs" / "test.parquet", PAIRS).iloc[1:], folder / "pairs" / "test.parquet", PAIRS)
    with pytest.raises(UserError, match="has no pair 'p0'"):
        slices(options(folder))


@pytest.mark.parametrize(("one", "other"), [(ALI, ESCI), (ALI, BINARY), (ESCI, BINARY), (ESCI, ESCI)])
def test_maps_are_complete_and_keep_relevance(one, other):
    mapping = read_map(one, other, [])
    assert list(mapping) == one.names
    assert set(mapping.values()) <= set(other.names)
    assert {name for name, target in mapping.items() if target in other.relevant} == set(one.relevant)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from: esci\nto: binary\nmap: {E: Relevant, S: Not relevant, C: Not relevant}", "'Irrelevant' of 'esci'"),
        ("from: esci\nto: binary\nmap: {E: Relevant, S: Not, C: Not relevant, I: Not relevant}", "is not in 'binary'"),
        ("from: esci\nto: binary\nmap: {E: Relevant, S: Relevant, C: Relevant, I: Relevant, X: E}", "'X' is not"),
        ("from: esci\nmap: {}", "expected the keys"),
    ],
)  # fmt: skip
def test_bad_maps(tmp_path, text, message):
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_map(ESCI, BINARY, [str(tmp_path / "map.yaml")])
    with pytest.raises(UserError, match=r"esci_to_aliexpress6\.yaml: no such file"):
        read_map(ESCI, ALI, [])


def test_a_student_is_read_in_another_schema(folder, build_checkpoint):
    """Two shoes on one model: six classes read as four, probabilities added up as the map says."""
    out = folder / "transferred"
    metrics = transfer(
        TransferArguments(model=str(build_checkpoint(ALI.names)), model_labels="aliexpress6", labels="esci", to="esci",
                          pairs=str(folder / "pairs"), output=str(out), limit=12, max_length=32)
    )  # fmt: skip
    predictions = read(out / "predictions.parquet", PREDICTIONS)
    assert len(predictions) == 12
    assert metrics["labels"] == ESCI.names
    probabilities = np.stack(predictions["probabilities"])
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert predictions["predicted_label"].tolist() == [ESCI.names[row.argmax()] for row in probabilities]
    assert evaluate_predictions(predictions, ESCI)["overall"] == metrics["overall"]


def test_probabilities_add_up():
    mapping = read_map(ALI, BINARY, [])
    merged = merge(np.array([[0.3, 0.1, 0.1, 0.2, 0.2, 0.1]], dtype=np.float32), mapping, BINARY)
    assert np.allclose(merged, [[0.3, 0.7]])
    four = merge(np.array([[0.3, 0.1, 0.15, 0.2, 0.2, 0.05]], dtype=np.float32), read_map(ALI, ESCI, []), ESCI)
    assert np.allclose(four, [[0.3, 0.5, 0.05, 0.15]])  # brand, model and attribute stand in; category is irrelevant


def test_directions_and_kinds():
    assert direction("Brand Mismatch", "Model Mismatch", ALI) == "sideways"  # both have a gain of 0.2
    assert kind("Exact", "Substitute", "Without a lid, the brand differs.") == "negation"  # the first that applies
    assert kind("Exact", "Substitute", "It seems a good match.") == "other"
    assert kind("Exact", "Substitute", "The colour is wrong.") == "colour or material"


def test_a_taxonomy_adds_up(folder):
    texts = ["Fits.", "The brand differs.", "12 oz are missing."]
    completions = pd.DataFrame(
        [(f"p{n}", perspective, 0, texts[n % 3], ESCI.names[(n + shift) % 4])
         for n in range(60) for shift, perspective in enumerate(("user_intent", "business_rule"))],
        columns=["pair_id", "perspective", "sample_index", "rationale", "predicted_label"],
    )  # fmt: skip
    write(completions, folder / "completions.parquet", COMPLETIONS)
    arguments = {"pairs": str(folder / "pairs"), "output": str(folder / "t"), "draws": 100,
                 "completions": [str(folder / "completions.parquet")]}  # fmt: skip
    report = taxonomy(TaxonomyArguments(**arguments))
    for values in report["perspectives"].values():
        for names in (("over-lenient", "over-strict", "sideways"), KINDS):
            assert sum(values[name]["value"] for name in names) == pytest.approx(values["wrong"]["value"])
    errors = pd.read_parquet(folder / "t" / "errors.parquet")
    assert (errors["label"] != errors["predicted_label"]).all()
    assert len(errors) == round(60 * sum(v["wrong"]["value"] for v in report["perspectives"].values()))
    right = completions.assign(predicted_label=[ESCI.names[n % 3] for n in range(60) for _ in range(2)])
    write(right, folder / "completions.parquet", COMPLETIONS)
    with pytest.raises(UserError, match="none of them wrong"):
        taxonomy(TaxonomyArguments(**arguments))


def test_nothing_wrong_is_zero():
    rows = pd.DataFrame({"perspective": "a", "query": ["x", "y"], "locale": "us", "direction": "", "kind": ""})
    assert measure(rows, 100, 0)["perspectives"]["a"]["wrong"]["value"] == 0
