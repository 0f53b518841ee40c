"""MKD: the encoder's token vectors are to tell which spans of the pair the rationale speaks of; a CRF, dropped."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_lrkd.modeling_lrkd import LRKDModelOutput
from recipes.arguments import UserError
from recipes.student.dataset import PairDataset
from recipes.student.rivals.base import RivalCollator, RivalDataset, RivalStudent
from recipes.student.rivals.crf import LinearChainCRF
from recipes.student.rivals.tags import OUTSIDE, TAG_NAMES, Span, cited_spans, merged, token_tags
from recipes.student.votes import count_votes, vote_divergence

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from recipes.student.distill import DistillArguments

IGNORED = -100


class MKDStudent(RivalStudent):
    r"""MKD (Multi-Dimensional Knowledge Distillation, arXiv 2411.13045).

    L = CE + b · CRF-NLL(tags | Linear(H)) / tokens + a · KL(p_T || p_S)

    From the source: chains of thought are turned into token-level BIO tags, which the student recovers through a CRF;
    the teacher's scores are distilled too. Our reading: the tags of `recipes.student.rivals.tags`, aligned with the
    tokens by their offsets; the NLL is divided by the tokens of its row, so that b = `rival_weight` means the same for
    short and long titles; a pair whose rationales cite nothing adds nothing (that no span matters is more than they
    say). p_T is the vote of the pair's rationales over the classes (`predicted_label`), half a vote added to each
    class; a = `rival_score_weight`, off by default, because rationales kept by eq. 1 all vote for the gold label
    (`recipes.rationales.build --keep all` keeps the others). training.json reports how much is cited.
    """

    def prepare(
        self,
        arguments: DistillArguments,
        pairs: pd.DataFrame,
        rationales: pd.DataFrame,
        dataset: PairDataset,
        tokenizer: PreTrainedTokenizerBase,
    ) -> tuple[RivalDataset, RivalCollator]:
        """Tag the tokens (column `tags`), count the votes (`votes`), and build the CRF."""
        if not tokenizer.is_fast:
            raise UserError(
                f"encoder {arguments.encoder!r}: rival 'mkd' aligns tags by the offsets of tokens, which only a fast "
                "tokenizer knows (tokenizer.json). Save the encoder with one, or choose another."
            )
        self.tagger = nn.Linear(self.config.hidden_size, len(TAG_NAMES))
        self.crf = LinearChainCRF(len(TAG_NAMES))
        self.loss_weights = {"tagging_loss": arguments.rival_weight, "score_loss": arguments.rival_score_weight}
        spans, cited = _cited(pairs, rationales)
        encoding = tokenizer(
            pairs["query"].tolist(),
            pairs["product_title"].tolist(),
            truncation="longest_first",
            max_length=arguments.max_length,
            return_offsets_mapping=True,
        )
        tags = [token_tags(encoding, row, found) if found else [] for row, found in enumerate(spans)]
        counts = Counter(TAG_NAMES[tag].removeprefix("B-") for row in tags for tag in row if tag % 2)
        tokens = sum(map(len, tags))
        report = {
            "rows_with_tags": sum(map(bool, tags)),
            "rationales": len(cited),
            "share_of_rationales_with_a_span": round(sum(cited) / len(cited), 4),
            "share_of_tokens_tagged": round(sum(tag != OUTSIDE for row in tags for tag in row) / max(tokens, 1), 4),
            "spans": dict(counts.most_common()),
        }
        votes, none = count_votes(rationales, self.config.label2id), np.zeros(len(self.config.id2label), np.float32)
        columns: dict[str, list] = {"tags": tags, "votes": [votes.get(pair_id, none) for pair_id in pairs["pair_id"]]}
        padding = {"tags": IGNORED, "votes": 0.0}
        return RivalDataset(dataset, columns, report), RivalCollator(tokenizer, padding)

    def training_losses(  # type: ignore[override]
        self, features: LRKDModelOutput, logits: Tensor, mask: Tensor, labels: Tensor, tags: Tensor, votes: Tensor
    ) -> dict[str, Tensor]:
        """Tag the tokens of the batch."""
        length = mask.shape[1]
        tags = F.pad(tags, (0, length - tags.shape[1]), value=IGNORED)
        tagged = (tags != IGNORED).any(dim=1)
        losses = self.crf(self.tagger(features.last_hidden_state), tags.clamp(min=0), mask.bool()) / mask.sum(dim=1)
        parts = {"tagging_loss": torch.where(tagged, losses, 0.0).mean()}
        if self.loss_weights["score_loss"]:
            parts["score_loss"] = vote_divergence(votes, logits).mean()
        return parts


def _cited(pairs: pd.DataFrame, rationales: pd.DataFrame) -> tuple[list[list[Span]], list[bool]]:
    """Return the spans that each pair's rationales cite, and of each of their rationales whether it cites any."""
    from tqdm import tqdm

    texts = rationales.groupby("pair_id")["rationale"].agg(list).to_dict()
    known = pairs.reindex(columns=["pair_id", "query", "product_title", "brand", "color"])
    known = known.astype(object).where(known.notna(), None)
    spans, cited = [], []
    for pair_id, *pair in tqdm(known.itertuples(index=False), total=len(known), desc="Tagging", unit="pair"):
        query, title, brand, color = pair
        found = [cited_spans(query, title, text, brand, color) for text in texts.get(pair_id, [])]
        spans.append(merged(span for of_one in found for span in of_one))
        cited += map(bool, found)
    return spans, cited
