"""Products from a store score as they do beside their query; a store that cannot be trusted is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification
from recipes.arguments import UserError
from recipes.serve import item_cached
from recipes.serve.encode_products import EncodeProductsArguments, encode_products, product_tokens
from recipes.serve.item_cached import ItemCachedScorer
from recipes.serve.product_store import ProductStore, load_student, shard_path
from recipes.student.saving import save_tokenizer
from tests.tiny import tiny_config, tiny_tokenizer

ROOT = Path(__file__).parents[2]
LABELS = {0: "Exact", 1: "Substitute", 2: "Irrelevant"}
TITLES = [f"{word} number {n} " + "very " * (n % 5) + "long" for n in range(8) for word in ("shoe", "lamp", "hat")]
QUERY = "red shoe"


def save_student(folder, family="bert", seed=0, separate_layers=2, labels=LABELS, match_marks=False, **options):
    torch.manual_seed(seed)
    config = LRKDConfig(
        encoder_config=tiny_config(family, num_hidden_layers=3, initializer_range=0.3, eos_token_id=3),
        extractor_type="gat",
        pooling="mean",
        separate_layers=separate_layers,
        match_marks=match_marks,
        **options,
        id2label=labels,
    )
    model = LRKDForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    if match_marks:
        torch.nn.init.normal_(model.match_marks.weight)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    if family != "bert":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    save_tokenizer(tokenizer, folder)
    return str(folder)


def save_products(path, titles=TITLES):
    pd.DataFrame({"product_title": titles, "product_id": [f"B{n}" for n in range(len(titles))]}).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A student, its products, and a float32 store of them in three shards."""
    folder = tmp_path_factory.mktemp("item_cached")
    options = {"model": save_student(folder / "student"), "products": [save_products(folder / "products.parquet")]}
    options |= {"output": str(folder / "store"), "dtype": "float32", "shard_products": 10}
    encode_products(EncodeProductsArguments(**options), progress=False)
    return options


@pytest.fixture
def options(made, tmp_path):
    """The same, with a store of its own that a test may spoil."""
    shutil.copytree(made["output"], tmp_path / "store")
    return {**made, "output": str(tmp_path / "store")}


def uncached(model, tokenizer, titles, query=QUERY):
    batch = tokenizer([query] * len(titles), titles, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model(**batch).logits.softmax(dim=1).numpy()


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("key", ["product_title", "product_id"])
def test_stored_products_score_as_the_plain_forward_does(family, key, tmp_path, monkeypatch):
    monkeypatch.setattr(item_cached, "BATCH_TOKENS", 150)  # several batches
    model, products = save_student(tmp_path / "s", family), save_products(tmp_path / "products.parquet")
    arguments = EncodeProductsArguments(
        model=model, products=[products], output=str(tmp_path / "store"), key=key, dtype="float32", shard_products=10
    )
    assert encode_products(arguments, progress=False)["shards"] == 3
    scorer = ItemCachedScorer(model, tmp_path / "store")
    order = np.random.default_rng(0).permutation(len(TITLES))
    names = TITLES if key == "product_title" else [f"B{n}" for n in range(len(TITLES))]
    found = scorer.score(QUERY, [names[row] for row in order])
    expected = uncached(scorer.model, scorer.tokenizer, [TITLES[row] for row in order])
    assert scorer.labels == list(LABELS.values())
    assert np.ptp(expected, axis=0).max() > 0.02
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("float16", 1e-3), ("int8", 0.05)])
@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_marks_on_shared_words_are_made_from_the_store(family, dtype, near, backend, tmp_path, monkeypatch):
    if backend == "openvino":
        pytest.importorskip("openvino")
    monkeypatch.setattr(item_cached, "BATCH_TOKENS", 150)
    query = "red shoe number 3"
    model = save_student(tmp_path / "s", family, match_marks=True)
    products = save_products(tmp_path / "products.parquet")
    options = {"model": model, "products": [products], "output": str(tmp_path / "store"), "dtype": dtype}
    encode_products(EncodeProductsArguments(**options, shard_products=10), progress=False)
    scorer = ItemCachedScorer(model, tmp_path / "store", backend, threads=2)
    found = scorer.score(query, TITLES)
    np.testing.assert_allclose(found, uncached(scorer.model, scorer.tokenizer, TITLES, query), atol=near)
    with torch.no_grad():
        scorer.model.match_marks.weight.zero_()
    assert np.abs(scorer.score(query, TITLES) - found).max() > 0.05


