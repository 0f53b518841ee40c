"""CED-KD: an auxiliary decoder reconstructs the rationale from the encoder's token vectors, and is dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_lrkd.modeling_lrkd import LRKDModelOutput
from recipes.student.dataset import PairDataset
from recipes.student.rivals.base import RivalCollator, RivalDataset, RivalStudent, joined_texts

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from recipes.student.distill import DistillArguments

IGNORED = -100


class RationaleDecoder(nn.Module):
    """Causal transformer decoder over a rationale, with cross-attention to the pair's token vectors H.

    It has no token embeddings of its own: those of the encoder go in and, transposed, out. What can come out are the
    tokens that some training rationale has: the others could only be unlearnt, and the multiplication with the whole
    vocabulary would cost several times the encoder.

    Args:
        vocabulary: Ids that can come out, ascending, `(tokens,)`.
        hidden_size: Of the encoder.
        num_heads: Attention heads, of itself and to H.
        num_layers: Decoder layers.
        max_length: Longest rationale in tokens.
        dropout: In every layer.
    """

    vocabulary: Tensor

    def __init__(
        self, vocabulary: Tensor, hidden_size: int, num_heads: int, num_layers: int, max_length: int, dropout: float
    ) -> None:
        super().__init__()
        self.register_buffer("vocabulary", vocabulary, persistent=False)
        self.positions = nn.Embedding(max_length, hidden_size)
        nn.init.normal_(self.positions.weight, std=0.02)
        layer = nn.TransformerDecoderLayer(
            hidden_size, num_heads, 4 * hidden_size, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, num_layers, norm=nn.LayerNorm(hidden_size))

    def forward(self, rationale_ids: Tensor, embeddings: Tensor, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Return −log p(r_t | r_<t, H) for t = 1, 2, ..., 0 at padding, `(batch, rationale - 1)`.

        Args:
            rationale_ids: Tokens r_0 (where decoding starts), r_1, ..., padded with -100, `(batch, rationale)`.
            embeddings: Token embeddings, `(vocabulary, hidden)`.
            hidden_states: H, `(batch, length, hidden)`.
            mask: 1 for the tokens of H, 0 for padding, `(batch, length)`.
        """
        inputs, targets = rationale_ids[:, :-1], rationale_ids[:, 1:]
        length = inputs.shape[1]
        vectors = F.embedding(inputs.clamp(min=0), embeddings) + self.positions.weight[:length]
        decoded = self.layers(
            vectors,
            hidden_states,
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(length, vectors.device, vectors.dtype),
            tgt_is_causal=True,
            memory_key_padding_mask=~mask.bool(),
        )
        counted = targets != IGNORED
        logits = decoded[counted] @ embeddings[self.vocabulary].T  # (tokens of all rationales, vocabulary)
        expected = torch.searchsorted(self.vocabulary, targets[counted])
        losses = F.cross_entropy(logits.float(), expected, reduction="none")
        return torch.zeros(targets.shape, device=losses.device).masked_scatter(counted, losses)


class CEDKDStudent(RivalStudent):
    r"""CED-KD (Cross-Encoder-Decoder Knowledge Distillation, COLING 2025 industry track).

    L = CE + β · mean_t −log p(r_t | r_<t, H)

    From the source: a cross-encoder with an auxiliary decoder that reconstructs the rationale while training. Our
    reading: one or two causal layers (`rival_layers`), cross-attention to H without its padding, token embeddings tied
    with the encoder's input embeddings in and out (out: those of the tokens that occur), the encoder's tokenizer, β =
    `rival_weight` in {0.1, 0.5, 1}. A rationale of more than `rival_length` tokens is cut there; training.json says how
    many were.
    """

    def prepare(
        self,
        arguments: DistillArguments,
        pairs: pd.DataFrame,
        rationales: pd.DataFrame,
        dataset: PairDataset,
        tokenizer: PreTrainedTokenizerBase,
    ) -> tuple[RivalDataset, RivalCollator]:
        """Tokenise the rationales (column `rationale_ids`), and build the decoder."""
        self.loss_weights = {"reconstruction_loss": arguments.rival_weight}
        texts = joined_texts(rationales)
        # Between the encoder's own special tokens: the first is where decoding starts, the last what ends it.
        encoded = {
            pair_id: tokenizer(texts[pair_id], verbose=False)["input_ids"]
            for pair_id in pairs["pair_id"]
            if pair_id in texts
        }
        vocabulary = sorted({token for ids in encoded.values() for token in ids})
        encoder = self.config.encoder_config
        self.decoder = RationaleDecoder(
            torch.tensor(vocabulary),
            encoder.hidden_size,
            encoder.num_attention_heads,
            arguments.rival_layers,
            arguments.rival_length,
            arguments.classifier_dropout,
        )
        cut = sum(len(ids) > arguments.rival_length for ids in encoded.values())
        report = {
            "rows_with_rationale": len(encoded),
            "share_cut": round(cut / len(encoded), 4),
            "vocabulary": len(vocabulary),
            "mean_tokens": round(sum(map(len, encoded.values())) / len(encoded), 1),
        }
        columns = {"rationale_ids": [encoded.get(name, [])[: arguments.rival_length] for name in pairs["pair_id"]]}
        return RivalDataset(dataset, columns, report), RivalCollator(tokenizer, {"rationale_ids": IGNORED})

    def training_losses(  # type: ignore[override]
        self, features: LRKDModelOutput, logits: Tensor, mask: Tensor, labels: Tensor, rationale_ids: Tensor
    ) -> dict[str, Tensor]:
        """Decode the rationales of the batch."""
        if rationale_ids.shape[1] < 2:  # a batch without a rationale
            rationale_ids = F.pad(rationale_ids, (0, 1), value=IGNORED)
        embeddings = self.get_input_embeddings().weight
        losses = self.decoder(rationale_ids, embeddings, features.last_hidden_state, mask)
        tokens = (rationale_ids[:, 1:] != IGNORED).sum(dim=1)
        return {"reconstruction_loss": (losses.sum(dim=1) / tokens.clamp(min=1)).mean()}
