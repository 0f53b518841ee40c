"""The vectors by which a student knows a pair: its projected latent reasoning and h_cls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Latents:
    """What `encode` returns; rows as in its frame.

    Attributes:
        projected: Projected latent reasoning `(rows, reasoning_dim)`, float32.
        pooled: h_cls `(rows, hidden)`, float32.
        probabilities: Class probabilities `(rows, classes)`, float32, in the order of the logits.
    """

    projected: NDArray[np.float32]
    pooled: NDArray[np.float32]
    probabilities: NDArray[np.float32]


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    frame: pd.DataFrame,
    batch_size: int = 64,
    max_length: int = 128,
    progress: str = "encode",
) -> Latents:
    """Encode pairs with a student that has latent reasoning.

    Args:
        model: An `LRKDForSequenceClassification`, of an `extractor_type` other than `none`.
        tokenizer: Its tokenizer.
        frame: Columns `query` and `product_title`.
        batch_size: Pairs a batch.
        max_length: Tokens of query and title together; the longer of the two is cut first.
        progress: Name of the progress bar.
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
    config = model.config
    projected = np.empty((len(frame), config.reasoning_dim), dtype=np.float32)
    pooled = np.empty((len(frame), config.hidden_size), dtype=np.float32)
    probabilities = np.empty((len(frame), config.num_labels), dtype=np.float32)
    seen: list[torch.Tensor] = []  # [h_cls ; r_qp], `(batch, hidden + latent)`
    watch = model.classifier.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), tqdm(total=len(frame), unit="pair", desc=progress) as bar:
            for start in range(0, len(frame), batch_size):
                rows = order[start : start + batch_size]
                batch = pad([{name: values[row] for name, values in encoded.items()} for row in rows])
                output = model(**batch.to(model.device))
                projected[rows] = output.projected_reasoning.float().cpu().numpy()
                pooled[rows] = seen.pop()[:, : config.hidden_size].float().cpu().numpy()
                probabilities[rows] = output.logits.float().softmax(dim=1).cpu().numpy()
                bar.update(len(rows))
    finally:
        watch.remove()
        model.train(was_training)
    return Latents(projected, pooled, probabilities)
