"""The published dataset: from a tiny bazaar to what `load_dataset` gives a stranger, and everything that is refused."""

import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from markdown_it import MarkdownIt

from hub_cards.facts import CardError
from recipes.arguments import UserError
from recipes.publish.dataset_statistics import agreement
from recipes.publish.package import PackageArguments, collect, package
from recipes.schemas import PERSPECTIVES, RATIONALES, SPLITS, load_labels, read, read_pairs
from tests.packaging import make_rationales

ROOT = Path(__file__).parents[2]
FACTS = ROOT / "recipes" / "configs" / "publish" / "facts_bazaar_dataset.yaml"
CONFIGURATIONS = ("pairs", *PERSPECTIVES, "embeddings", "structures")

# A process that knows the folder only: every configuration and split, whole and streaming.
STRANGER = """
import json, sys
from datasets import get_dataset_config_names, load_dataset

found = {}
for name in get_dataset_config_names("acme/bazaar"):
    whole = load_dataset("acme/bazaar", name)
    streamed = load_dataset("acme/bazaar", name, streaming=True)
    assert list(streamed) == list(whole), name
    for split in whole:
        assert streamed[split].features == whole[split].features
        assert list(streamed[split]) == whole[split].to_list(), (name, split)
    found[name] = {
        "features": {column: repr(feature) for column, feature in whole["train"].features.items()},
        "rows": {split: rows.to_list() for split, rows in whole.items()},
    }
assert load_dataset("acme/bazaar", split="test").to_list() == found["pairs"]["rows"]["test"]
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_rationales(tmp_path_factory.mktemp("made"))


def arguments_for(folder, **options):
    given = {
        "kind": "dataset",
        "repo_id": "acme/bazaar",
        "output": str(folder / "acme" / "bazaar"),
        "source": str(folder / "bazaar"),
        "completions": [str(folder / "completions.parquet")],
        "rationales": [str(folder / "embedded.parquet")],
        "labels": "aliexpress6",
        "facts": str(FACTS),
    }
    return PackageArguments(**{**given, **options})


@pytest.fixture(scope="module")
def published(made):
    package(arguments_for(made))
    return made / "acme" / "bazaar"


def stranger(code, folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**environment, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_stranger_loads_what_the_stages_made(made, published):
    stranger(STRANGER, made, str(made / "found.json"))
    found = json.loads((made / "found.json").read_text())
    assert set(found) == set(CONFIGURATIONS)
    assert all(set(told["rows"]) == set(SPLITS) for told in found.values())

    pairs = read_pairs(made / "bazaar")
    rationales = read(made / "embedded.parquet", RATIONALES)
    structures = pd.read_parquet(made / "bazaar" / "structures.parquet").set_index("pair_id")
    for split in SPLITS:
        expected = pairs[split].astype(object).where(pairs[split].notna(), None).to_dict("records")
        assert found["pairs"]["rows"][split] == expected
        ids = set(pairs[split]["pair_id"])
        in_split = rationales[rationales["pair_id"].isin(ids)]
        for name in PERSPECTIVES:
            rows = pd.DataFrame(found[name]["rows"][split])
            source = in_split[in_split["perspective"] == name].reset_index(drop=True)
            columns = [column for column in rows if column != "rationale_index"]
            pd.testing.assert_frame_equal(rows[columns], source[columns], check_dtype=False)
            assert set(rows["rationale_index"]) == {0, 1}
        embedded = found["embeddings"]["rows"][split]
        assert [row["pair_id"] for row in embedded] == list(in_split["pair_id"])
        vectors = np.array([row["cot_embedding"] for row in embedded], dtype=np.float32)
        assert (vectors == np.stack(in_split["cot_embedding"])).all()
        for row in found["structures"]["rows"][split]:
            assert row["product_structure"] == structures.loc[row["pair_id"], "product_structure"]
        assert [row["pair_id"] for row in found["structures"]["rows"][split]] == list(pairs[split]["pair_id"])

    features = {name: told["features"] for name, told in found.items()}
    assert features["embeddings"]["cot_embedding"] == "List(Value('float32'), length=16)"
    assert features["user_intent"].pop("rationale_index") == "Value('int32')"
    assert set(features["user_intent"].values()) | set(features["pairs"].values()) == {"Value('string')"}


def test_the_cards_snippet_runs(made, published):
    snippets = re.findall(r"```python\n(.*?)```", (published / "README.md").read_text(), flags=re.DOTALL)
    assert len(snippets) == 1
    printed = stranger(snippets[0], made)
    train = set(read_pairs(made / "bazaar", ["train"])["train"]["pair_id"])
    rationales = read(made / "embedded.parquet", RATIONALES)
    chosen = rationales[(rationales["perspective"] == "user_intent") & rationales["pair_id"].isin(train)]
    assert f"({(chosen['predicted_label'] == chosen['label']).sum()}, " in printed.splitlines()[-1]


def test_the_folder_is_what_its_card_declares(made, published):
    card = (published / "README.md").read_text()
    declared = yaml.safe_load(card.split("---\n")[1])
    assert declared["license"] == "apache-2.0"
    assert declared["language"] == ["en", "ja"]
    assert declared["annotations_creators"] == ["machine-generated"]
    assert "synthetic" in declared["tags"]
    assert declared["size_categories"] in ("n<1K", ["n<1K"])
    assert [part["config_name"] for part in declared["configs"] if part.get("default")] == ["pairs"]
    for part in declared["configs"]:
        for split in part["data_files"]:
            assert (published / split["path"]).is_file()
    for told in declared["dataset_info"]:
        sizes = [(published / told["config_name"] / f"{split}.parquet").stat().st_size for split in SPLITS]
        assert told["download_size"] == sum(sizes)
        rows = {part["name"]: part["num_examples"] for part in told["splits"]}
        files = {split: published / told["config_name"] / f"{split}.parquet" for split in SPLITS}
        assert rows == {split: pq.read_metadata(path).num_rows for split, path in files.items()}
        assert [part["name"] for part in told["features"]] == pq.read_schema(files["train"]).names
    assert "**This dataset is synthetic.**" in card
    for fact in ("--seed 3", "--keep all", "scripted-teacher", "2601.21611", "@misc{lrkd_bazaar"):
        assert fact in card
    for image in re.findall(r"!\[.+?\]\((.+?)\)", card):
        assert (published / image).read_bytes().startswith(b"\x89PNG")
        assert (published / image).stat().st_size < 100_000
    assert str(made) not in card
    measured = json.loads((published / "statistics.json").read_text())
    assert measured["rationales"] == len(read(made / "embedded.parquet", RATIONALES))


def test_the_same_inputs_give_the_same_bytes(made, published):
    again = collect(arguments_for(made))
    on_disk = {path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()}
    assert set(again) == on_disk
    assert [name for name, content in again.items() if (published / name).read_bytes() != content] == []


def test_markdown_and_html_of_a_title_are_text(made, tmp_path):
    evil = (
        "<script>alert(1)</script><img src=x onerror=alert(1)> [click](javascript:alert(1)) ![i](http://e.example/i)"
        " | `code` **bold**\n\n# Heading\n---\n{{ 7 * 7 }} </table>"
    )
    copy = copied(made, tmp_path)

    def poison(frame):
        frame["product_title"] = [f"{evil} {pair}" for pair in frame["pair_id"]]
        frame["query"] = [f"{evil} {query}" for query in frame["query"]]
        return frame

    for name in [*(f"bazaar/{split}.parquet" for split in SPLITS), "embedded.parquet"]:
        change(copy / name, poison)
    card = collect(arguments_for(copy))["README.md"].decode()
    plain = collect(arguments_for(made))["README.md"].decode()
    render = MarkdownIt("commonmark").enable("table").render
    before, after = (render(text.split("---\n", 2)[2]) for text in (plain, card))

    def tags(text):
        return re.findall(r"</?([a-zA-Z][\w-]*)", text)

    assert tags(after) == tags(before)
    assert len(re.findall(r"<a ", after)) == len(re.findall(r"<a ", before))
    shown = html.unescape(after)
    assert " ".join(evil.split()) in shown


def copied(made, folder):
    for name in ("bazaar", "completions.parquet", "completions.parquet.report.json", "embedded.parquet",
                 "embedded.parquet.report.json"):  # fmt: skip
        (shutil.copytree if (made / name).is_dir() else shutil.copyfile)(made / name, folder / name)
    return folder


def change(path, edit):
    frame = edit(pd.read_parquet(path))
    frame.to_parquet(path, index=False)


def put(column, value, row=2):
    """Set one cell."""

    def edit(frame):
        frame[column] = frame[column].astype(object)
        frame.at[row, column] = value
        return frame

    return edit


def first_of(frame_column):
    return lambda made: read_pairs(made / "bazaar", ["test"])["test"][frame_column].iloc[0]


BAD = {
    "a query in two splits": (
        "bazaar/train.parquet",
        lambda made: put("query", f" {first_of('query')(made).upper()}! "),
        r"train\.parquet: row 2, column 'query': .* is in test too \(1 such rows\)",
    ),
    "a title in two splits": (
        "bazaar/train.parquet",
        lambda made: put("product_title", first_of("product_title")(made)),
        r"train\.parquet: row 2, column 'product_title': .* is in test too",
    ),
    "a pair in two splits": (
        "bazaar/train.parquet",
        lambda made: put("pair_id", first_of("pair_id")(made)),
        r"train\.parquet: row 2, column 'pair_id': .* is in test too",
    ),
    "a blank title": (
        "bazaar/validation.parquet",
        lambda made: put("product_title", "  "),
        r"validation\.parquet: row 2, column 'product_title': is empty or blank",
    ),
    "a label outside the schema": (
        "bazaar/test.parquet",
        lambda made: put("label", "Exact"),
        r"test\.parquet: row 2, column 'label': label 'Exact' is not in the schema 'aliexpress6'",
    ),
    "an empty split": (
        "bazaar/validation.parquet",
        lambda made: lambda frame: frame.iloc[:0],
        r"validation\.parquet: the split is empty",
    ),
    "a rationale of no pair": (
        "embedded.parquet",
        lambda made: put("pair_id", "nobody"),
        r"embedded\.parquet: row 2, column 'pair_id': 'nobody' is not among the pairs",
    ),
    "a rationale that says another label": (
        "embedded.parquet",
        lambda made: (
            lambda frame: put("label", "Brand Mismatch", int((frame["label"] != "Brand Mismatch").argmax()))(frame)
        ),
        r"embedded\.parquet: row \d+, column 'label': 'Brand Mismatch' is '.*' in the pairs",
    ),
    "a rationale of another query": (
        "embedded.parquet",
        lambda made: put("query", "something else"),
        r"embedded\.parquet: row 2, column 'query': 'something else' is '.*' in the pairs",
    ),
    "a verdict outside the schema": (
        "embedded.parquet",
        lambda made: put("predicted_label", "Perhaps"),
        r"embedded\.parquet: row 2, column 'predicted_label': label 'Perhaps'",
    ),
    "an unknown perspective": (
        "embedded.parquet",
        lambda made: put("perspective", "concatenation"),
        r"embedded\.parquet: row 2, column 'perspective': 'concatenation' is not one of",
    ),
    "NaN in an embedding": (
        "embedded.parquet",
        lambda made: put("cot_embedding", np.full(16, np.nan, dtype=np.float32)),
        r"embedded\.parquet: row 2, column 'cot_embedding': has NaN",
    ),
    "an embedding of another size": (
        "embedded.parquet",
        lambda made: put("cot_embedding", np.zeros(4, dtype=np.float32)),
        r"embedded\.parquet: row 2, column 'cot_embedding': has 4 numbers; expected 16",
    ),
    "no embeddings": (
        "embedded.parquet",
        lambda made: lambda frame: frame.drop(columns="cot_embedding"),
        r"embedded\.parquet: column 'cot_embedding' is missing.*recipes\.rationales\.embed",
    ),
    "two encoders": (
        "embedded.parquet",
        lambda made: put("encoder_revision", "another"),
        r"embeddings of several encoders",
    ),
    "no rationales of a split": (
        "embedded.parquet",
        lambda made: (
            lambda frame: frame[~frame["pair_id"].isin(read_pairs(made / "bazaar", ["test"])["test"]["pair_id"])]
        ),
        r"no user_intent rationale of a test pair.*--splits train validation test",
    ),
    "completions without a model": (
        "completions.parquet",
        lambda made: lambda frame: frame.drop(columns="model"),
        r"completions\.parquet: column 'model' is missing",
    ),
    "completions of another run": (
        "completions.parquet",
        lambda made: lambda frame: frame.assign(predicted_label=None),
        r"a rationale predicts '.*', which no completion of",
    ),
    "structures of other pairs": (
        "bazaar/structures.parquet",
        lambda made: put("split", "elsewhere"),
        r"structures\.parquet: row 2: pair_id '.*' is not in elsewhere of the pairs",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_rows_are_refused_before_anything_is_written(made, tmp_path, fault):
    name, edit, message = BAD[fault]
    copy = copied(made, tmp_path)
    change(copy / name, edit(made))
    with pytest.raises(UserError, match=message):
        package(arguments_for(copy))
    assert not (copy / "acme").exists()


def test_a_record_that_is_missing_is_named(made, tmp_path):
    copy = copied(made, tmp_path)
    (copy / "completions.parquet.report.json").unlink()
    with pytest.raises(UserError, match=r"completions\.parquet\.report\.json: the command .* is not recorded.*`steps`"):
        collect(arguments_for(copy))


@pytest.mark.parametrize("option", ["source", "completions", "rationales", "labels", "facts"])
def test_an_option_that_is_missing_is_named(made, option):
    with pytest.raises(UserError, match=f"--{option}: a dataset needs it"):
        collect(arguments_for(made, **{option: [] if option in ("completions", "rationales") else None}))


@pytest.mark.parametrize(
    ("fact", "value", "message"),
    [
        ("license", None, "lacks license"),
        ("citation", "  ", "'citation' is empty"),
        ("limits", [], "'limits' is empty"),
        ("languages", {"en": "en"}, "'languages' lacks the locale 'jp'"),
        ("languages", {"en": "en", "jp": "jp"}, "'languages', jp: 'jp' is no ISO 639 code"),
    ],
)
def test_a_fact_that_is_missing_is_named(made, tmp_path, fact, value, message):
    facts = {**yaml.safe_load(FACTS.read_text()), fact: value}
    if value is None:
        del facts[fact]
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump(facts))
    with pytest.raises((UserError, CardError), match=message):
        collect(arguments_for(made, facts=str(tmp_path / "facts.yaml")))


def test_pairs_and_rationales_from_elsewhere(tmp_path):
    """Real judgements, another teacher, no reports: the person states what no run recorded."""
    splits = {"train": "abc", "validation": "d", "test": "e"}
    (tmp_path / "bazaar").mkdir()
    rows = []
    for split, letters in splits.items():
        pairs = [
            {"pair_id": x, "query": f"query {x}", "product_title": f"title {x}", "locale": "us", "label": "E"}
            for x in letters
        ]
        pd.DataFrame(pairs).to_parquet(tmp_path / "bazaar" / f"{split}.parquet")
        rows += [{**pair, "perspective": name} for pair in pairs for name in PERSPECTIVES]
    told = pd.DataFrame(rows).assign(rationale="because", predicted_label="Exact")
    told[["pair_id", "perspective", "rationale", "predicted_label"]].assign(
        sample_index=0, model="somebody"
    ).to_parquet(tmp_path / "completions.parquet")
    told["cot_embedding"] = [np.ones(3, dtype=np.float32)] * len(told)
    told.assign(encoder="e", encoder_revision="r").to_parquet(tmp_path / "embedded.parquet")
    facts = yaml.safe_load(FACTS.read_text())
    facts |= {"synthetic": False, "languages": {"us": "en"}, "steps": ["cp here there"], "teacher": "Asked in person."}
    (tmp_path / "facts.yaml").write_text(yaml.safe_dump(facts))
    files = collect(arguments_for(tmp_path, labels="esci", facts=str(tmp_path / "facts.yaml")))
    card = files["README.md"].decode()
    assert "synthetic.**" not in card
    assert "cp here there" in card
    assert "Asked in person." in card
    assert not any(name.startswith("structures") for name in files)
    assert pd.read_parquet(io.BytesIO(files["pairs/test.parquet"]))["label"].tolist() == ["Exact"]


def test_agreement_by_hand():
    """Four pairs of two classes; gold E E S S. Chance agreement of the first two perspectives is 0.5."""
    verdicts = {"user_intent": "EESS", "structured_analysis": "ESSE", "business_rule": ["S", "S", "S", None]}
    names = {"E": "Exact", "S": "Substitute", None: None}
    completions = pd.DataFrame(
        [
            {"pair_id": f"p{pair}", "perspective": name, "label": names["EESS"[pair]], "predicted_label": names[value]}
            for name, values in verdicts.items()
            for pair, value in enumerate(values)
        ]
    )
    later = completions.assign(predicted_label="Irrelevant")  # second samples, which do not count
    measured = agreement(pd.concat([completions, later]), load_labels("esci"))
    assert measured["pairs"] == 4
    assert measured["right"] == {"all": 0.25, "two": 0.25, "one": 0.5, "none": 0.0}
    assert measured["right_by_label"]["Exact"] == {"all": 0.0, "two": 0.5, "one": 0.5, "none": 0.0}
    assert measured["accuracy"] == {"user_intent": 1.0, "structured_analysis": 0.5, "business_rule": 0.25}
    first = measured["kappa"]["user_intent and structured_analysis"]
    assert first["overall"] == 0.0  # agree on 2 of 4, as chance does
    assert first["Irrelevant"] is None  # neither ever says it
