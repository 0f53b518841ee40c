"""Handler of a Hugging Face Inference Endpoint. It travels with the model, as `handler.py` in its repository.

    {"inputs": {"query": "usb c cable", "products": ["USB-C cable, 2 m", {"title": "Lamp", "product_id": "B7"}]},
     "parameters": {"top_k": 10, "max_length": 128, "explanations": 1}}
    {"inputs": {"text": "usb c cable", "text_pair": "USB-C cable, 2 m"}, "parameters": {"top_k": 1}}

The first form is answered as the task `lrkd-relevance` answers it: products best first, with probabilities, expected
gain and tier, and with `explanations` also training rationales that the model's reasoning lies close to, so many of
each perspective (refused where the repository holds no rationale bank). The second as `text-classification` does:
labels best first. A list of either is answered by a list.
"""

from __future__ import annotations

import threading
from typing import Any

from transformers import pipeline

# A request beyond these is refused, or one client would keep the others waiting.
MAX_PAIRS = 1_000
MAX_CHARACTERS = 10_000
MAX_EXPLANATIONS = 5
BATCH_SIZE = 32

RANKING, CLASSIFICATION = {"query", "products"}, {"text", "text_pair"}
EXPECTED = '{"query": "...", "products": [...]} or {"text": "...", "text_pair": "..."}, or a list of one of them'


class EndpointHandler:
    """What the inference toolkit makes once of a model folder, and calls with each request.

    Args:
        path: Folder of the model. Its own code is run: whoever deploys the repository trusts it.
    """

    def __init__(self, path: str = "") -> None:
        self.rank = pipeline("lrkd-relevance", model=path, trust_remote_code=True, batch_size=BATCH_SIZE)
        self.classify = pipeline(
            "text-classification", model=self.rank.model, tokenizer=self.rank.tokenizer, device=self.rank.device
        )
        self.lock = threading.Lock()  # fast tokenizers do not like two threads at once

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Answer one request.

        Args:
            data: The body of the request, see the module.

        Raises:
            ValueError: The request is malformed or too large; the toolkit answers with status 400 and the message.
        """
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError(f'Expected {{"inputs": ..., "parameters": {{...}}}}, inputs being {EXPECTED}.')
        inputs = data["inputs"]
        rows = inputs if isinstance(inputs, list) else [inputs]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"inputs: expected {EXPECTED}.")
        classification = any(CLASSIFICATION & row.keys() for row in rows)
        known = ("top_k",) if classification else ("top_k", "max_length", "explanations")
        parameters = _parameters(data.get("parameters"), known)
        for number, row in enumerate(rows):
            place = f"inputs[{number}]" if rows is inputs else "inputs"
            _check_row(row, CLASSIFICATION if classification else RANKING, place)
        pairs = len(rows) if classification else sum(len(row["products"]) for row in rows)
        if max(pairs, len(rows)) > MAX_PAIRS:
            raise ValueError(f"inputs: {max(pairs, len(rows))} pairs; this endpoint takes {MAX_PAIRS} a request.")
        with self.lock:
            if classification:
                parameters.setdefault("top_k", None)
                return self.classify(inputs, truncation=True, batch_size=BATCH_SIZE, **parameters) if rows else []
            return self.rank(inputs, **parameters)


def _parameters(given: Any, known: tuple[str, ...]) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f'parameters: expected {{"{known[0]}": ...}}, got a {type(given).__name__}.')
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"parameters: unknown {name!r}; known here: {', '.join(known)}.")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"parameters: {name} is to be a whole number above 0, got {value!r}.")
        if name == "explanations" and value > MAX_EXPLANATIONS:
            raise ValueError(f"parameters: this endpoint gives {MAX_EXPLANATIONS} explanations a perspective at most.")
    return dict(given)


def _check_row(row: dict[str, Any], keys: set[str], place: str) -> None:
    """Refuse other keys and large texts; the rest of `query` and `products` is checked by the pipeline."""
    if row.keys() != keys:
        raise ValueError(f"{place}: expected {EXPECTED}, got the keys {', '.join(map(repr, row)) or 'none'}.")
    if "products" in row and not isinstance(row["products"], list):
        raise ValueError(f"{place}['products']: expected a list, got a {type(row['products']).__name__}.")
    texts = {f"{place}[{key!r}]": value for key, value in row.items() if key != "products"}
    for index, product in enumerate(row.get("products", ())):
        texts[f"{place}['products'][{index}]"] = product.get("title") if isinstance(product, dict) else product
    for where, text in texts.items():
        if "text" in keys and not (isinstance(text, str) and text.strip()):
            raise ValueError(f"{where}: expected text, got {text!r:.60}.")
        if isinstance(text, str) and len(text) > MAX_CHARACTERS:
            raise ValueError(f"{where}: {len(text)} characters; this endpoint takes {MAX_CHARACTERS} a text.")
