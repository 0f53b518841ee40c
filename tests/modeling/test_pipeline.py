"""The task `lrkd-relevance` against its definition and as a stranger uses it; the view by which CrossEncoder ranks."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, pipeline

from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification, LRKDRelevancePipeline
from recipes.student.saving import save_tokenizer
from tests.tiny import random_batch, tiny_config, tiny_tokenizer

NAMES = {0: "Exact", 1: "Substitute", 2: "Irrelevant"}
GAINS = [1.0, 0.1, 0.0]
TEMPERATURE = 1.5
QUERY = "red running shoes"
TITLES = [
    "Blue shoe",
    "USB-C cable, 2 m",
    "Men's red running shoe, size 10",
    "shoe",
    "Red garden hose " * 3,
    "red " * 9,
]


def tiny_model(**options):
    torch.manual_seed(0)
    serving = {"label_gains": GAINS, "temperature": TEMPERATURE, "tier_thresholds": [0.2, 0.4], **options}
    config = LRKDConfig(encoder_config=tiny_config(), reasoning_dim=8, id2label=NAMES, **serving)
    model = LRKDForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=2.0)  # scores that differ enough to be compared
    return model


def save(model, folder, perspectives=None):
    model.save_pretrained(folder)
    save_tokenizer(tiny_tokenizer(), folder)
    if perspectives is not None:
        save_file(perspectives, folder / "perspectives.safetensors")
    return folder


def centres():
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(8, generator=generator) for name in ("user_intent", "structured_analysis", "business_rule")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tiny_model(), tmp_path_factory.mktemp("pipeline") / "student", centres())


@pytest.fixture(scope="module")
def rank(folder):
    """With the package installed, neither remote code nor a word about trust is needed."""
    return pipeline("lrkd-relevance", model=str(folder), device="cpu")


def pipeline_of(model, **options):
    return pipeline("lrkd-relevance", model=model, tokenizer=tiny_tokenizer(), device="cpu", **options)


def literal(query, title):
    """One pair, by the formulas of the docstring."""
    with torch.inference_mode():
        output = tiny_model()(**tiny_tokenizer()(query, title, return_tensors="pt"))
    probabilities = torch.exp(output.logits[0] / TEMPERATURE)
    probabilities = (probabilities / probabilities.sum()).tolist()
    score = sum(p * gain for p, gain in zip(probabilities, GAINS))
    vectors = centres()
    mean = sum(vectors.values()) / 3
    offset = output.projected_reasoning[0] - mean
    near = {n: float(offset @ (c - mean) / offset.norm() / (c - mean).norm()) for n, c in vectors.items()}
    return dict(zip(NAMES.values(), probabilities)), score, near


def test_each_result_is_what_its_definition_says(rank):
    ranked = rank({"query": QUERY, "products": TITLES})
    assert isinstance(rank, LRKDRelevancePipeline)
    assert [result["rank"] for result in ranked] == [1, 2, 3, 4, 5, 6]
    assert sorted(result["index"] for result in ranked) == list(range(6))
    scores = [result["score"] for result in ranked]
    assert scores == sorted(scores, reverse=True)
    assert len({result["tier"] for result in ranked}) > 1  # or the tiers would not be tested
    for result in ranked:
        probabilities, score, near = literal(QUERY, TITLES[result["index"]])
        assert result["title"] == TITLES[result["index"]]
        assert result["probabilities"] == pytest.approx(probabilities, abs=1e-5)
        assert result["label"] == max(probabilities, key=probabilities.get)
        assert result["score"] == pytest.approx(score, abs=1e-5)
        assert result["tier"] == (score >= 0.2) + (score >= 0.4)
        assert result["perspectives"] == pytest.approx(near, abs=1e-4)
    json.dumps(ranked)


@pytest.mark.parametrize("batch_size", [2, 4, 64])
def test_batches_equal_one_by_one(rank, batch_size):
    requests = [{"query": QUERY, "products": TITLES}, {"query": "cable", "products": TITLES[:3]}]
    one_by_one = [
        result
        for request in requests
        for title in request["products"]
        for result in rank({"query": request["query"], "products": [title]})
    ]
    batched = [
        result
        for ranking in rank(requests, batch_size=batch_size)
        for result in sorted(ranking, key=lambda result: result["index"])
    ]
    for one, many in zip(one_by_one, batched, strict=True):
        assert (one["title"], one["label"], one["tier"]) == (many["title"], many["label"], many["tier"])
        assert many["score"] == pytest.approx(one["score"], abs=1e-5)
        assert many["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)
        assert many["perspectives"] == pytest.approx(one["perspectives"], abs=1e-5)


def test_ties_keep_the_order_of_the_input(rank):
    titles = ["b", "long " * 20, "b", "a", "b"]
    ranked = rank({"query": QUERY, "products": titles}, batch_size=2)
    assert [result["index"] for result in ranked if result["title"] == "b"] == [0, 2, 4]
    assert len({result["score"] for result in ranked if result["title"] == "b"}) == 1


def test_what_a_product_brings_comes_back(rank):
    products = [{"title": "cable", "product_id": 7, "price": {"EUR": 3.5}}, "cable"]
    first, second = rank({"query": "cable", "products": products})
    assert (first["product_id"], first["price"]) == (7, {"EUR": 3.5})
    assert "product_id" not in second
    assert list(first)[:4] == ["rank", "index", "title", "product_id"]
    assert products == [{"title": "cable", "product_id": 7, "price": {"EUR": 3.5}}, "cable"]


def test_nothing_in_nothing_out_and_top_k(rank):
    assert rank([]) == []
    assert rank({"query": QUERY, "products": []}) == []
    assert [len(r) for r in rank([{"query": QUERY, "products": TITLES}, {"query": "a", "products": []}], top_k=2)] == [
        2,
        0,
    ]
    everything = rank({"query": QUERY, "products": TITLES})
    assert rank({"query": QUERY, "products": TITLES}, top_k=3) == everything[:3]
    assert pipeline_of(rank.model, top_k=1, batch_size=3)({"query": QUERY, "products": TITLES})[0]["rank"] == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((QUERY, "shoe"), 'Expected {"query"'),
        ("shoe", 'Expected {"query"'),
        ([(QUERY, "shoe")], r"inputs\[0\]: expected .* got a tuple"),
        ({"text": QUERY, "text_pair": "shoe"}, "inputs: expected the keys query and products, got text, text_pair"),
        ({"query": QUERY}, "got query"),
        ({"query": "", "products": ["a"]}, r"inputs\['query'\]: expected text, got an empty string"),
        ({"query": 3, "products": ["a"]}, r"inputs\['query'\]: expected text, got 3 \(int\)"),
        ({"query": "a", "products": "shoe"}, r"inputs\['products'\]: expected a list of products, got a str"),
        (
            [{"query": "a", "products": []}, {"query": "a", "products": ["b", " "]}],
            r"\[1\]\['products'\]\[1\]: .*white",
        ),
        ({"query": "a", "products": [None]}, r"\['products'\]\[0\]: expected text, got None"),
        ({"query": "a", "products": [{"name": "b"}]}, r"\['products'\]\[0\]: expected the key title, got name"),
        ({"query": "a", "products": [{"title": "\n"}]}, r"\[0\]\['title'\]: expected text, got only white space"),
        ({"query": "a", "products": [{"title": "b", "score": 2}]}, "a key 'score' of its own"),
        ({"query": "\ud83d", "products": ["b"]}, "half of a surrogate pair"),
        (
            {"query": "a " * 130, "products": ["b"]},
            "has 130 tokens and leaves no room for a product: max_length is 128",
        ),
    ],
)
def test_bad_input_says_where(rank, inputs, message):
    with pytest.raises(ValueError, match=message):
        rank(inputs)


@pytest.mark.parametrize("options", [{"top_k": 0}, {"batch_size": -1}, {"max_length": 2.5}, {"max_length": 161}])
def test_bad_parameters(rank, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        rank({"query": QUERY, "products": ["a"]}, **options)
    with pytest.raises(TypeError, match="topk"):
        rank({"query": QUERY, "products": ["a"]}, topk=3)


def test_the_title_is_cut_and_the_query_is_not(rank):
    """One letter is one token here: [CLS] 3 [SEP] 4 [SEP] are 10."""
    cut, whole = rank({"query": "abc", "products": ["defg", "defghijkl"]}, max_length=10)
    assert cut["score"] == pytest.approx(whole["score"], abs=1e-6)
    with pytest.raises(ValueError, match=r"The query 'abcdefg'.* has 7 tokens"):
        rank({"query": "abcdefg", "products": ["a"]}, max_length=10)


def test_perspectives_that_are_not_there(tmp_path, folder):
    without = pipeline("lrkd-relevance", model=str(save(tiny_model(), tmp_path / "without")))
    assert without({"query": "a", "products": ["b"]})[0]["perspectives"] is None
    plain = save(tiny_model(extractor_type="none"), tmp_path / "plain", centres())
    assert pipeline("lrkd-relevance", model=str(plain))({"query": "a", "products": ["b"]})[0]["perspectives"] is None
    assert pipeline_of(tiny_model())({"query": "a", "products": ["b"]})[0]["perspectives"] is None


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"unified": torch.ones(8)}, "two perspectives or more"),
        ({"a": torch.ones(8), "b": torch.ones(3)}, r"'b': \(3,\)"),
    ],
)
def test_perspectives_of_another_shape(tmp_path, vectors, message):
    with pytest.raises(ValueError, match=message):
        pipeline("lrkd-relevance", model=str(save(tiny_model(), tmp_path / "student", vectors)))


def test_damaged_perspectives(tmp_path):
    student = save(tiny_model(), tmp_path / "student", centres())
    (student / "perspectives.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="truncated or damaged"):
        pipeline("lrkd-relevance", model=str(student))


def test_saved_again_it_is_the_same_pipeline(rank, tmp_path):
    rank.save_pretrained(str(tmp_path / "again"))
    save_tokenizer(tiny_tokenizer(), tmp_path / "again")
    again = pipeline("lrkd-relevance", model=str(tmp_path / "again"), device="cpu")
    request = {"query": QUERY, "products": TITLES}
    assert again(request) == rank(request)


def test_the_gate_is_told_for_each_product(rank, tmp_path):
    names = ["user_intent", "business_rule"]
    model = tiny_model(perspectives=names)
    torch.nn.init.normal_(model.perspective_gate.weight)
    gated = pipeline("lrkd-relevance", model=str(save(model, tmp_path / "gated", centres())), device="cpu")
    ranked = gated({"query": QUERY, "products": TITLES}, batch_size=4)
    for result in ranked:
        with torch.inference_mode():
            output = model(**tiny_tokenizer()(QUERY, result["title"], return_tensors="pt"))
        expected = dict(zip(names, output.perspective_weights[0].tolist()))
        assert result["perspective_weights"] == pytest.approx(expected, abs=1e-5)
        assert sum(result["perspective_weights"].values()) == pytest.approx(1)
        assert result["perspectives"].keys() == centres().keys()
    assert len({round(result["perspective_weights"]["user_intent"], 4) for result in ranked}) > 1
    json.dumps(ranked)
    assert rank({"query": QUERY, "products": TITLES})[0]["perspective_weights"] is None  # of a single latent


@pytest.mark.parametrize("gains", [None, [0.5, 0.5, 0.5]])
def test_without_gains_there_is_no_ranking(gains):
    with pytest.raises(
        ValueError, match=r"label_gains: ranking needs one gain a class .* Exact, Substitute, Irrelevant"
    ):
        pipeline_of(tiny_model(label_gains=gains))


def test_without_thresholds_there_is_no_tier():
    ranked = pipeline_of(tiny_model(tier_thresholds=None))({"query": "a", "products": ["b"]})
    assert ranked[0]["tier"] is None


def test_bfloat16(rank):
    reference = sorted(rank({"query": QUERY, "products": TITLES}), key=lambda result: result["index"])
    half = pipeline_of(tiny_model().to(torch.bfloat16))({"query": QUERY, "products": TITLES})
    for result in half:
        assert sum(result["probabilities"].values()) == pytest.approx(1.0)
        assert result["probabilities"] == pytest.approx(reference[result["index"]]["probabilities"], abs=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_says_what_the_cpu_says(rank, folder):
    on_gpu = pipeline("lrkd-relevance", model=str(folder), device=0)({"query": QUERY, "products": TITLES})
    for one, other in zip(rank({"query": QUERY, "products": TITLES}), on_gpu, strict=True):
        assert other["score"] == pytest.approx(one["score"], abs=1e-4)


def test_weights_that_give_nan_are_not_ranked():
    model = tiny_model()
    model.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="NaN or infinite logits for query 'a', product 'b'"):
        pipeline_of(model)({"query": "a", "products": ["b"]})


# The view of one score.


def test_the_sigmoid_of_the_view_is_the_expected_gain(tmp_path):
    batch = random_batch()
    model = tiny_model()
    save(model, tmp_path)
    view = AutoModelForSequenceClassification.from_pretrained(tmp_path, ranking_view=True)
    with torch.inference_mode():
        logits, shown = model(**batch).logits, view(**batch).logits
    assert shown.shape == (3, 1)
    expected = torch.softmax(logits / TEMPERATURE, dim=1) @ torch.tensor(GAINS)
    torch.testing.assert_close(shown.sigmoid().squeeze(1), expected, atol=1e-6, rtol=0)
    assert view.config.num_labels == 1
    assert {name: p.shape for name, p in view.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_a_view_saved_keeps_its_classes(tmp_path):
    tiny_model(ranking_view=True).save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (again.config.num_labels, again.config.id2label) == (1, NAMES)
    classes = AutoModelForSequenceClassification.from_pretrained(tmp_path, ranking_view=False).eval()
    batch = random_batch()
    with torch.inference_mode():
        torch.testing.assert_close(classes(**batch).logits, tiny_model()(**batch).logits)
    again.config.num_labels = 1  # as CrossEncoder(..., num_labels=1) does
    assert again.config.id2label == NAMES


def test_a_view_of_two_unnamed_classes_keeps_them(tmp_path):
    """The default names are not written to config.json."""
    LRKDConfig(encoder_config=tiny_config(), label_gains=[0.0, 1.0], ranking_view=True).save_pretrained(tmp_path)
    config = LRKDConfig.from_pretrained(tmp_path)
    assert (config.num_labels, config.id2label) == (1, {0: "LABEL_0", 1: "LABEL_1"})
    assert LRKDConfig().num_labels == 2


def test_gains_beyond_one_are_scaled_and_sure_models_stay_finite():
    batch = random_batch()
    points, shares = (
        tiny_model(label_gains=[4.0, 2.0, 0.0], ranking_view=True),
        tiny_model(label_gains=[1.0, 0.5, 0.0], ranking_view=True),
    )
    with torch.inference_mode():
        torch.testing.assert_close(points(**batch).logits, shares(**batch).logits)
        points.classifier.weight.mul_(1e4)
        assert torch.isfinite(points(**batch).logits).all()


def test_the_view_trains_as_the_classes_do():
    labels, cot = torch.tensor([0, 2, 1]), torch.ones(3, 8)
    losses = [
        tiny_model(ranking_view=view)(**random_batch(), labels=labels, cot_embeddings=cot).loss for view in (0, 1)
    ]
    torch.testing.assert_close(*losses)
    view = tiny_model(ranking_view=True)
    view(**random_batch()).logits.sum().backward()
    assert torch.isfinite(view.classifier.weight.grad).all()
    assert view.classifier.weight.grad.abs().sum() > 0


def test_a_view_needs_gains_and_does_not_serve_the_pipeline():
    with pytest.raises(ValueError, match="label_gains: ranking needs"):
        tiny_model(label_gains=None, ranking_view=True)
    with pytest.raises(ValueError, match="loaded with ranking_view=True"):
        pipeline_of(tiny_model(ranking_view=True))


# As a stranger uses it: another process, this package out of reach, the code from the folder.

STRANGER = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_lrkd":
            raise ImportError("the package is not to be used here")

sys.meta_path.insert(0, Refuse())
from sentence_transformers import CrossEncoder
from transformers import pipeline

folder, request = sys.argv[1], json.loads(sys.argv[2])
found = {}
try:
    pipeline("lrkd-relevance", model=folder, trust_remote_code=False)
except ValueError as error:
    found["refused"] = str(error)
rank = pipeline("lrkd-relevance", model=folder, trust_remote_code=True, device="cpu")
found["module"] = type(rank).__module__
found["ranked"] = rank(request)
found["config"] = rank.model.config.to_json_string()
rank.model.save_pretrained(folder + "-again")
here = {"trust_remote_code": True, "device": "cpu"}
again = pipeline("lrkd-relevance", model=folder + "-again", tokenizer=rank.tokenizer, **here)
found["again"] = [result["score"] for result in again(request)]
classify = pipeline("text-classification", model=folder, trust_remote_code=True, device="cpu")
found["classified"] = classify({"text": request["query"], "text_pair": request["products"][0]}, top_k=None)
view = {"trust_remote_code": True, "config_kwargs": {"ranking_view": True}, "device": "cpu"}
cross_encoder = CrossEncoder(folder, **view)
found["predicted"] = cross_encoder.predict([(request["query"], title) for title in request["products"]]).tolist()
found["cross_encoder"] = [hit["corpus_id"] for hit in cross_encoder.rank(request["query"], request["products"])]
cross_encoder.save_pretrained(folder + "-view")
saved = CrossEncoder(folder + "-view", trust_remote_code=True, device="cpu")
found["saved"] = [hit["corpus_id"] for hit in saved.rank(request["query"], request["products"])]
print("FOUND" + json.dumps(found))
"""