@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_products_that_are_not_updated_score_as_the_plain_forward_does(family, marks, backend, tmp_path, monkeypatch):
    if backend == "openvino":
        pytest.importorskip("openvino")
    monkeypatch.setattr(item_cached, "BATCH_TOKENS", 150)
    model = save_student(tmp_path / "s", family, match_marks=marks, query_layers=1)
    products = save_products(tmp_path / "products.parquet")
    options = {"model": model, "products": [products], "output": str(tmp_path / "store"), "dtype": "float32"}
    encode_products(EncodeProductsArguments(**options), progress=False)
    scorer = ItemCachedScorer(model, tmp_path / "store", backend, threads=2)
    for query in ("red shoe number 3", "lamp"):  # of two lengths
        expected = uncached(scorer.model, scorer.tokenizer, TITLES, query)
        np.testing.assert_allclose(scorer.score(query, TITLES), expected, atol=1e-5)
    scorer.model.config.query_layers = 0
    assert np.abs(uncached(scorer.model, scorer.tokenizer, TITLES, query) - expected).max() > 1e-3


def test_a_damaged_token_id_is_found(tmp_path):
    model = save_student(tmp_path / "s", match_marks=True)
    options = {"model": model, "products": [save_products(tmp_path / "p.parquet")], "output": str(tmp_path / "store")}
    encode_products(EncodeProductsArguments(**options), progress=False)
    store = ProductStore(tmp_path / "store", load_student(model)[2])
    store.shards[0]["tokens"] = store.shards[0]["tokens"].clone().fill_(7)
    rows = store.find(TITLES[:1])
    with pytest.raises(UserError, match="does not match its checksum"):
        store.read_into(rows, torch.empty(1, 20, 16), torch.empty(1, 20, dtype=torch.long))


