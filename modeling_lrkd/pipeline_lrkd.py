"""The task `lrkd-relevance`: a query and products in, the products ranked by their expected gain out."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, Pipeline
from transformers.utils import cached_file, logging

from .configuration_lrkd import custom_pipelines

logger = logging.get_logger(__name__)

PERSPECTIVES_FILE = "perspectives.safetensors"
# What a result states itself; a product cannot bring its own.
RESULT_KEYS = ("rank", "index", "label", "score", "probabilities", "tier", "perspectives", "perspective_weights")


class LRKDRelevancePipeline(Pipeline):
    r"""Rank the products of a query.

    The input is `{"query": str, "products": [...]}`, or a list of such. A product is its title, or a dict with
    `title` and whatever else is to come back with it, `product_id` for one.

    The answer to a query is a list of dicts, best first; products of the same score stay in the order of the input:

    - `rank`: 1 for the best; `index`: the product's position in the input;
    - `title`, and what else the product came with;
    - `label`: its most probable class; `probabilities`: class -> probability, softmax(logits / `config.temperature`);
    - `score`: the expected gain, Σ P(c)·gain(c), with `config.label_gains`;
    - `tier`: how many of `config.tier_thresholds` are at or below the score; None where there are none;
    - `perspectives`: perspective -> cosine in [-1, 1], or None where the model brings no `perspectives.safetensors`;
    - `perspective_weights`: perspective -> weight in [0, 1] of its latent in the mixture that the classifier sees, of
      sum 1; None for a model of a single latent (`config.perspectives`). A gate's weight, not an attribution.

    `perspectives` says where the latent reasoning lies among the perspectives from which the teacher reasoned. The
    file holds a vector c_p `(reasoning_dim,)` for each perspective: the mean embedding of that perspective's
    training rationales. With m the mean of the c_p and r the projected reasoning, the value is cos(r - m, c_p - m).
    That is the latent's neighbourhood, not an attribution: it does not say what the score rests on.

    Parameters, here or at a call:
        top_k: Products to return of each query; all by default.
        batch_size: Pairs the model takes at once (32). Pairs of about one length go together.
        max_length: Tokens of query and title together (the tokenizer's `model_max_length`). The title is cut, the
            query never; a query that leaves no room for a title is an error.

    Raises:
        ValueError: The model has no usable `label_gains` or shows its `ranking_view`; the input is malformed (the
            message says where); a parameter has a value it cannot have.

    Example:
        ```python
        rank = pipeline("lrkd-relevance", model="runs/demo/students/lrkd-gat-0", trust_remote_code=True)
        rank({"query": "usb c cable", "products": ["USB-C cable, 2 m", {"title": "Desk lamp", "product_id": "B7"}]})
        ```
    """

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.model.config
        config.custom_pipelines = custom_pipelines()  # transformers put classes there, which JSON does not know
        if config.ranking_view:
            raise ValueError(
                "The model was loaded with ranking_view=True and shows one score, not its classes. Load it with "
                "ranking_view=False (in its config.json, or as an option of from_pretrained)."
            )
        self.gains = torch.tensor(config.ranking_gains(), dtype=torch.float64)  # (labels,)
        self.labels = [config.id2label[index] for index in range(config.num_labels)]
        self.perspectives = None  # name -> (reasoning_dim,)
        if config.extractor_type != "none":
            commit = getattr(config, "_commit_hash", None)  # set by from_pretrained, for what comes from the Hub
            self.perspectives = _load_perspectives(config.name_or_path, commit, config.reasoning_dim)

    def __call__(self, inputs: dict[str, Any] | list[dict[str, Any]], **options: Any) -> Any:
        """Rank the products of one query, or of several.

        Args:
            inputs: See the class.
            options: `top_k`, `batch_size`, `max_length`; see the class.

        Returns:
            The ranked products of the query; for a list, a list of those.
        """
        given = self._sanitize_parameters(**options)
        stored = (self._preprocess_params, self._forward_params, self._postprocess_params)
        parameters = [{**mine, **theirs} for mine, theirs in zip(stored, given, strict=True)]
        if isinstance(inputs, dict):
            return self.run_single([_checked(inputs, "")], *parameters)[0]
        if not isinstance(inputs, list):
            raise ValueError(
                f'Expected {{"query": ..., "products": [...]}} or a list of such, got a {type(inputs).__name__}.'
            )
        return self.run_single([_checked(request, f"[{row}]") for row, request in enumerate(inputs)], *parameters)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save model, tokenizer, their code, and the perspectives."""
        super().save_pretrained(save_directory, **kwargs)
        if self.perspectives is not None:
            save_file(self.perspectives, f"{save_directory}/{PERSPECTIVES_FILE}")

    def _sanitize_parameters(
        self, top_k: int | None = None, batch_size: int | None = None, max_length: int | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        for name, value in (("top_k", top_k), ("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected a whole number above 0, got {value!r}.")
        if batch_size is None:
            batch_size = self._batch_size  # `pipeline(..., batch_size=...)`, which the base class takes for itself
        stages = ({"max_length": max_length}, {"batch_size": batch_size}, {"top_k": top_k})
        preprocess, forward, postprocess = (
            {name: value for name, value in stage.items() if value is not None} for stage in stages
        )
        return preprocess, forward, postprocess

    def preprocess(self, input_: list[dict[str, Any]], max_length: int | None = None) -> dict[str, Any]:
        """Tokenise each pair once, however often it occurs.

        Returns:
            `requests` as given; `pairs`, their distinct (query, title); `encoded`, one dict of token lists a pair.
        """
        max_length = self._max_length(max_length)
        pairs = list(dict.fromkeys((request["query"], _title(p)) for request in input_ for p in request["products"]))
        if not pairs:
            return {"requests": input_, "pairs": pairs, "encoded": []}
        self._check_queries(sorted({query for query, _ in pairs}), max_length)
        queries, titles = map(list, zip(*pairs, strict=True))
        encoded = self.tokenizer(queries, titles, truncation="only_second", max_length=max_length)
        rows = [{name: values[row] for name, values in encoded.items()} for row in range(len(pairs))]
        return {"requests": input_, "pairs": pairs, "encoded": rows}

    def _max_length(self, max_length: int | None) -> int:
        longest = self.model.config.max_position_embeddings
        if max_length is None:
            return min(self.tokenizer.model_max_length, longest)
        if max_length > longest:
            raise ValueError(f"max_length: the encoder takes at most {longest} tokens, got {max_length}.")
        return max_length

    def _check_queries(self, queries: list[str], max_length: int) -> None:
        room = max_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        for query, tokens in zip(queries, self.tokenizer(queries, add_special_tokens=False)["input_ids"], strict=True):
            if len(tokens) >= room:
                raise ValueError(
                    f"The query {query[:60]!r}... has {len(tokens)} tokens and leaves no room for a product: "
                    f"max_length is {max_length}. Shorten it."
                )

    def _forward(self, input_tensors: dict[str, Any], batch_size: int = 32) -> dict[str, Any]:
        encoded = input_tensors.pop("encoded")
        pad = DataCollatorWithPadding(self.tokenizer)
        order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]["input_ids"]))
        logits: list[Any] = [None] * len(encoded)
        perspectives: list[Any] = [None] * len(encoded)
        gates: list[Any] = [None] * len(encoded)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = pad([encoded[row] for row in rows])
            output = self.model(**batch.to(self.model.device))
            near = self._near(output.projected_reasoning)
            for position, row in enumerate(rows):
                logits[row] = output.logits[position].float()
                perspectives[row] = None if near is None else near[position]
                gates[row] = None if output.perspective_weights is None else output.perspective_weights[position]
        return {**input_tensors, "logits": logits, "perspectives": perspectives, "gates": gates}

    def _near(self, reasoning: Tensor | None) -> Tensor | None:
        """cos(r - m, c_p - m) for each row and perspective, `(batch, perspectives)`."""
        if self.perspectives is None or reasoning is None:
            return None
        centres = torch.stack(list(self.perspectives.values())).to(reasoning.device)  # (perspectives, reasoning_dim)
        mean = centres.mean(dim=0)
        offsets = (reasoning.float() - mean).unsqueeze(1)  # (batch, 1, reasoning_dim)
        return F.cosine_similarity(offsets, (centres - mean).unsqueeze(0), dim=2)

    def postprocess(self, model_outputs: dict[str, Any], top_k: int | None = None) -> list[list[dict[str, Any]]]:
        """Turn logits into ranked products, a list of them for each request."""
        scored: dict[tuple[str, str], dict[str, Any]] = {}
        parts = ("pairs", "logits", "perspectives", "gates")
        for pair, logits, near, gate in zip(*(model_outputs[part] for part in parts), strict=True):
            names = self.model.config.perspectives
            weights = None if gate is None else dict(zip(names, gate.tolist(), strict=True))
            scored[pair] = {**self._result(pair, logits, near), "perspective_weights": weights}
        return [self._ranked(request, scored)[:top_k] for request in model_outputs["requests"]]

    def _result(self, pair: tuple[str, str], logits: Tensor, near: Tensor | None) -> dict[str, Any]:
        if not bool(torch.isfinite(logits).all()):
            raise RuntimeError(
                f"The model gives NaN or infinite logits for query {pair[0][:60]!r}, product {pair[1][:60]!r}: its "
                "weights are damaged, or too large for its precision (try dtype=torch.float32)."
            )
        probabilities = torch.softmax(logits.double() / self.model.config.temperature, dim=0)  # (labels,)
        score = float(probabilities @ self.gains)
        thresholds = self.model.config.tier_thresholds
        return {
            "label": self.labels[int(probabilities.argmax())],
            "score": score,
            "probabilities": dict(zip(self.labels, probabilities.tolist(), strict=True)),
            "tier": None if thresholds is None else bisect_right(thresholds, score),
            "perspectives": None if near is None else dict(zip(self.perspectives or (), near.tolist(), strict=True)),
        }

    def _ranked(self, request: dict[str, Any], scored: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
        products = request["products"]
        results = [scored[request["query"], _title(product)] for product in products]
        order = sorted(range(len(products)), key=lambda index: -results[index]["score"])  # stable
        return [
            {
                "rank": rank,
                "index": index,
                **({"title": products[index]} if isinstance(products[index], str) else products[index]),
                **{key: dict(value) if isinstance(value, dict) else value for key, value in results[index].items()},
            }
            for rank, index in enumerate(order, start=1)
        ]


def _title(product: str | dict[str, Any]) -> str:
    return product if isinstance(product, str) else product["title"]


def _checked(request: Any, where: str) -> dict[str, Any]:
    """Return `request` if it is a query with products, else raise a ValueError that says where it is not."""
    expected = '{"query": "...", "products": ["...", {"title": "..."}]}'
    if not isinstance(request, dict):
        kind = type(request).__name__
        raise ValueError(f"inputs{where}: expected {expected}, got a {kind}. A pair is a query with one product.")
    if set(request) != {"query", "products"}:
        raise ValueError(f"inputs{where}: expected the keys query and products, got {_names(request)}.")
    _check_text(request["query"], f"inputs{where}['query']")
    if not isinstance(request["products"], list):
        kind = type(request["products"]).__name__
        raise ValueError(f"inputs{where}['products']: expected a list of products, got a {kind}.")
    for index, product in enumerate(request["products"]):
        place = f"inputs{where}['products'][{index}]"
        if not isinstance(product, dict):
            _check_text(product, place)
            continue
        if "title" not in product:
            raise ValueError(f"{place}: expected the key title, got {_names(product)}.")
        _check_text(product["title"], f"{place}['title']")
        if taken := [key for key in RESULT_KEYS if key in product]:
            raise ValueError(f"{place}: the result has a key {taken[0]!r} of its own; rename the product's.")
    return request


def _check_text(text: Any, place: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{place}: expected text, got {text!r:.60} ({type(text).__name__}).")
    if not text.strip():
        raise ValueError(f"{place}: expected text, got {'only white space' if text else 'an empty string'}.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{place}: not valid Unicode text, it holds half of a surrogate pair.")


def _names(mapping: dict[Any, Any]) -> str:
    return ", ".join(map(str, mapping)) or "none"


def _load_perspectives(name_or_path: str, revision: str | None, size: int) -> dict[str, Tensor] | None:
    """Return the centre of each perspective `(reasoning_dim,)`, or None if the model brings none."""
    if not name_or_path:
        return None  # never saved
    try:
        path = cached_file(
            name_or_path, PERSPECTIVES_FILE, revision=revision, _raise_exceptions_for_missing_entries=False
        )
    except OSError as error:  # no network; or a private repository, and only `token=` knows its token
        logger.warning(
            f"{name_or_path}: {PERSPECTIVES_FILE} could not be looked for, so `perspectives` is None: {error}"
        )
        return None
    if path is None:
        return None
    try:
        centres = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged ({error}). Download or write it again.") from None
    if len(centres) < 2 or any(centre.shape != (size,) for centre in centres.values()):
        shapes = {name: tuple(centre.shape) for name, centre in centres.items()}
        raise ValueError(f"{path}: expected two perspectives or more, each of shape ({size},), found {shapes}.")
    return {name: centre.float() for name, centre in sorted(centres.items())}
