"""The handler of an Inference Endpoint over real HTTP, against the pipelines of this process."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification
from recipes.student.saving import save_tokenizer
from tests.tiny import tiny_config, tiny_tokenizer

ROOT = Path(__file__).parents[2]
RANKING = {"query": "red shoes", "products": ["blue shoe", {"title": "red shoe " * 4, "product_id": "B7"}, "lamp"]}
PAIR = {"text": "red shoes", "text_pair": "blue shoe"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    names = {0: "Exact", 1: "Substitute", 2: "Irrelevant"}
    config = LRKDConfig(encoder_config=tiny_config(), reasoning_dim=8, id2label=names, label_gains=[1.0, 0.1, 0.0])
    folder = tmp_path_factory.mktemp("endpoint") / "student"
    LRKDForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(tiny_tokenizer(), folder)
    # As in a model's repository: the very file that is published, beside the weights.
    (folder / "handler.py").write_bytes((ROOT / "recipes" / "serve" / "handler.py").read_bytes())
    return folder


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    modules = str(tmp_path_factory.mktemp("modules"))
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes.serve.endpoint", "--model", str(folder), "--port", "0"],
        cwd=ROOT,
        env={**os.environ, "HF_MODULES_CACHE": modules, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
    )
    found = re.search(r"http://[\d.:]+", process.stdout.readline())
    assert found, "the server did not start; its reason is above"
    yield found.group()
    process.terminate()
    process.wait(timeout=30)


def post(url, body, path="/"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_health(url):
    for path in ("/health", "/"):
        with urllib.request.urlopen(url + path) as response:
            assert (response.status, response.read()) == (200, b"Ok")


def test_it_ranks_as_the_pipeline_does(url, folder):
    rank = pipeline("lrkd-relevance", model=str(folder), device="cpu")
    assert post(url, {"inputs": RANKING}) == (200, close(rank(RANKING)))
    assert post(url, {"inputs": RANKING, "parameters": {"top_k": 1}}, "/predict") == (200, close(rank(RANKING)[:1]))
    empty = {"query": "lamp", "products": []}
    assert post(url, {"inputs": [RANKING, empty]}) == (200, close([rank(RANKING), []]))
    cut = {"max_length": 14}
    assert post(url, {"inputs": RANKING, "parameters": cut}) == (200, close(rank(RANKING, **cut)))
    assert post(url, {"inputs": []}) == (200, [])


def test_it_classifies_as_the_pipeline_does(url, folder):
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    assert post(url, {"inputs": PAIR}) == (200, close(classify(PAIR, top_k=None)))
    assert post(url, {"inputs": [PAIR, PAIR]}) == (200, close(classify([PAIR, PAIR], top_k=None)))
    status, best = post(url, {"inputs": PAIR, "parameters": {"top_k": 1}})
    assert (status, len(best)) == (200, 1)


def close(value):
    """Compare nested results with a tolerance for their numbers."""
    if isinstance(value, dict):
        return {key: close(part) for key, part in value.items()}
    if isinstance(value, list):
        return [close(part) for part in value]
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "The body is not JSON"),
        (b'{"inputs": "\xff"}', "utf-8"),
        ([RANKING], 'Expected {"inputs"'),
        ({"input": RANKING}, 'Expected {"inputs"'),
        ({"inputs": "red shoes"}, "inputs: expected"),
        ({"inputs": ["red shoes", "blue shoe"]}, "inputs: expected"),
        ({"inputs": {"query": "a", "documents": ["b"]}}, "got the keys 'query', 'documents'"),
        ({"inputs": {**PAIR, "query": "a"}}, "inputs: expected"),
        ({"inputs": [RANKING, PAIR]}, "inputs[0]: expected"),
        ({"inputs": {"query": "", "products": ["b"]}}, "inputs['query']: expected text"),
        ({"inputs": {"query": "a", "products": "b"}}, "inputs['products']: expected a list"),
        (
            {"inputs": {"query": "a", "products": ["b", {"titel": "c"}]}},
            "inputs['products'][1]: expected the key title",
        ),
        ({"inputs": {"text": "a", "text_pair": None}}, "inputs['text_pair']: expected text"),
        ({"inputs": {"query": "a", "products": ["b" * 10_001]}}, "inputs['products'][0]: 10001 characters"),
        ({"inputs": {"query": "a", "products": ["b"] * 1_001}}, "1001 pairs; this endpoint takes 1000"),
        ({"inputs": {"query": "a " * 200, "products": ["b"]}}, "leaves no room for a product"),
        ({"inputs": RANKING, "parameters": {"topk": 1}}, "unknown 'topk'; known here: top_k, max_length"),
        ({"inputs": RANKING, "parameters": {"top_k": "3"}}, "top_k is to be a whole number above 0"),
        ({"inputs": PAIR, "parameters": {"max_length": 3}}, "unknown 'max_length'; known here: top_k"),
        (b'{"inputs": {"query": "a", "products": [{"title": "b", "price": NaN}]}}', "not JSON compliant"),
        (b"[" * 100_000, ""),
    ],
)
def test_a_bad_request_is_told_why(url, body, reason):
    status, answer = post(url, body)
    assert status == 400
    assert reason in answer["error"]


def test_a_body_beyond_the_limit_is_refused(url):
    status, answer = post(url, b'{"inputs": "' + b"a" * (4 * 2**20) + b'"}')
    assert status == 413
    assert "larger than" in answer["error"]
    assert post(url, {"inputs": PAIR})[0] == 200


def test_concurrent_requests_equal_serial_ones(url):
    bodies = [
        {"inputs": {"query": f"red shoe {n}", "products": [f"shoe {'wide ' * (n % 5)}{m}" for m in range(n % 7)]}}
        if n % 3
        else {"inputs": {"text": f"lamp {n}", "text_pair": "desk lamp " * (n % 4 + 1)}}
        for n in range(24)
    ]
    serial = [post(url, body) for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda body: post(url, body), bodies)) == serial
    assert {status for status, _ in serial} == {200}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "--model nowhere: no config.json there"),
        (["--model", "nowhere", "--port", "99999"], "99999: "),
        (["--model", "nowhere", "--prot", "1"], "unrecognized arguments: --prot"),
    ],
)
def test_a_wrong_start_is_told_why(options, message):
    command = [sys.executable, "-m", "recipes.serve.endpoint", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