@pytest.mark.parametrize(("dtype", "near"), [("float16", 1e-3), ("int8", 0.05)])
def test_smaller_stores_are_smaller_and_near(made, tmp_path, dtype, near):
    arguments = EncodeProductsArguments(**{**made, "output": str(tmp_path / "store"), "dtype": dtype})
    manifest = encode_products(arguments, progress=False)
    whole = json.loads(Path(made["output"], "store.json").read_text())
    assert manifest["bytes"] < whole["bytes"]
    exact = ItemCachedScorer(made["model"], made["output"]).score(QUERY, TITLES)
    stored = ItemCachedScorer(made["model"], tmp_path / "store").score(QUERY, TITLES)
    assert 0 < np.abs(stored - exact).max() < near


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_openvino_and_bfloat16(made, precision, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(item_cached, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    exact = ItemCachedScorer(made["model"], made["output"]).score(QUERY, TITLES)
    near = 1e-5 if precision == "float32" else 0.05
    for backend in ("torch", "openvino"):
        scorer = ItemCachedScorer(made["model"], made["output"], backend, precision, threads=2)
        np.testing.assert_allclose(scorer.score(QUERY, TITLES), exact, atol=near)
        np.testing.assert_allclose(scorer.score("hat", TITLES[:5]), scorer.score("hat", TITLES)[:5], atol=near)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_bfloat16_that_the_cpu_does_not_multiply_is_float32_and_says_so(backend, made, monkeypatch):
    monkeypatch.setattr(item_cached, "cpu_flags", lambda: frozenset({"avx2"}))
    with pytest.warns(UserWarning, match="no instructions for bfloat16: .* in float32 instead"):
        scorer = ItemCachedScorer(made["model"], made["output"], backend, "bfloat16")
    assert scorer.precision == "float32"
    exact = ItemCachedScorer(made["model"], made["output"]).score(QUERY, TITLES)
    np.testing.assert_allclose(scorer.score(QUERY, TITLES), exact, atol=1e-5)


def test_nothing_to_score(made):
    assert ItemCachedScorer(made["model"], made["output"]).score(QUERY, []).shape == (0, 3)


def test_the_temperature_is_the_students(made, tmp_path):
    shutil.copytree(made["model"], tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    (tmp_path / "student" / "config.json").write_text(json.dumps({**config, "temperature": 2.0}))
    calm = ItemCachedScorer(str(tmp_path / "student"), made["output"]).score(QUERY, TITLES)
    plain = ItemCachedScorer(made["model"], made["output"]).score(QUERY, TITLES)
    expected = np.sqrt(plain)
    np.testing.assert_allclose(calm, expected / expected.sum(axis=1, keepdims=True), atol=1e-5)


def test_products_that_come_twice_are_stored_once_and_long_titles_are_cut(made, tmp_path):
    long = "long " * 100
    products = save_products(tmp_path / "p.parquet", [*TITLES, *TITLES, long])
    arguments = EncodeProductsArguments(
        model=made["model"], products=[products, made["products"][0]], output=str(tmp_path / "store"), dtype="float32"
    )
    assert encode_products(arguments, progress=False)["products"] == len(TITLES) + 1
    scorer = ItemCachedScorer(made["model"], tmp_path / "store")
    assert scorer.store.lengths.max() == 96  # three quarters of the tokenizer's 128
    tokens = scorer.tokenizer(QUERY, long, truncation="only_second", max_length=96 + 9, return_tensors="pt")
    assert tokens["input_ids"].shape[1] == 105  # [CLS], seven letters, [SEP], and the product's 96
    with torch.inference_mode():
        expected = scorer.model(**tokens).logits.softmax(dim=1).numpy()
    np.testing.assert_allclose(scorer.score(QUERY, [long]), expected, atol=1e-5)


# Interruptions


def command(options):
    parts = [
        [f"--{name}", *([str(value)] if not isinstance(value, list) else value)] for name, value in options.items()
    ]
    return [sys.executable, "-m", "recipes.serve.encode_products", *(part for flags in parts for part in flags)]


def test_killed_and_started_again_it_makes_the_same_store(made, tmp_path):
    options = {**made, "products": [save_products(tmp_path / "p.parquet", [f"lamp {n}" for n in range(400)])]}
    options |= {"output": str(tmp_path / "store"), "shard_products": 4}
    process = subprocess.Popen(command(options), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not shard_path(tmp_path / "store", 2).is_file():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("shard-*")}
    assert 3 <= len(done) < 100
    with pytest.raises(UserError, match=r"store: not finished\. Run recipes\.serve\.encode_products again"):
        ProductStore(tmp_path / "store")
    encode_products(EncodeProductsArguments(**options), progress=False)
    for name, moment in done.items():
        assert (tmp_path / "store" / name).stat().st_mtime_ns == moment, "made again"
    encode_products(EncodeProductsArguments(**{**options, "output": str(tmp_path / "whole")}), progress=False)
    for path in (tmp_path / "whole").glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "store" / path.name).read_bytes()
    assert len(ProductStore(tmp_path / "store")) == 400


def test_a_finished_store_is_left_alone_and_another_is_refused(options, tmp_path, capsys):
    assert encode_products(EncodeProductsArguments(**options))["complete"]
    assert "already holds these products" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a store with dtype = 'float32', not 'int8'"):
        encode_products(EncodeProductsArguments(**{**options, "dtype": "int8"}))
    changed = {**options, "products": [save_products(tmp_path / "p.parquet", [*TITLES[:-1], "another"])]}
    with pytest.raises(UserError, match="holds a store with inputs_sha256"):
        encode_products(EncodeProductsArguments(**changed))
    again = encode_products(EncodeProductsArguments(**changed, overwrite=True), progress=False)
    assert again["complete"]
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"thesis"):
            encode_products(EncodeProductsArguments(**{**options, "output": str(precious)}, overwrite=overwrite))
    assert (precious / "thesis.tex").is_file()


# Stores and models that do not belong together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {0: "Yes", 1: "No"}}, r"made by another model: labels is \['Exact', 'Substitute', 'Irrelevant'\]"),
        ({"seed": 1}, "made by another model: weights_sha256 is"),
        ({"separate_layers": 1}, "made by another model: separate_layers is 2 there and 1 here"),
    ],
)
def test_a_store_of_another_model_is_refused(options, tmp_path, changes, message):
    other = save_student(tmp_path / "other", **changes)
    with pytest.raises(UserError, match=message):
        ItemCachedScorer(other, options["output"])
    with pytest.raises(UserError, match=message):  # nor is it gone on with
        encode_products(EncodeProductsArguments(**{**options, "model": other}))


