"""The scorer gives the plain forward's probabilities, in order, whatever comes in."""

import itertools
import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer, pipeline

from modeling_lrkd import LRKDForSequenceClassification
from recipes.arguments import UserError
from recipes.serve.plan import exported_forms
from recipes.serve.scorer import CHARACTERS_PER_TOKEN, RowError, Scorer, token_batches
from tests.serve.conftest import WORDS, save_student

POOL = [(query, " ".join(WORDS[:count])) for query, count in zip(WORDS, itertools.cycle((1, 9, 3, 6, 2)))]


def plain_forward(folder, pairs, temperature=1.0):
    """One pair at a time: no padding, no batch, no order."""
    model = LRKDForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for query, product in pairs:
        inputs = tokenizer(query, product, truncation=True, max_length=128, return_tensors="pt")
        with torch.inference_mode():
            rows.append((model(**inputs).logits / temperature).softmax(dim=1)[0].numpy())
    return np.stack(rows)


@pytest.fixture(scope="module")
def expected(student):
    return plain_forward(student, POOL)


@pytest.fixture(scope="module")
def scorer(student):
    with Scorer(student, "torch", streams=2, tokens_per_batch=160) as scorer:
        yield scorer


@pytest.mark.parametrize(
    ("form", "tolerance"),
    [
        ("torch-float32", 1e-5),
        ("onnx-float32", 1e-4),
        ("openvino-float32", 1e-4),
        ("openvino-bfloat16", 0.2),
        ("onnx-int8", 0.4),
        ("openvino-int8", 0.4),
    ],
)
def test_every_form_gives_the_plain_forward(form, tolerance, exported, expected):
    if form not in {"torch-float32", *exported_forms(exported)}:
        pytest.skip("this CPU does not multiply it, so it was not exported")
    backend, precision = form.split("-")
    with Scorer(exported, backend, precision=precision, streams=2) as scorer:
        assert scorer.form == form
        found = np.stack(list(scorer.score(POOL)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=tolerance)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-5)


@given(rows=st.lists(st.integers(0, len(POOL) - 1), max_size=40), window=st.integers(1, 12))
def test_order_is_the_inputs_for_any_lengths_and_window(scorer, expected, rows, window):
    found = list(scorer.score((POOL[row] for row in rows), window=window))
    assert len(found) == len(rows)
    if rows:
        np.testing.assert_allclose(np.stack(found), expected[rows], atol=1e-5)


@given(lengths=st.lists(st.integers(1, 64), max_size=60), budget=st.integers(64, 300))
def test_no_batch_exceeds_its_tokens_and_no_row_is_lost(lengths, budget):
    batches = token_batches(lengths, budget)
    for batch in batches:
        assert len(batch) * max(lengths[row] for row in batch) <= budget
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(lengths)))


def test_prepared_batches_stay_within_the_budget(scorer):
    batches = scorer.prepare(POOL * 9)
    assert len(batches) > 1
    assert all(batch.inputs["input_ids"].size <= scorer.tokens_per_batch for batch in batches)
    assert sum(batch.inputs["attention_mask"].any(axis=1).sum() for batch in batches) == len(POOL) * 9


def test_a_row_longer_than_the_budget_is_an_error():
    with pytest.raises(ValueError, match="9 tokens does not fit"):
        token_batches([3, 9], 8)


def test_an_endless_iterable_is_read_a_few_windows_ahead(scorer, expected):
    taken = itertools.count()
    endless = (POOL[next(taken) % len(POOL)] for _ in itertools.count())
    first = list(itertools.islice(scorer.score(endless, window=5), 7))
    np.testing.assert_allclose(np.stack(first), expected[np.arange(7) % len(POOL)], atol=1e-5)
    assert next(taken) <= 7 + 3 * 5


def test_a_progress_bar_leaves_few_states_in_a_log(scorer, capsys):
    def slow():
        for pair in POOL * 4:
            time.sleep(0.02)
            yield pair

    started = time.monotonic()
    assert len(list(scorer.score(slow(), progress=True, window=1))) == len(POOL) * 4
    tens = (time.monotonic() - started) // 10  # none but on a machine that is busy with something else
    assert 2 <= capsys.readouterr().err.count("pair/s") <= 2 + tens  # its begin and its end


def test_nothing_in_nothing_out(scorer):
    assert list(scorer.score([])) == []
    assert list(scorer.score(iter(()))) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("lamp", None), "row 7: the product is None"),
        ((float("nan"), "lamp"), "row 7: the query is nan"),
        (("lamp", 3), "row 7: the product is 3"),
        ("lamp", r"row 7: expected a \(query, product\) pair"),
        (("a", "b", "c"), "row 7: expected a"),
        (("lamp", "red \ud83d"), r"row 7: '\\ud83d' is half a character"),
    ],
)
def test_a_bad_row_is_named_after_the_windows_before_it(bad, message, scorer):
    results = scorer.score([*POOL[:7], bad, *POOL], window=5)
    assert len(list(itertools.islice(results, 5))) == 5
    with pytest.raises(RowError, match=message):
        next(results)
    assert len(list(scorer.score(POOL))) == len(POOL)  # the scorer goes on


