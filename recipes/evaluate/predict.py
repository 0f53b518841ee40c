"""Load a sequence classifier and predict: what `run` does with a checkpoint, for others to reuse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.arguments import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from recipes.schemas import LabelSchema


def load(
    name: str,
    schema: LabelSchema,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "float32",
    device: str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint folder or Hub id and its tokenizer, the label names checked before the weights are read.

    Raises:
        UserError: The checkpoint cannot be read, lacks weights, or classifies into other labels than the schema.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    import modeling_lrkd  # noqa: F401  registers the lrkd classes

    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **where)
        schema_order(config.id2label, schema, name)
        if config.num_labels != len(config.id2label):
            raise ValueError("it was saved with ranking_view: set `ranking_view` to false in its config.json.")
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **where
        )
    except (OSError, ValueError, SafetensorError) as error:
        message = " ".join(str(error).split())
        missing = "" if Path(name).is_dir() else " (no such folder here, so it was looked for on the Hub)"
        raise UserError(f"{name}: not a loadable sequence classifier{missing}: {message}") from None
    if loading["missing_keys"]:
        raise UserError(
            f"{name}: the weights lack {', '.join(sorted(loading['missing_keys']))}, which would be random. "
            "Pass a checkpoint that was trained and saved as a sequence classifier."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device), tokenizer
    except (RuntimeError, AssertionError) as error:  # unknown name; built without CUDA
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None


def schema_order(id2label: Mapping[int, str], schema: LabelSchema, source: str) -> list[int]:
    """Return, for each class of the schema, the index of its logit; names are compared, not positions.

    Raises:
        UserError: The model's labels are not exactly the classes of the schema.
    """
    logit = {schema.canonical(name): index for index, name in id2label.items()}
    if set(logit) != set(schema.names) or len(id2label) != len(schema.names):
        raise UserError(
            f"{source}: classifies into {', '.join(id2label.values())}; the label schema {schema.name!r} has "
            f"{', '.join(schema.names)}. Pass the schema that it was trained with (--labels), or correct id2label in "
            "its config.json."
        )
    return [logit[name] for name in schema.names]


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    frame: pd.DataFrame,
    batch_size: int = 64,
    max_length: int = 128,
    progress: bool = True,
) -> NDArray[np.float32]:
    """Return the class probabilities `(rows, classes)`, float32, rows as in `frame`, columns as the model's logits.

    Pairs are batched by token length, longest first: little padding, and too large a batch fails at once.

    Args:
        model: Any sequence classifier; scored on the device and in the precision that it is in.
        tokenizer: Its tokenizer.
        frame: Columns `pair_id`, `query` and `product_title`.
        batch_size: Pairs a batch.
        max_length: Tokens of query and title together; the longer of the two is cut first.
        progress: Show a progress bar.

    Raises:
        UserError: The model gives NaN or infinite logits.
    """
    import numpy as np
    import torch
    from tqdm import tqdm
    from transformers import DataCollatorWithPadding

    encoded = tokenizer(
        frame["query"].tolist(), frame["product_title"].tolist(), truncation=True, max_length=max_length
    )
    order = np.argsort([-len(tokens) for tokens in encoded["input_ids"]], kind="stable")
    pad = DataCollatorWithPadding(tokenizer)
    probabilities = np.empty((len(frame), model.config.num_labels), dtype=np.float32)
    was_training = model.training
    model.eval()
    with torch.inference_mode(), tqdm(total=len(frame), unit="pair", desc="predict", disable=not progress) as bar:
        for start in range(0, len(frame), batch_size):
            rows = order[start : start + batch_size]
            batch = pad([{name: values[row] for name, values in encoded.items()} for row in rows])
            logits = model(**batch.to(model.device)).logits.float()
            finite = logits.isfinite().all(dim=1)
            if not finite.all():
                row = rows[int((~finite).nonzero()[0])]
                raise UserError(
                    f"pair {frame['pair_id'].iloc[row]!r}: the model's logits are NaN or infinite. "
                    "Its weights are damaged or its training diverged; try --dtype float32, or another checkpoint."
                )
            probabilities[rows] = logits.softmax(dim=1).cpu().numpy()
            bar.update(len(rows))
    model.train(was_training)
    return probabilities