def test_another_tokenizer_is_refused(options, tmp_path):
    shutil.copytree(options["model"], tmp_path / "student")
    path = tmp_path / "student" / "tokenizer.json"
    path.write_text(path.read_text().replace('"lowercase": true', '"lowercase": false'))
    with pytest.raises(UserError, match="made by another model: tokenizer_sha256"):
        ItemCachedScorer(str(tmp_path / "student"), options["output"])


def test_a_student_that_reads_all_together_has_no_store(options, tmp_path):
    with pytest.raises(UserError, match=r"its layers all read query and product together.*--separate_layers above 0"):
        load_student(save_student(tmp_path / "plain", separate_layers=0))
    with pytest.raises(UserError, match=r"nowhere: not a loadable student"):
        load_student(str(tmp_path / "nowhere"))


# Damage


def flip(path, tensor, byte=3):
    """Change one byte of one tensor of a shard."""
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + header])[tensor]["data_offsets"]
    content[8 + header + start + byte] ^= 0x10
    path.write_bytes(content)


def test_a_damaged_page_is_one_clear_error_and_the_others_can_be_read(options):
    flip(shard_path(Path(options["output"]), 1), "vectors")
    scorer = ItemCachedScorer(options["model"], options["output"])
    assert scorer.score(QUERY, TITLES[:10]).shape == (10, 3)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: product 0 does not match its checksum"):
        scorer.score(QUERY, TITLES)
    shard_path(Path(options["output"]), 1).unlink()
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: missing, truncated or damaged"):
        ProductStore(options["output"])


@pytest.mark.parametrize("tensor", ["offsets", "keys", "checksums"])
def test_a_damaged_index_is_refused_when_the_store_is_opened(options, tensor):
    flip(shard_path(Path(options["output"]), 0), tensor)
    with pytest.raises(UserError, match="its index does not match its checksum"):
        ProductStore(options["output"])


def test_vectors_that_the_store_cannot_hold_are_refused(made, tmp_path):
    model, tokenizer, _ = load_student(made["model"])
    with torch.no_grad():  # beyond float16, as outliers of a large encoder can be
        model.encoder.encoder.layer[1].output.LayerNorm.bias[3] = 1e5
    model.save_pretrained(tmp_path / "outlier")
    save_tokenizer(tokenizer, tmp_path / "outlier")
    options = {**made, "model": str(tmp_path / "outlier"), "output": str(tmp_path / "store")}
    with pytest.raises(UserError, match="not finite numbers in float16: --dtype float32 or int8 holds them"):
        encode_products(EncodeProductsArguments(**{**options, "dtype": "float16"}), progress=False)
    assert not list((tmp_path / "store").glob("shard-*"))
    for dtype in ("int8", "float32"):
        options |= {"output": str(tmp_path / dtype), "dtype": dtype}
        encode_products(EncodeProductsArguments(**options), progress=False)
    scorer = ItemCachedScorer(options["model"], options["output"])
    assert np.isfinite(scorer.score(QUERY, TITLES)).all()
    with torch.no_grad():
        scorer.model.classifier.bias[0] = torch.nan
    with pytest.raises(UserError, match="product 'shoe number 0 long': the model's logits are NaN or infinite"):
        scorer.score(QUERY, TITLES)


def test_a_truncated_shard_is_refused_and_made_again(options):
    path = shard_path(Path(options["output"]), 2)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="missing, truncated or damaged"):
        ProductStore(options["output"])
    path.unlink()
    encode_products(EncodeProductsArguments(**options), progress=False)
    assert path.read_bytes() == whole
    assert os.listdir(options["output"]).count(path.name) == 1


def test_a_description_that_cannot_be_read(options):
    path = Path(options["output"], "store.json")
    path.write_text(path.read_text()[:50])
    with pytest.raises(UserError, match=r"store\.json: not a store's description"):
        ProductStore(options["output"])
    for content, message in (('{"format": 1}', "lacks complete, key"), ("[1]", "list indices")):
        path.write_text(content)
        with pytest.raises(UserError, match=rf"store\.json: not a store's description \({message}"):
            ProductStore(options["output"])
    path.unlink()
    with pytest.raises(UserError, match=r"store\.json: no such file"):
        ProductStore(options["output"])


