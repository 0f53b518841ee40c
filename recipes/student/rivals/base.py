"""What the rivals share: a plain cross-encoder with training-only parts, and the data that only training sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from modeling_lrkd import LRKDForSequenceClassification
from modeling_lrkd.modeling_lrkd import LRKDModelOutput, LRKDSequenceClassifierOutput
from recipes.student.dataset import PairCollator, PairDataset

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from recipes.student.distill import DistillArguments


@dataclass
class RivalOutput(LRKDSequenceClassifierOutput):
    """Output of a `RivalStudent`; each further part of the loss is a scalar before its weight, None where not used.

    Attributes:
        reconstruction_loss: CED-KD's, of the decoded rationale.
        tagging_loss: MKD's, of the BIO tags.
        score_loss: MKD's, KL to the teacher's votes.
        reasoning_loss: CRSD's cross-entropy with the rationale in the input.
        contrastive_loss: CRSD's InfoNCE.
        agreement_loss: CRSD's KL between the two inputs.
    """

    reconstruction_loss: Tensor | None = None
    tagging_loss: Tensor | None = None
    score_loss: Tensor | None = None
    reasoning_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    agreement_loss: Tensor | None = None


class RivalStudent(LRKDForSequenceClassification):
    """A plain cross-encoder (`extractor_type` none) that learns from rationales with parts that are not deployed.

    The parts are modules of the student while it trains, so that checkpoints, resumption and several processes treat
    them as they treat the rest; `deployed` leaves them behind. Every part of the loss is a mean over the whole batch,
    in which a pair without a rationale counts as a row and adds nothing, as in the guidance of LRKD: gradient
    accumulation gives the same sum as one large batch (but for CRSD's negatives, which are the batch's).
    """

    _auto_class = None  # only what is deployed carries code with it
    loss_weights: Mapping[str, float]

    def prepare(
        self,
        arguments: DistillArguments,
        pairs: pd.DataFrame,
        rationales: pd.DataFrame,
        dataset: PairDataset,
        tokenizer: PreTrainedTokenizerBase,
    ) -> tuple[RivalDataset, RivalCollator]:
        """Build the training-only parts and columns.

        Args:
            arguments: The run's options; those that begin with `rival_` are for here.
            pairs: Training pairs, labels by class name.
            rationales: Contract `RATIONALES`.
            dataset: `pairs`, tokenised.
            tokenizer: Tokenizer of the encoder.
        """
        raise NotImplementedError

    def training_losses(
        self, features: LRKDModelOutput, logits: Tensor, mask: Tensor, labels: Tensor, **columns: Tensor
    ) -> dict[str, Tensor]:
        """Return the parts of the loss that `loss_weights` weighs, beside the cross-entropy.

        Args:
            features: `last_hidden_state` H `(batch, length, hidden)` and `pooler_output` h_cls `(batch, hidden)`.
            logits: `(batch, labels)`.
            mask: Attention mask, `(batch, length)`.
            labels: `(batch,)`.
            columns: What `prepare` added to the batch.
        """
        raise NotImplementedError

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **columns: Tensor,
    ) -> RivalOutput:
        """Classify; with labels and the columns of `prepare`, compute the rival's loss as well."""
        features = self._encode(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, inputs_embeds=None
        )
        logits = self.classifier(self.dropout(features.pooler_output))
        if labels is None:
            return RivalOutput(logits=logits)
        classification_loss = F.cross_entropy(logits.float(), labels)
        parts = self.training_losses(features, logits, attention_mask, labels, **columns) if columns else {}
        return RivalOutput(
            loss=classification_loss + sum(self.loss_weights[name] * part for name, part in parts.items()),
            logits=logits,
            classification_loss=classification_loss,
            **parts,
        )

    def deployed(self) -> LRKDForSequenceClassification:
        """Return the plain cross-encoder without the training-only parts, its weights the same."""
        plain = LRKDForSequenceClassification(self.config).to(self.dtype)
        state = self.state_dict()
        plain.load_state_dict({name: state[name] for name in plain.state_dict()})
        return plain.eval()


class RivalDataset(Dataset[dict[str, Any]]):
    """The items of a `PairDataset`, each with what the rival adds.

    Args:
        pairs: The tokenised pairs.
        columns: Name -> a list of numbers for each pair.
        report: What training.json says of the columns.
    """

    def __init__(
        self, pairs: PairDataset, columns: Mapping[str, Sequence[Sequence[float]]], report: dict[str, Any]
    ) -> None:
        self.pairs = pairs
        self.columns = columns
        self.report = report
        self.lengths = pairs.lengths

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.pairs.rows[index])
        return self.pairs[index] | {name: values[row] for name, values in self.columns.items()}


class RivalCollator(PairCollator):
    """Pad the pairs as `PairCollator` does, and each column of the rival on the right with a value of its own.

    Two pairs, the second without a rationale, `padding={"rationale_ids": -100}`:

    ```
    {"input_ids": ..., "labels": ..., "rationale_ids": [[101, 7, 102], [-100, -100, -100]]}
    ```

    Args:
        tokenizer: Tokenizer of the encoder.
        padding: Name of a column -> value; a float makes the column float32, an int int64.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, padding: Mapping[str, float]) -> None:
        super().__init__(tokenizer)
        self.padding = padding

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return tensors of `(batch, length)` and `(batch,)`; a column is at least one wide."""
        batch = super().__call__(
            [{name: value for name, value in item.items() if name not in self.padding} for item in items]
        )
        for name, value in self.padding.items():
            if name not in items[0]:  # validation
                continue
            width = max(1, *(len(item[name]) for item in items))
            rows = [[*item[name], *[value] * (width - len(item[name]))] for item in items]
            batch[name] = torch.tensor(rows, dtype=torch.float32 if isinstance(value, float) else torch.int64)
        return batch


def joined_texts(rationales: pd.DataFrame) -> dict[str, str]:
    """Join the rationales of each pair in the order of the file: `pair_id` -> text.

    The sources have one rationale a pair. With several perspectives in the file, CED-KD and CRSD read all of them, one
    after the other (our reading).
    """
    return rationales.groupby("pair_id", sort=False)["rationale"].agg(" ".join).to_dict()
