"""The task `lrkd-relevance`: a query and products in, the products ranked by their expected gain out."""

from __future__ import annotations

import copy
from bisect import bisect_right
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, Pipeline
from transformers.utils import cached_file, logging

from .bank_lrkd import BANK_FILE, TEXTS_FILE, RationaleBank
from .configuration_lrkd import custom_pipelines

logger = logging.get_logger(__name__)

PERSPECTIVES_FILE = "perspectives.safetensors"
# What a result states itself; a product cannot bring its own.
RESULT_KEYS = (
    "rank",
    "index",
    "label",
    "score",
    "probabilities",
    "tier",
    "perspectives",
    "perspective_weights",
    "explanations",
)


class LRKDRelevancePipeline(Pipeline):
    r"""Rank the products of a query.

    The input is `{"query": str, "products": [...]}`, or a list of such. A product is its title, or a dict with
    `title` and whatever else is to come back with it, `product_id` for one.

    The answer to a query is a list of dicts, best first; products of the same score stay in the order of the input:

    - `rank`: 1 for the best; `index`: the product's position in the input;
    - `title`, and what else the product came with;
    - `label`: its most probable class; `probabilities`: class -> probability, calibrated: the softmax of the logits
      after `config.temperature`, or `class_scales` and `class_biases`;
    - `score`: the expected gain, Σ P(c)·gain(c), with `config.label_gains`;
    - `tier`: how many of `config.tier_thresholds` are at or below the score; None where there are none;
    - `perspectives`: perspective -> cosine in [-1, 1], or None where the model brings no `perspectives.safetensors`;
    - `perspective_weights`: perspective -> weight in [0, 1] of its latent in the mixture that the classifier sees, of
      sum 1; None for a model of a single latent (`config.perspectives`). A gate's weight, not an attribution.

    `perspectives` says where the latent reasoning lies among the perspectives from which the teacher reasoned. The
    file holds a vector c_p `(reasoning_dim,)` for each perspective: the mean embedding of that perspective's
    training rationales. With m the mean of the c_p and r the projected reasoning, the value is cos(r - m, c_p - m).
    That is the latent's neighbourhood, not an attribution: it does not say what the score rests on.

    `explanations`, if asked for, are reasoning that the model stands close to, never the model's own words: rationales
    that the teacher wrote of other pairs in training, which the projected reasoning lies nearest to, from the model's
    rationale bank (`RationaleBank`). A list of `perspective`, `rationale`, `label` (that rationale's verdict on its own
    pair) and `similarity` in [-1, 1]; perspective by perspective, the nearest first.

    Parameters, here or at a call:
        top_k: Products to return of each query; all by default.
        batch_size: Pairs the model takes at once (32). Pairs of about one length go together.
        max_length: Tokens of query and title together (the tokenizer's `model_max_length`). The title is cut, the
            query never; a query that leaves no room for a title is an error.
        explanations: Rationales to return of each perspective (0: no `explanations`).

    Raises:
        ValueError: The model has no usable `label_gains` or shows its `ranking_view`; the input is malformed (the
            message says where); a parameter has a value it cannot have; explanations are asked of a model that brings
            no rationale bank, or one of another model or encoder.

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
        self.bank_file: str | None = None  # None: there is no bank, and no explanations
        if config.extractor_type != "none":
            commit = getattr(config, "_commit_hash", None)  # set by from_pretrained, for what comes from the Hub
            self.perspectives = _load_perspectives(config.name_or_path, commit, config.reasoning_dim)
            self.bank_file = _find(config.name_or_path, BANK_FILE, commit, "there are no `explanations`")

    @cached_property
    def bank(self) -> RationaleBank:
        """The rationale bank, opened and checked when it is first asked for.

        Raises:
            ValueError: The model brings none, or one that does not belong to it.
        """
        config = self.model.config
        if self.bank_file is None:
            raise ValueError(
                f"explanations: {config.name_or_path or 'this model'} brings no {BANK_FILE}. "
                "recipes.rationales.bank writes one into a student's folder; without it, pass explanations=0."
            )
        commit = getattr(config, "_commit_hash", None)
        texts, weights = (
            _find(config.name_or_path, name, commit, "the rationale bank is of no use")
            for name in (TEXTS_FILE, "model.safetensors")
        )
        if texts is None or weights is None:
            missing = TEXTS_FILE if texts is None else "model.safetensors"
            raise ValueError(f"{self.bank_file}: {missing} is not beside it. Download or build the bank again.")
        return RationaleBank.load(self.bank_file, texts, weights, config.reasoning_dim)

    def __call__(self, inputs: dict[str, Any] | list[dict[str, Any]], **options: Any) -> Any:
        """Rank the products of one query, or of several.

        Args:
            inputs: See the class.
            options: `top_k`, `batch_size`, `max_length`, `explanations`; see the class.

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
        """Save model, tokenizer, their code, the perspectives and the rationale bank."""
        super().save_pretrained(save_directory, **kwargs)
        if self.perspectives is not None:
            save_file(self.perspectives, f"{save_directory}/{PERSPECTIVES_FILE}")
        if self.bank_file is not None:
            self.bank.save(save_directory, f"{save_directory}/model.safetensors")

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
        explanations: int | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        for name, value in (("top_k", top_k), ("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected a whole number above 0, got {value!r}.")
        if explanations is not None and (
            isinstance(explanations, bool) or not isinstance(explanations, int) or explanations < 0
        ):
            raise ValueError(f"explanations: expected a whole number, 0 or above, got {explanations!r}.")
        if batch_size is None:
            batch_size = self._batch_size  # `pipeline(..., batch_size=...)`, which the base class takes for itself
        forward_options = {"batch_size": batch_size, "explanations": explanations}
        stages = ({"max_length": max_length}, forward_options, {"top_k": top_k})
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

    def _forward(self, input_tensors: dict[str, Any], batch_size: int = 32, explanations: int = 0) -> dict[str, Any]:
        encoded = input_tensors.pop("encoded")
        pad = DataCollatorWithPadding(self.tokenizer)
        order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]["input_ids"]))
        logits: list[Any] = [None] * len(encoded)
        perspectives: list[Any] = [None] * len(encoded)
        gates: list[Any] = [None] * len(encoded)
        explained: list[Any] = [None] * len(encoded)
        bank = self.bank if explanations else None  # a missing one is an error before the work, not after
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = pad([encoded[row] for row in rows])
            output = self.model(**batch.to(self.model.device))
            near = self._near(output.projected_reasoning)
            for position, row in enumerate(rows):
                logits[row] = output.logits[position].float()
                perspectives[row] = None if near is None else near[position]
                gates[row] = None if output.perspective_weights is None else output.perspective_weights[position]
                if bank is not None:
                    explained[row] = bank.nearest(output.projected_reasoning[position], explanations)
        found = {"logits": logits, "perspectives": perspectives, "gates": gates, "explanations": explained}
        return {**input_tensors, **found}

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
        parts = (model_outputs[name] for name in ("pairs", "logits", "perspectives", "gates", "explanations"))
        for pair, logits, near, gate, explained in zip(*parts, strict=True):
            names = self.model.config.perspectives
            weights = None if gate is None else dict(zip(names, gate.tolist(), strict=True))
            scored[pair] = {**self._result(pair, logits, near), "perspective_weights": weights}
            if explained is not None:
                scored[pair]["explanations"] = explained
        return [self._ranked(request, scored)[:top_k] for request in model_outputs["requests"]]

    def _result(self, pair: tuple[str, str], logits: Tensor, near: Tensor | None) -> dict[str, Any]:
        if not bool(torch.isfinite(logits).all()):
            raise RuntimeError(
                f"The model gives NaN or infinite logits for query {pair[0][:60]!r}, product {pair[1][:60]!r}: its "
                "weights are damaged, or too large for its precision (try dtype=torch.float32)."
            )
        probabilities = torch.softmax(self.model.config.calibrated(logits.double()), dim=0)  # (labels,)
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
                **copy.deepcopy(results[index]),  # one pair may stand in several places
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
    path = _find(name_or_path, PERSPECTIVES_FILE, revision, "`perspectives` is None")
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


def _find(name_or_path: str, file: str, revision: str | None, without: str) -> str | None:
    """Return the path of a file of the model, fetched if need be; None if it brings none."""
    if not name_or_path:
        return None  # never saved
    try:
        path: str | None = cached_file(
            name_or_path, file, revision=revision, _raise_exceptions_for_missing_entries=False
        )
    except OSError as error:  # no network; or a private repository, and only `token=` knows its token
        logger.warning(f"{name_or_path}: {file} could not be looked for, so {without}: {error}")
        return None
    return path
