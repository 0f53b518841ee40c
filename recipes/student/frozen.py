"""Lower layers of an encoder that keep their pretrained weights, and what they say of a text kept from the first epoch.

On a CPU most of a training step is the encoder. Frozen layers need no backward pass, and they give a pair the same
vectors every epoch: so these are computed once and remembered, and later epochs run the other layers alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from modeling_lrkd.separation_lrkd import SEPARABLE, as_encoder_output, through_layers
from recipes.arguments import UserError


def freeze(encoder: Any, layers: int, remember: bool) -> None:
    """Freeze the embeddings and the first `layers` layers of an encoder, in place; dropout in them is switched off.

    Args:
        encoder: Any that has `embeddings` and a list of layers.
        layers: At least 1.
        remember: Keep what the frozen layers give each text, for as long as the encoder lives: 4 · hidden bytes a
            token in float32. Done for the families `SEPARABLE`, whose layers can be run one by one.

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
    if remember and encoder.config.model_type in SEPARABLE:
        encoder.forward = RememberingForward(encoder, layers)


class RememberingForward:
    """The forward pass of an encoder whose first layers are frozen: a text goes through these once.

    A text is known by its tokens without the padding, so it is found again in any batch.

    Args:
        encoder: See `freeze`.
        layers: How many of its layers are frozen.
    """

    def __init__(self, encoder: Any, layers: int) -> None:
        self.encoder = encoder
        self.layers = layers
        self.remembered: dict[bytes, Tensor] = {}  # tokens -> (tokens, hidden)

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Any:
        """Return what the encoder's own forward returns. All three are `(batch, length)`, padded on the right."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
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
        allowed = mask.bool()[:, None, None, :]
        upper = through_layers(self.encoder, slice(self.layers, None), hidden, allowed)
        output = as_encoder_output(self.encoder, upper)
        output.hidden_states = None
        return output

    @torch.no_grad()
    def _frozen(self, input_ids: Tensor, mask: Tensor, token_type_ids: Tensor) -> Tensor:
        embedded = self.encoder.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        return through_layers(self.encoder, slice(0, self.layers), embedded, mask.bool()[:, None, None, :])[-1]
