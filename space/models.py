"""The models of the Space: named by the command line, the environment or `space.json`, loaded when first asked for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASK = "lrkd-relevance"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
SETTINGS = Path(__file__).with_name("space.json")

Relevance = Callable[..., list[dict[str, Any]]]


class ModelError(Exception):
    """A model that cannot be named or loaded; the message says what to do."""


@dataclass(frozen=True)
class Loaded:
    """A model that is ready.

    Attributes:
        relevance: The `lrkd-relevance` pipeline.
        labels: Its labels, best first.
        parameters: How many weights it has.
        extractor: Its latent reasoning extractor.
        explains: It brings a rationale bank.
        is_calibrated: Its probabilities were calibrated (recipes.evaluate.calibrate).
    """

    relevance: Relevance
    labels: list[str]
    parameters: int
    extractor: str
    explains: bool = False
    is_calibrated: bool = False


def choose(typed: Sequence[str], settings: Path = SETTINGS) -> list[str]:
    """Return the models to offer: those typed, else those of LRKD_MODELS, else those of `space.json`.

    Each is a folder, or a name on the Hub, which may end in `@revision`.

    Raises:
        ModelError: None is named, or one is neither a folder with a model nor a name on the Hub.
    """
    names = [name for name in typed if name]
    if not names:
        names = [name.strip() for name in os.environ.get("LRKD_MODELS", "").split(",") if name.strip()]
    if not names and settings.is_file():
        names = json.loads(settings.read_text(encoding="utf-8"))["models"]
    if not names:
        raise ModelError(
            "No model is named. Pass --model with a folder or a name on the Hub, set LRKD_MODELS (several: commas "
            f'between them), or write {{"models": ["owner/name"]}} into {settings.name} beside app.py.'
        )
    for name in names:
        if Path(name, "config.json").is_file():
            continue
        if Path(name).is_dir():
            raise ModelError(f"{name}: a folder without config.json, so no model is in it.")
        if not HUB_ID.fullmatch(name) or name.startswith((".", "runs/")):
            raise ModelError(
                f"{name}: no such folder, and not a name on the Hub (owner/name). In a checkout, `make demo` trains "
                "runs/demo/students/lrkd-gat-0 in ten minutes."
            )
    return list(dict.fromkeys(names))


def is_local(name: str) -> bool:
    """Whether `name` is a folder here, and not a name on the Hub."""
    return Path(name, "config.json").is_file()


def load(name: str) -> Loaded:
    """Load a model with its own pipeline, and run it once so that the first visitor does not wait.

    Raises:
        ModelError: It cannot be fetched or read, or has no `lrkd-relevance` pipeline.
    """
    from transformers import pipeline

    path, _, revision = (name, "", "") if is_local(name) else name.partition("@")
    try:
        # The owner of the Space names its models: their code is trusted as the Space's own is.
        relevance = pipeline(TASK, model=path, revision=revision or None, trust_remote_code=True)
    except KeyError as error:
        if TASK not in str(error):
            raise
        raise ModelError(
            f"{name}: carries no {TASK} pipeline. It was saved by an older version: save it again with "
            "`LRKDForSequenceClassification.from_pretrained(...).save_pretrained(...)`."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: could not be loaded. {str(error).splitlines()[0]}") from error
    # A model brings its own code, which may be older than banks and vector scaling.
    explains = getattr(relevance, "bank_file", None) is not None
    try:
        relevance({"query": "warm up", "products": ["warm up"]}, **({"explanations": 1} if explains else {}))
    except ValueError as error:  # a bank of another model
        raise ModelError(f"{name}: could not be used. {str(error).splitlines()[0]}") from error
    config = relevance.model.config
    order = sorted(range(config.num_labels), key=lambda index: -config.label_gains[index])  # ties: the model's order
    return Loaded(
        relevance=relevance,
        labels=[config.id2label[index] for index in order],
        parameters=sum(weight.numel() for weight in relevance.model.parameters()),
        extractor=config.extractor_type,
        explains=explains,
        is_calibrated=config.temperature != 1.0 or getattr(config, "class_scales", None) is not None,
    )


class Models:
    """The models by name, each loaded once."""

    def __init__(self, names: Sequence[str], load: Callable[[str], Loaded] = load) -> None:
        self.names = list(names)
        self._load = load
        self._loaded: dict[str, Loaded] = {}

    def __getitem__(self, name: str | None) -> Loaded:
        name = name or self.names[0]
        if name not in self.names:  # anything else would let a stranger run code of their choice here
            raise ModelError(f"This Space offers {', '.join(self.names)}.")
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]
