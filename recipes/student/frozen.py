"""Lower layers of an encoder that keep their pretrained weights, and what they say of a text kept from the first epoch.

On a CPU most of a training step is the encoder. Frozen layers need no backward pass, and they give a pair the same
vectors every epoch: so these are computed once and remembered, and later epochs run the other layers alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from modeling_lrkd.separation_lrkd import (
    SEPARABLE,
    MatchMarks,
    apart_only,
    as_encoder_output,
    read_apart,
    read_together,
    segments_of,
    through_layers,
)
from recipes.arguments import UserError


def freeze(encoder: Any, layers: int) -> None:
    """Freeze the embeddings and the first `layers` layers of an encoder, in place; dropout in them is switched off.

    Args:
        encoder: Any that has `embeddings` and a list of layers.
        layers: At least 1.

    Raises:
        UserError: The encoder has not so many layers.
    """
    stack = next(module for module in encoder.modules() if isinstance(module, nn.ModuleList))
    if layers > len(stack):
        raise UserError(f"frozen_layers: expected at most {len(stack)}, the layers of this encoder; got {layers}.")
    for module in (encoder.embeddings, *stack[:layers]):
        module.requires_grad_(False)
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0


def remember(student: Any, layers: int) -> None:
    """Keep what the frozen layers of a student give each text, for as long as it lives: 4 · hidden bytes a token.

    Done for the families `SEPARABLE`, whose layers can be run one by one; others go on as they are.

    Args:
        student: An `LRKDForSequenceClassification`, its encoder frozen by `freeze`.
        layers: How many layers are.
    """
    if student.encoder.config.model_type not in SEPARABLE:
        return
    k = student.config.separate_layers
    if student.match_marks is not None:
        layers = min(layers, k)  # above k, what the frozen layers say depends on marks that are learnt
    remembering = RememberingForward(student.encoder, layers, k, student.match_marks, student.config.query_layers)
    if k:
        student._encode_apart = remembering
    else:
        student.encoder.forward = remembering


class RememberingForward:
    """The forward pass of an encoder whose first layers are frozen: a text goes through these once.

    A text is known by its tokens without the padding, so it is found again in any batch.

    Args:
        encoder: See `freeze`.
        layers: How many of its layers are frozen.
        separate_layers: How many of its layers read query and product apart (`LRKDConfig.separate_layers`).
        match_marks: Of the student; then `layers` is at most `separate_layers`.
        query_layers: How many of its layers are for the query's tokens only (`LRKDConfig.query_layers`).
    """

    def __init__(
        self,
        encoder: Any,
        layers: int,
        separate_layers: int = 0,
        match_marks: MatchMarks | None = None,
        query_layers: int = 0,
    ) -> None:
        self.encoder = encoder
        self.layers = layers
        self.separate_layers = separate_layers
        self.match_marks = match_marks
        self.query_layers = query_layers
        self.remembered: dict[bytes, Tensor] = {}  # tokens -> (tokens, hidden)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        mask: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """Return what the encoder's own forward returns. All are `(batch, length)`, padded on the right."""
        given = attention_mask if mask is None else mask
        mask = torch.ones_like(input_ids, dtype=torch.bool) if given is None else given.bool()
        if self.separate_layers:
            types = segments_of(self.encoder.config, input_ids, token_type_ids)
        else:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        lengths = mask.sum(dim=1).tolist()
        keys = [
            torch.stack([ids[:length], kinds[:length]]).numpy(force=True).tobytes()
            for ids, kinds, length in zip(input_ids, types, lengths, strict=True)
        ]
        unknown = [row for row, key in enumerate(keys) if key not in self.remembered]
        if unknown:
            states = self._frozen(input_ids[unknown], mask[unknown], types[unknown])
            for row, state in zip(unknown, states, strict=True):
                self.remembered[keys[row]] = state[: lengths[row]].clone()  # not a view of the padded batch
        hidden = pad_sequence([self.remembered[key] for key in keys], batch_first=True)  # (batch, longest, hidden)
        hidden = nn.functional.pad(hidden, (0, 0, 0, input_ids.shape[1] - hidden.shape[1]))
        meeting = max(self.layers, self.separate_layers)
        hidden = self._through(self.layers, meeting, hidden, mask, types)
        if self.match_marks is not None:
            hidden = self.match_marks(hidden, input_ids, types, mask)
        output = as_encoder_output(self.encoder, (self._through(meeting, None, hidden, mask, types),))
        output.hidden_states = None
        return output

    @torch.no_grad()
    def _frozen(self, input_ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        if self.separate_layers:
            embedded = read_apart(self.encoder, 0, types, mask, input_ids)[-1]
        else:
            embedded = self.encoder.embeddings(input_ids=input_ids, token_type_ids=types)
        return self._through(0, self.layers, embedded, mask, types)

    def _through(self, first: int, last: int | None, hidden: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        """Run layers `first` to `last`, without it, each as `LRKDModel` does."""
        layers = len(self.encoder.encoder.layer)
        last = layers if last is None else last

        def within(start: int, end: int) -> slice:
            return slice(max(first, start), min(last, end))

        k, query = self.separate_layers, layers - self.query_layers
        if first < k:
            hidden = through_layers(self.encoder, within(0, k), hidden, apart_only(types, mask))[-1]
        hidden = read_together(self.encoder, within(k, query), hidden, mask)[-1]
        return read_together(self.encoder, within(query, layers), hidden, mask, kept=types == 1)[-1]