# Bad input


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame({"product_title": pd.Series(dtype=str)}), "has no rows"),
        (pd.DataFrame({"title": ["a"]}), "column 'product_title' is missing from products"),
        (pd.DataFrame({"product_title": ["a", None]}), "row 1, column 'product_title': is null"),
        (pd.DataFrame({"product_title": ["a", "  "]}), "row 1, column 'product_title': is empty or blank"),
    ],
)
def test_products_that_break_their_contract(made, tmp_path, frame, message):
    frame.to_parquet(tmp_path / "p.parquet")
    options = {**made, "products": [str(tmp_path / "p.parquet")], "output": str(tmp_path / "store")}
    with pytest.raises(UserError, match=message):
        encode_products(EncodeProductsArguments(**options))
    assert not (tmp_path / "store").exists()


def test_one_key_with_two_titles(made, tmp_path):
    pd.DataFrame({"product_title": ["a", "b"], "product_id": ["B1", "B1"]}).to_parquet(tmp_path / "p.parquet")
    options = {
        **made,
        "products": [str(tmp_path / "p.parquet")],
        "output": str(tmp_path / "store"),
        "key": "product_id",
    }
    with pytest.raises(UserError, match="product_id 'B1' comes with two titles"):
        encode_products(EncodeProductsArguments(**options))


def test_settings_that_cannot_be(made):
    with pytest.raises(UserError, match="max_product_tokens: expected less than the 128 tokens"):
        encode_products(EncodeProductsArguments(**{**made, "max_product_tokens": 128}))
    with pytest.raises(UserError, match="shard_products: expected 1 or more, got 0"):
        encode_products(EncodeProductsArguments(**{**made, "shard_products": 0}))
    with pytest.raises(UserError, match="products: expected at least one parquet file"):
        encode_products(EncodeProductsArguments(**{**made, "products": []}))
    with pytest.raises(UserError, match="threads: expected 1 or more, got 0"):
        ItemCachedScorer(made["model"], made["output"], threads=0)


def test_queries_and_products_that_cannot_be_scored(made):
    scorer = ItemCachedScorer(made["model"], made["output"])
    with pytest.raises(UserError, match=r"1 of 2 products are not in the store, e.g. product_title 'sofa'"):
        scorer.score(QUERY, [TITLES[0], "sofa"])
    with pytest.raises(UserError, match="product 1 is None; expected a product_title"):
        scorer.score(QUERY, [TITLES[0], None])
    with pytest.raises(UserError, match=r"e\.g\. product_title 'red \\ud83d'"):
        scorer.score(QUERY, ["red \ud83d"])
    with pytest.raises(UserError, match="query: is None; expected text"):
        scorer.score(None, TITLES)
    with pytest.raises(UserError, match="query: is blank"):
        scorer.score(" ", TITLES)
    with pytest.raises(UserError, match=r"has 102 tokens; beside a product of this store there is room for 32"):
        scorer.score("x" * 100, TITLES)


@pytest.mark.parametrize(("family", "room"), [("bert", 40), ("xlm-roberta", 39)])
def test_a_query_too_long_where_only_the_encoder_knows_the_limit(family, room, tmp_path):
    model, products = save_student(tmp_path / "student", family), save_products(tmp_path / "products.parquet")
    path = Path(model, "tokenizer_config.json")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model_max_length"}))
    options = {"model": model, "products": [products], "output": str(tmp_path / "store"), "max_product_tokens": 120}
    encode_products(EncodeProductsArguments(**options), progress=False)
    scorer = ItemCachedScorer(model, options["output"])
    assert scorer.score("x" * (room - 2), TITLES[:1]).shape == (1, 3)
    with pytest.raises(UserError, match=f"has {room + 1} tokens; .* there is room for {room}"):
        scorer.score("x" * (room - 1), TITLES[:1])


def test_an_enormous_title_is_cut_before_it_is_tokenised():
    seen = []

    def tokenizer(queries, titles=None, **options):
        seen.extend(map(len, titles or ()))
        return real(queries, titles, **options)

    real = tiny_tokenizer()
    whole = product_tokens(real, ["red shoe " * 90], 20)
    assert product_tokens(tokenizer, ["red shoe " * 1_000_000], 20) == whole
    assert seen == [2000]
