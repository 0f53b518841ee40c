"""Lower layers that read query and product apart, upper layers that read them together.

After PreTTR (MacAvaney et al., SIGIR 2020) and DeFormer (Cao et al., ACL 2020): until layer k no token sees one of the
other text, so a product's vectors after layer k do not depend on the query and can be made once, before there is one.
The query's text is `[CLS] query [SEP]`, the product's what follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

# Encoders of one plan: `embeddings`, `encoder.layer`, absolute positions, full attention in every layer.
SEPARABLE = ("bert", "roberta", "xlm-roberta")
# Encoders that number the tokens from behind the padding's id: the positions before it are no token's.
AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "xmod", "mpnet")


def first_position(encoder_config: Any) -> int:
    """Return the position of the first token."""
    return encoder_config.pad_token_id + 1 if encoder_config.model_type in AFTER_PADDING else 0


def check_separable(encoder_config: Any, separate_layers: int) -> None:
    """Check that the first `separate_layers` layers of such an encoder can read query and product apart.

    Raises:
        ValueError: The encoder is of another family, or has fewer layers.
    """
    if isinstance(separate_layers, bool) or not isinstance(separate_layers, int) or separate_layers < 0:
        raise ValueError(f"separate_layers: expected a whole number, 0 or more, got {separate_layers!r}.")
    if separate_layers == 0:
        return
    if encoder_config.model_type not in SEPARABLE:
        raise ValueError(
            f"separate_layers: expected 0 for an encoder of the family {encoder_config.model_type!r}, got "
            f"{separate_layers}; it is supported for {', '.join(SEPARABLE)}."
        )
    if getattr(encoder_config, "position_embedding_type", "absolute") != "absolute":  # an option of transformers 4
        raise ValueError("separate_layers: expected an encoder with absolute positions; this one's are relative.")
    if separate_layers > encoder_config.num_hidden_layers:
        raise ValueError(
            f"separate_layers: the encoder has {encoder_config.num_hidden_layers} layers, got {separate_layers}."
        )


def check_query_layers(encoder_config: Any, separate_layers: int, query_layers: int) -> None:
    """Check that the last `query_layers` layers can be for the query's tokens only.

    Raises:
        ValueError: They are more than the layers that read query and product together, or all do.
    """
    if isinstance(query_layers, bool) or not isinstance(query_layers, int) or query_layers < 0:
        raise ValueError(f"query_layers: expected a whole number, 0 or more, got {query_layers!r}.")
    if query_layers and separate_layers == 0:
        raise ValueError("query_layers: are for texts that are read apart; set separate_layers to 1 or more.")
    if query_layers and query_layers > encoder_config.num_hidden_layers - separate_layers:
        raise ValueError(
            f"query_layers: the encoder has {encoder_config.num_hidden_layers} layers, of which {separate_layers} read "
            f"query and product apart; got {query_layers}."
        )


def segments_of(encoder_config: Any, input_ids: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
    """Tell query from product: 0 or 1 for each token, `(batch, length)`.

    By the token types where the encoder knows two of them; else the query ends with the first separator.

    Raises:
        ValueError: There is nothing to tell them by.
    """
    if token_type_ids is not None and encoder_config.type_vocab_size > 1:
        return token_type_ids
    separator = encoder_config.eos_token_id
    if input_ids is None or separator is None:
        raise ValueError(
            "separate_layers: query and product are told apart by token_type_ids, or by the separator in input_ids "
            f"for encoders that have an eos_token_id. Pass {'input_ids' if separator else 'token_type_ids'}."
        )
    is_separator = input_ids == separator
    return ((is_separator.cumsum(dim=1) - is_separator.long()) > 0).long()


def read_apart(
    encoder: Any,
    layers: int,
    segments: Tensor,
    mask: Tensor,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Embed tokens, and let the first `layers` layers read each segment by itself.

    Args:
        encoder: A model of one of the families `SEPARABLE`.
        layers: k.
        segments: 0 for the query's tokens, 1 for the product's, `(batch, length)`. A row may hold one of them only.
        mask: True for tokens, False for padding, wherever it stands, `(batch, length)`.
        input_ids: Token ids, `(batch, length)`.
        inputs_embeds: Or token embeddings, `(batch, length, hidden)`.
        position_ids: By default each segment counts its own tokens from the first position.

    Returns:
        The embeddings and each layer's output, `(batch, length, hidden)` each: k + 1 of them.
    """
    if position_ids is None:
        of_query, of_product = mask & (segments == 0), mask & (segments == 1)
        positions = torch.where(segments == 0, of_query.cumsum(dim=1), of_product.cumsum(dim=1)) - 1
        position_ids = positions.clamp(min=0) + first_position(encoder.config)
    states = encoder.embeddings(
        input_ids=input_ids,
        token_type_ids=segments if encoder.config.type_vocab_size > 1 else torch.zeros_like(segments),
        position_ids=position_ids,
        inputs_embeds=inputs_embeds,
    )
    return through_layers(encoder, slice(0, layers), states, apart_only(segments, mask))


def apart_only(segments: Tensor, mask: Tensor) -> Tensor:
    """Return True where a token may look while query and product are read apart: `(batch, 1, from, to)`.

    Args:
        segments: As in `read_apart`.
        mask: As there.
    """
    same = segments.unsqueeze(2) == segments.unsqueeze(1)  # (batch, from, to)
    # What padding reads does not matter, but it has to read something: nothing gives NaN.
    allowed = mask.unsqueeze(1) & (same | ~mask.unsqueeze(2))
    return allowed.unsqueeze(1)