def test_an_enormous_text_is_cut_before_it_is_tokenised(scorer, student, monkeypatch):
    seen = []

    def tokenizer(queries, products, **options):
        seen.extend(map(len, (*queries, *products)))
        return real(queries, products, **options)

    real = scorer.tokenizer
    tokenizer.pad_token_id = real.pad_token_id
    monkeypatch.setattr(scorer, "tokenizer", tokenizer)
    found = list(scorer.score([("lamp", "red shoe " * 1_000_000), POOL[0]]))
    assert max(seen) == CHARACTERS_PER_TOKEN * scorer.max_length
    expected = plain_forward(student, [("lamp", "red shoe " * 200), POOL[0]])
    np.testing.assert_allclose(np.stack(found), expected, atol=1e-5)


def test_the_temperature_of_the_configuration_is_applied(tmp_path):
    folder = save_student(tmp_path / "student", temperature=2.5)
    with Scorer(folder, "torch") as scorer:
        found = np.stack(list(scorer.score(POOL[:3])))
    np.testing.assert_allclose(found, plain_forward(folder, POOL[:3], temperature=2.5), atol=1e-5)


def test_the_probabilities_are_those_of_the_pipeline_where_they_were_calibrated(tmp_path):
    folder = save_student(
        tmp_path / "student",
        temperature=2.0,
        class_scales=[0.5, 1.0, 1.5, 0.2],
        class_biases=[0.3, -1.0, 0.0, 0.7],
    )
    rank = pipeline("lrkd-relevance", model=str(folder))
    with Scorer(folder, "torch") as scorer:
        for (query, title), found in zip(POOL[:5], scorer.score(POOL[:5])):
            expected = rank({"query": query, "products": [title]})[0]["probabilities"]
            assert dict(zip(scorer.labels, found.tolist())) == pytest.approx(expected, abs=1e-5)


def test_logits_that_are_not_finite_name_their_row(scorer, monkeypatch):
    real = scorer._run

    def run(batch):
        logits = real(batch)
        logits[batch["attention_mask"].sum(axis=1) == longest] = np.nan
        return logits

    lengths = [int(scorer.prepare([pair])[0].inputs["attention_mask"].sum()) for pair in POOL]
    longest = max(lengths)
    monkeypatch.setattr(scorer, "_run", run)
    with pytest.raises(UserError, match=f"row {5 + lengths.index(longest)}: .* NaN"):
        list(scorer.score([POOL[0]] * 5 + POOL[: lengths.index(longest) + 1], window=5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads: expected at least 1"),
        ({"streams": 0}, "streams: expected at least 1"),
        ({"max_length": 4096}, "takes at most 128 tokens"),
        ({"tokens_per_batch": 100}, "tokens_per_batch: expected at least max_length, 128"),
        ({"backend": "onnx"}, "nothing was exported"),
    ],
)
def test_options_that_cannot_be(options, message, student):
    with pytest.raises(UserError, match=message):
        Scorer(student, **options)


def test_a_window_of_no_pairs_is_an_error_not_an_end(scorer):
    with pytest.raises(UserError, match="window: expected at least 1, got 0"):
        list(scorer.score(POOL, window=0))


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_the_longest_text_fits_where_only_the_encoder_knows_the_limit(family, tmp_path):
    folder = save_student(tmp_path / "student", family)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model_max_length"}))
    with Scorer(folder, "torch") as scorer:
        assert scorer.max_length == {"bert": 160, "xlm-roberta": 159}[family]
        assert len(list(scorer.score([("red " * 90, "shoe " * 90)]))) == 1


def spoil(folder, what):
    path = folder / {"config": "config.json", "tokenizer": "tokenizer.json"}.get(what, "model.safetensors")
    if what in ("config", "cut"):
        path.write_bytes(path.read_bytes()[:100])
    elif what == "encoder":  # as it comes from its pretraining, without what a student adds
        AutoModel.from_pretrained(folder).encoder.save_pretrained(folder)
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config", "student: not a loadable student: .* not a valid JSON"),
        ("tokenizer", "student: not a loadable student: "),
        ("weights", "student: not a loadable student: .*model.safetensors"),
        ("cut", "student: not a loadable student: .* truncated or damaged"),
        ("encoder", r"student: the weights lack classifier\.bias, .*would be random"),
    ],
)
def test_a_student_that_cannot_be_loaded(what, message, tmp_path):
    folder = save_student(tmp_path / "student")
    spoil(folder, what)
    with pytest.raises(UserError, match=message):
        Scorer(folder, "torch")


def test_a_folder_without_a_student(tmp_path, student):
    with pytest.raises(UserError, match=r"no config\.json"):
        Scorer(tmp_path)
    view = save_student(tmp_path / "view")
    config = json.loads((view / "config.json").read_text())
    (view / "config.json").write_text(json.dumps({**config, "ranking_view": True}))
    with pytest.raises(UserError, match="ranking_view"):
        Scorer(view, "torch")


def test_a_caller_that_stops_asking_ends_the_work(student):
    with Scorer(student, "torch") as scorer:
        results = scorer.score(POOL * 50, window=10)
        next(results)
        results.close()
        assert len(list(scorer.score(POOL))) == len(POOL)