OLDEST = os.environ.get("LRKD_OLDEST_PYTHON")
PYTHONS = [
    pytest.param(sys.executable, id="pinned"),
    pytest.param(OLDEST, id="oldest", marks=pytest.mark.skipif(not OLDEST, reason="LRKD_OLDEST_PYTHON is not set")),
]


@pytest.mark.parametrize("python", PYTHONS)
def test_a_stranger_ranks_by_pipeline_and_by_cross_encoder(python, rank, tmp_path):
    student = save(tiny_model(), tmp_path / "student", centres())
    request = {"query": QUERY, "products": TITLES}
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [python, "-c", STRANGER, str(student), json.dumps(request)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.split("FOUND")[1])
    ranked = rank(request)
    assert "trust_remote_code=True" in found["refused"]
    assert found["module"].startswith("transformers_modules.")
    for one, other in zip(ranked, found["ranked"], strict=True):
        assert (one["index"], one["label"], one["tier"]) == (other["index"], other["label"], other["tier"])
        assert other["score"] == pytest.approx(one["score"], abs=1e-5)
        assert other["perspectives"] == pytest.approx(one["perspectives"], abs=1e-4)
    assert json.loads(found["config"])["custom_pipelines"]["lrkd-relevance"]["pt"] == [
        "AutoModelForSequenceClassification"
    ]
    assert found["again"] == pytest.approx([result["score"] for result in ranked], abs=1e-5)
    assert {result["label"] for result in found["classified"]} == set(NAMES.values())
    by_index = {result["index"]: result["score"] for result in ranked}
    assert found["predicted"] == pytest.approx([by_index[index] for index in range(len(TITLES))], abs=1e-5)
    assert found["cross_encoder"] == found["saved"] == [result["index"] for result in ranked]