class MatchMarks(nn.Module):
    r"""A learnt vector on each token that the other text has too, added where query and product first meet.

    .. math:: h_i \leftarrow h_i + v_{s_i} \text{ if } \exists j: x_j = x_i,\ s_j \ne s_i

    for token ids x and segments s. Layers that read both texts find the words they share in their first layers;
    texts read apart come too late for that, and this tells them. After MarkedBERT's exact-match markers (Boualili,
    Moreno & Boughanem, SIGIR 2020), as a vector instead of tokens, so that a product is still encoded without its
    query. The separators that every pair shares are not marked.

    Args:
        hidden_size: Of the token vectors.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, hidden_size))  # on the query's tokens, on the product's

    def forward(self, hidden_states: Tensor, input_ids: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        """Mark them.

        Args:
            hidden_states: What `read_apart` returned last, `(batch, length, hidden)`.
            input_ids: Token ids, `(batch, length)`.
            segments: 0 for the query's tokens, 1 for the product's, `(batch, length)`.
            mask: True for tokens, False for padding, `(batch, length)`.
        """
        of_query = mask & (segments == 0)
        last = torch.where(of_query, torch.arange(mask.shape[1], device=mask.device), -1).amax(dim=1, keepdim=True)
        separator = input_ids.gather(1, last.clamp(min=0))  # what the query ends with, (batch, 1)
        word = mask & (input_ids != separator)
        equal = input_ids.unsqueeze(2) == input_ids.unsqueeze(1)  # (batch, token, other)
        across = (segments.unsqueeze(2) != segments.unsqueeze(1)) & word.unsqueeze(1)
        marked = word & (equal & across).any(dim=2)
        return hidden_states + marked.unsqueeze(2) * self.weight[segments]


def read_together(
    encoder: Any, which: slice, hidden_states: Tensor, mask: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Let layers read query and product together.

    Args:
        encoder: As in `read_apart`.
        which: Layers, by number: those from k on, or some of them.
        hidden_states: The last result of `read_apart`, `(batch, length, hidden)`; the tokens in any order.
        mask: `(batch, length)`.
        kept: True for tokens that are read and not updated, `(batch, length)`; by default none.

    Returns:
        `hidden_states` and each layer's output, `(batch, length, hidden)` each.
    """
    return through_layers(encoder, which, hidden_states, mask[:, None, None, :], kept)


def read_by_query(encoder: Any, which: slice, query: Tensor, product: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """What `read_together` gives if the product's tokens are kept, without computing what is not.

    After the interaction blocks of MORES (Gao, Dai & Callan, WWW 2021). Of a product's tokens a layer computes keys and
    values, a sixth of what it does for the query's, and there are several times as many of them. For inference: what
    wraps a whole layer in training, as sharding does, is passed by.

    Args:
        encoder: As in `read_apart`.
        which: As in `read_together`.
        query: The query's tokens, `(batch, query length, hidden)`.
        product: The product's, `(batch, product length, hidden)`.
        mask: True for tokens, False for padding, `(batch, query length + product length)`.

    Returns:
        As `read_together`.
    """
    states = [torch.cat([query, product], dim=1)]
    for layer in encoder.encoder.layer[which]:
        attention = layer.attention.self
        queries, keys, values = (
            linear(vectors).unflatten(2, (-1, attention.attention_head_size)).transpose(1, 2)
            for linear, vectors in (
                (attention.query, query),
                (attention.key, states[-1]),
                (attention.value, states[-1]),
            )
        )  # (batch, heads, length, size of a head) each
        context = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None, :])
        attended = layer.attention.output(context.transpose(1, 2).flatten(2), query)
        query = layer.output(layer.intermediate(attended), attended)
        states.append(torch.cat([query, product], dim=1))
    return tuple(states)


def as_encoder_output(encoder: Any, states: tuple[Tensor, ...]) -> BaseModelOutputWithPooling:
    """Return what the encoder itself would, from the outputs of its layers."""
    last = states[-1]
    pooler = None if encoder.pooler is None else encoder.pooler(last)
    return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooler, hidden_states=states)


def through_layers(
    encoder: Any, which: slice, hidden_states: Tensor, allowed: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Run some of the layers of an encoder, as its own forward would.

    Args:
        encoder: Of one of the families `SEPARABLE`, with attention `sdpa` or `eager`.
        which: Layers, by number.
        hidden_states: What goes into the first of them, `(batch, length, hidden)`.
        allowed: True where a token may look, `(batch, 1, length or 1, length)`.
        kept: True for tokens whose vectors stay what they were, `(batch, length)`; by default none.

    Returns:
        `hidden_states` and each layer's output, `(batch, length, hidden)` each.
    """
    implementation = encoder.config._attn_implementation
    if implementation == "sdpa":
        attention_mask = allowed
    elif implementation == "eager":
        closed = torch.finfo(hidden_states.dtype).min
        attention_mask = torch.zeros_like(allowed, dtype=hidden_states.dtype).masked_fill(~allowed, closed)
    else:
        raise ValueError(
            f"separate_layers: expected attn_implementation 'sdpa' or 'eager', got {implementation!r}, which takes "
            "no mask of its own for each token."
        )
    states = [hidden_states]
    for layer in encoder.encoder.layer[which]:
        output = layer(states[-1], attention_mask)
        output = output if isinstance(output, Tensor) else output[0]  # transformers 4 returns a tuple
        states.append(output if kept is None else torch.where(kept.unsqueeze(2), states[-1], output))
    return tuple(states)
