"""CRSD: the student that also reads the rationale teaches the student that does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from modeling_lrkd.modeling_lrkd import LRKDModelOutput
from recipes.arguments import UserError
from recipes.student.dataset import PairDataset, positions_of
from recipes.student.rivals.base import RivalCollator, RivalDataset, RivalStudent, joined_texts

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from recipes.student.distill import DistillArguments


def info_nce(standard: Tensor, reasoning: Tensor, temperature: float, labels: Tensor | None = None) -> Tensor:
    """InfoNCE of each row against its own reasoning, the other rows' as negatives.

    −log( exp(cos(s_i, t_i) / τ) / Σ_j exp(cos(s_i, t_j) / τ) ), no gradient into t.

    Args:
        standard: s, `(rows, hidden)`.
        reasoning: t, `(rows, hidden)`.
        temperature: τ.
        labels: Classes, `(rows,)`: a row of the same class is no negative. A row that then has none gives 0.

    Returns:
        `(rows,)`.

    >>> s, t = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    >>> info_nce(s, t, temperature=1.0)  # cosines [[1, 1], [0, 0]]
    tensor([0.6931, 0.6931])
    >>> info_nce(s, t, temperature=1.0, labels=torch.tensor([3, 3]))
    tensor([-0., -0.])
    """
    similarity = F.normalize(standard.float(), dim=1) @ F.normalize(reasoning.detach().float(), dim=1).T / temperature
    if labels is not None:
        same = labels.unsqueeze(1) == labels
        similarity = similarity.masked_fill(same.fill_diagonal_(False), -torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(similarity), device=similarity.device), reduction="none")


class CRSDStudent(RivalStudent):
    r"""CRSD (Contrastive Reasoning Self-Distillation, arXiv 2510.11056).

    L = CE(h_s) + CE(h_t) + λ · InfoNCE(h_s, stop-gradient h_t) + γ · KL(stop-gradient p_t || p_s),
    h_s = CLS(q; p), h_t = CLS(q; p; rationale), same weights

    From the source: the same model under a standard and a reasoning-augmented input is student and teacher, aligned by
    a contrastive loss; no rationale at inference. Our reading, as weights, temperature and negatives are not stated:
    CE on both inputs, λ = `rival_weight`, τ = `rival_temperature` 0.05, the batch's other pairs as negatives, those of
    the same class only without `rival_mask_same_label`, γ = `rival_score_weight`, off by default. The rationale is
    appended to the pair's tokens as a further segment, cut to `rival_length` tokens; h is what the classifier reads.
    """

    temperature: float
    mask_same_label: bool

    def prepare(
        self,
        arguments: DistillArguments,
        pairs: pd.DataFrame,
        rationales: pd.DataFrame,
        dataset: PairDataset,
        tokenizer: PreTrainedTokenizerBase,
    ) -> tuple[RivalDataset, RivalCollator]:
        """Append the rationales to the pairs (columns `reasoning_*`); there are no training-only parts."""
        limit = positions_of(self.encoder)
        if limit is not None and arguments.max_length + arguments.rival_length > limit:
            raise UserError(
                f"rival_length {arguments.rival_length}: with max_length {arguments.max_length} a pair and its "
                f"rationale are longer than the {limit} positions of the encoder. Make one of them smaller."
            )
        self.temperature, self.mask_same_label = arguments.rival_temperature, arguments.rival_mask_same_label
        self.loss_weights = {
            "reasoning_loss": 1.0,
            "contrastive_loss": arguments.rival_weight,
            "agreement_loss": arguments.rival_score_weight,
        }
        texts = joined_texts(rationales)
        columns: dict[str, list[list[int]]] = {f"reasoning_{name}": [] for name in (*dataset.encoded, "attention_mask")}
        found = cut = 0
        for row, pair_id in enumerate(pairs["pair_id"]):
            extra: list[int] = []
            if pair_id in texts:
                ids = tokenizer(texts[pair_id], add_special_tokens=False, verbose=False)["input_ids"]
                found, cut = found + 1, cut + (len(ids) >= arguments.rival_length)
                extra = [*ids[: arguments.rival_length - 1], tokenizer.sep_token_id]
            for name, values in dataset.encoded.items():
                # The rationale continues the product's segment: encoders know no third one.
                appended = extra if name == "input_ids" else [values[row][-1]] * len(extra)
                columns[f"reasoning_{name}"].append([*values[row], *appended] if extra else [])
            columns["reasoning_attention_mask"].append([1] * len(columns["reasoning_input_ids"][-1]))
        padding = dict.fromkeys(columns, 0) | {"reasoning_input_ids": tokenizer.pad_token_id}
        report = {"rows_with_rationale": found, "share_cut": round(cut / found, 4)}
        return RivalDataset(dataset, columns, report), RivalCollator(tokenizer, padding)

    def training_losses(  # type: ignore[override]
        self,
        features: LRKDModelOutput,
        logits: Tensor,
        mask: Tensor,
        labels: Tensor,
        reasoning_input_ids: Tensor,
        reasoning_attention_mask: Tensor,
        reasoning_token_type_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Read the rows that have a rationale once more, with it."""
        rows = reasoning_attention_mask.any(dim=1)
        if not rows.any():
            return {}
        types = None if reasoning_token_type_ids is None else reasoning_token_type_ids[rows]
        reasoning = self._encode(
            input_ids=reasoning_input_ids[rows],
            attention_mask=reasoning_attention_mask[rows],
            token_type_ids=types,
            inputs_embeds=None,
        ).pooler_output
        reasoning_logits = self.classifier(self.dropout(reasoning)).float()
        contrastive = info_nce(
            features.pooler_output[rows], reasoning, self.temperature, labels[rows] if self.mask_same_label else None
        )
        losses = {
            "reasoning_loss": F.cross_entropy(reasoning_logits, labels[rows], reduction="sum") / len(labels),
            "contrastive_loss": contrastive.sum() / len(labels),
        }
        if self.loss_weights["agreement_loss"]:
            student, teacher = (
                F.log_softmax(logits[rows].float(), dim=1),
                F.log_softmax(reasoning_logits.detach(), dim=1),
            )
            losses["agreement_loss"] = F.kl_div(student, teacher, reduction="sum", log_target=True) / len(labels)
        return losses
