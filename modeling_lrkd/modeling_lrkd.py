"""LRKD models: an encoder, a latent reasoning extractor, and a relevance classifier (arXiv 2601.21611, section 3.3)."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_lrkd import LRKDConfig, custom_pipelines
from .extractors_lrkd import (
    GATExtractor,
    MLPExtractor,
    PerspectiveExtractors,
    PerspectiveGate,
    PolyExtractor,
    mean_weights,
    weighted_sum,
)
from .separation_lrkd import MatchMarks, as_encoder_output, read_apart, read_by_query, read_together, segments_of

if TYPE_CHECKING:
    # Nothing here needs them, but transformers finds the files that belong together by their import lines: with these,
    # the files of the task `lrkd-relevance` are saved and fetched with this one, and not imported before their time.
    # (Of a local folder, transformers 4.57 follows the lines of this file only: so the bank of the pipeline is named.)
    from .bank_lrkd import RationaleBank  # noqa: F401
    from .pipeline_lrkd import LRKDRelevancePipeline  # noqa: F401

# save_pretrained records only the class being saved; a folder is to load through either.
AUTO_MAP = {
    "AutoConfig": "configuration_lrkd.LRKDConfig",
    "AutoModel": "modeling_lrkd.LRKDModel",
    "AutoModelForSequenceClassification": "modeling_lrkd.LRKDForSequenceClassification",
}


@dataclass
class LRKDModelOutput(ModelOutput):
    """Output of `LRKDModel`.

    Attributes:
        last_hidden_state: Token vectors H, `(batch, length, hidden)`.
        pooler_output: h_cls, `(batch, hidden)`.
        latent_reasoning: r_qp, `(batch, latent)`; None for `extractor_type="none"`.
        projected_reasoning: r_qp in the space of the chain-of-thought embeddings, `(batch, reasoning_dim)`; None
            for `extractor_type="none"`.
        hidden_states: Layer outputs of the encoder, `(batch, length, hidden)` each, if asked for.
        attentions: Attention weights of the encoder, `(batch, heads, length, length)` each, if asked for.
        perspective_latents: r_p, the latent of each of `config.perspectives`, `(batch, perspectives, latent)`; None
            for a model of a single latent.
        perspective_weights: w, what the gate gives each of them, `(batch, perspectives)`, rows sum to 1; else None.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    latent_reasoning: Tensor | None = None
    projected_reasoning: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    perspective_latents: Tensor | None = None
    perspective_weights: Tensor | None = None


@dataclass
class LRKDSequenceClassifierOutput(ModelOutput):
    """Output of `LRKDForSequenceClassification`.

    Attributes:
        loss: Eq. 9, scalar; of what is given: labels, embeddings, or both.
        logits: z of eq. 7, before the softmax, `(batch, labels)`; with `ranking_view`, the log-odds of the expected
            gain, `(batch, 1)`, float32.
        latent_reasoning: r_qp, `(batch, latent)`; None for `extractor_type="none"`.
        projected_reasoning: r_qp in the space of the chain-of-thought embeddings, `(batch, reasoning_dim)`.
        classification_loss: Eq. 7, scalar; None without labels.
        guidance_loss: Eq. 8 before the weight λ, scalar; None without embeddings.
        hidden_states: Layer outputs of the encoder, `(batch, length, hidden)` each, if asked for.
        attentions: Attention weights of the encoder, `(batch, heads, length, length)` each, if asked for.
        perspective_latents: r_p, the latent of each of `config.perspectives`, `(batch, perspectives, latent)`; None
            for a model of a single latent.
        perspective_weights: w, what the gate gives each of them, `(batch, perspectives)`, rows sum to 1; else None.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    latent_reasoning: Tensor | None = None
    projected_reasoning: Tensor | None = None
    classification_loss: Tensor | None = None
    guidance_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    perspective_latents: Tensor | None = None
    perspective_weights: Tensor | None = None


class LRKDPreTrainedModel(PreTrainedModel):
    """Weights, loading and saving that all LRKD models share."""

    config_class = LRKDConfig
    # No prefix: both models keep `encoder`, `extractor` and `reasoning_projection` at their top level, so that a
    # checkpoint of either loads into the other.
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    # The encoder checks its own support when it is built.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # `forward` returns a loss averaged over the batch: Trainer has to divide by the accumulation steps.
    accepts_loss_kwargs = False

    def _init_weights(self, module: nn.Module) -> None:
        # The encoder initialises its own modules. torch.nn.init leaves loaded weights alone while transformers loads.
        std = getattr(self.config.encoder_config, "initializer_range", 0.02)
        if isinstance(module, GATExtractor):
            nn.init.xavier_uniform_(module.projection.weight)
            nn.init.normal_(module.attention, std=module.attention.numel() ** -0.5)
        elif isinstance(module, PolyExtractor):
            nn.init.normal_(module.codes, std=module.codes.shape[1] ** -0.5)
        elif isinstance(module, MatchMarks):
            nn.init.normal_(module.weight, std=0.1)  # 0.02 beside normalised vectors would be no mark at first
        elif isinstance(module, PerspectiveGate):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings of the encoder."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the encoder."""
        self.encoder.set_input_embeddings(value)

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Save weights (safetensors), configuration and the code that loads them without this package installed."""
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = custom_pipelines()
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as `PreTrainedModel.from_pretrained` does, from safetensors only.

        Raises:
            OSError: There is no safetensors file, or it is truncated or damaged.
        """
        kwargs.setdefault("use_safetensors", True)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"{pretrained_model_name_or_path}: model.safetensors is truncated or damaged ({error}). Download the "
                "checkpoint again, or save the model again."
            ) from error


class LRKDModel(LRKDPreTrainedModel):
    r"""Encoder and latent reasoning extractor, without a head.

    With `config.perspectives` there is one latent for each of P perspectives, and a gate fuses them:

    .. math:: r_p = R_p(H, M), \quad w = \mathrm{softmax}(G\, h_{cls} + b), \quad r_{qp} = \sum_p w_p\, r_p

    Everything after it takes r_qp as ever. The gate can be read (`perspective_weights`): it says how the latents were
    mixed for this pair, not what the score rests on. The rows of w sum to 1, so projecting r_qp is mixing the
    projected r_p, and `reasoning_projection` serves both.

    Args:
        config: An `LRKDConfig`. No weights are loaded; use `from_pretrained` for that.

    Attributes:
        encoder: The model of `config.encoder_config`.
        extractor: Maps H to r_qp (eq. 6); None for `extractor_type` `none` and `cls`.
        reasoning_projection: Linear, r_qp to the chain-of-thought embedding; None for `none`. The paper sets
            r_qp beside an embedding of another size without saying how; this layer is ours.
        perspective_gate: Linear and softmax, h_cls to the weights w; None without `config.perspectives`.
        match_marks: Between the layers that read apart and those that read together; None without
            `config.match_marks`.
    """

    def __init__(self, config: LRKDConfig) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config)
        if config.pooling != "pooler" and getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # unused parameters stop distributed training
        self.extractor = _build_extractor(config)
        self.reasoning_projection = (
            None if config.extractor_type == "none" else nn.Linear(config.latent_dim, config.reasoning_dim)
        )
        self.perspective_gate = (
            None if config.perspectives is None else PerspectiveGate(config.hidden_size, len(config.perspectives))
        )
        self.match_marks = MatchMarks(config.hidden_size) if config.match_marks else None
        self._encoder_arguments = frozenset(inspect.signature(self.encoder.forward).parameters)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> LRKDModelOutput | tuple[Any, ...]:
        """Encode `[query; product]` and extract the latent reasoning.

        Args:
            input_ids: Token ids, `(batch, length)`.
            attention_mask: 1 for tokens, 0 for padding, `(batch, length)`; all ones by default.
            token_type_ids: Segment of each token, `(batch, length)`; left out for encoders that take none.
            position_ids: Positions, `(batch, length)`.
            inputs_embeds: Token embeddings instead of ids, `(batch, length, hidden)`.
            output_attentions: Return the attention weights (needs `attn_implementation="eager"`).
            output_hidden_states: Return the output of every layer.
            return_dict: False: a tuple.

        Raises:
            ValueError: A row of the mask has no valid token.
        """
        output = self._encode(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        return output.to_tuple() if return_dict is False else output

    def _encode(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None, **options: Any
    ) -> LRKDModelOutput:
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("forward needs `input_ids` or `inputs_embeds`.")
        if attention_mask is None:  # and none for the encoder: attention without a mask is faster
            mask = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
        else:
            mask = attention_mask.bool()
        if attention_mask is not None and not _is_tracing() and not bool(mask.any(dim=1).all()):
            row = int((~mask.any(dim=1)).nonzero()[0])
            raise ValueError(f"attention_mask: row {row} has no valid token; every row needs at least one.")
        options |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if self.config.separate_layers > 0:
            return self._features(self._encode_apart(mask=mask, **options), mask)
        if "token_type_ids" not in self._encoder_arguments:
            options["token_type_ids"] = None
        options["attention_mask"] = attention_mask
        return self._features(self.encoder(**{name: v for name, v in options.items() if v is not None}), mask)

    def _encode_apart(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        mask: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Any:
        """Encode with `separate_layers`: what the encoder would return."""
        if output_attentions:
            raise ValueError("output_attentions: not returned with separate_layers; leave it out.")
        segments = segments_of(self.config.encoder_config, input_ids, token_type_ids)
        k = self.config.separate_layers
        lower = read_apart(self.encoder, k, segments, mask, input_ids, inputs_embeds, position_ids)
        met = self.mark_matches(lower[-1], input_ids, segments, mask)
        last = len(self.encoder.encoder.layer) - self.config.query_layers
        both = read_together(self.encoder, slice(k, last), met, mask)
        query = read_together(self.encoder, slice(last, None), both[-1], mask, kept=segments == 1)
        output = as_encoder_output(self.encoder, (*lower[:-1], *both, *query[1:]))
        if not output_hidden_states:
            output.hidden_states = None
        return output

    def encode_segment(self, input_ids: Tensor, attention_mask: Tensor, segment: int) -> Tensor:
        """Run the layers that read apart over queries or products alone.

        Args:
            input_ids: `[CLS] query [SEP]`, or what follows it, e.g. `product [SEP]`; `(batch, length)`.
            attention_mask: 1 for tokens, 0 for padding, `(batch, length)`.
            segment: 0: these are queries; 1: products.

        Returns:
            Token vectors after `config.separate_layers` layers, `(batch, length, hidden)`; at 0 their embeddings.
        """
        segments = torch.full_like(input_ids, segment)
        return read_apart(self.encoder, self.config.separate_layers, segments, attention_mask.bool(), input_ids)[-1]

    def mark_matches(self, hidden_states: Tensor, input_ids: Tensor | None, segments: Tensor, mask: Tensor) -> Tensor:
        """Mark the tokens that both texts have, where `config.match_marks` asks for it (see `MatchMarks`).

        Args:
            hidden_states: What `encode_segment` returned of query and product, `(batch, length, hidden)`.
            input_ids: Their token ids, `(batch, length)`.
            segments: 0 for the query's tokens, 1 for the product's, `(batch, length)`.
            mask: True for tokens, False for padding, `(batch, length)`.

        Returns:
            What `classify_together` takes, `(batch, length, hidden)`.

        Raises:
            ValueError: There are no token ids to compare.
        """
        if self.match_marks is None:
            return hidden_states
        if input_ids is None:
            raise ValueError("match_marks: compare token ids; pass input_ids instead of inputs_embeds.")
        marked: Tensor = self.match_marks(hidden_states, input_ids, segments, mask)
        return marked

    def _features(self, encoded: Any, mask: Tensor) -> LRKDModelOutput:
        hidden_states = encoded.last_hidden_state  # (batch, length, hidden)
        h_cls = self._pool(encoded, mask)  # (batch, hidden)
        latents = weights = None
        if self.perspective_gate is None or self.extractor is None:
            latent = self._extract(hidden_states, mask, h_cls)  # (batch, latent)
        else:
            latents = self.extractor(hidden_states, mask)  # (batch, perspectives, latent)
            weights = self.perspective_gate(h_cls)  # (batch, perspectives)
            latent = weighted_sum(weights, latents)
        return LRKDModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=h_cls,
            latent_reasoning=latent,
            projected_reasoning=None if self.reasoning_projection is None else self.reasoning_projection(latent),
            hidden_states=encoded.get("hidden_states"),
            attentions=encoded.get("attentions"),
            perspective_latents=latents,
            perspective_weights=weights,
        )

    def _pool(self, encoded: Any, mask: Tensor) -> Tensor:
        if self.config.pooling == "mean":
            return weighted_sum(mean_weights(mask), encoded.last_hidden_state)
        pooled = encoded.get("pooler_output") if self.config.pooling == "pooler" else None
        return encoded.last_hidden_state[:, 0] if pooled is None else pooled

    def _extract(self, hidden_states: Tensor, mask: Tensor, pooled: Tensor) -> Tensor | None:
        if self.extractor is not None:
            latent: Tensor = self.extractor(hidden_states, mask)
            return latent
        return pooled if self.config.extractor_type == "cls" else None


class LRKDForSequenceClassification(LRKDModel):
    r"""Cross-encoder that classifies relevance from `[h_cls ; r_qp]` (eq. 6-9).

    A plain `transformers.Trainer` trains it: give it `labels` and, for the rows that have one, the frozen
    embedding of a chain of thought. The extractor stays at inference.

    Attributes:
        classifier: Linear, `[h_cls ; r_qp]` to the labels; h_cls alone for `extractor_type` `none` and `cls`.

    Example:
    >>> from transformers import BertConfig
    >>> tiny = BertConfig(vocab_size=99, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    >>> config = LRKDConfig(encoder_config=tiny, extractor_type="gat", reasoning_dim=4, num_labels=3)
    >>> model = LRKDForSequenceClassification(config)
    >>> output = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([2]), cot_embeddings=torch.ones(1, 4))
    >>> output.logits.shape, output.latent_reasoning.shape, output.projected_reasoning.shape
    (torch.Size([1, 3]), torch.Size([1, 8]), torch.Size([1, 4]))
    >>> torch.allclose(output.loss, output.classification_loss + 0.1 * output.guidance_loss)
    True
    """

    def __init__(self, config: LRKDConfig) -> None:
        super().__init__(config)
        fused_size = config.hidden_size
        if config.extractor_type in ("mlp", "poly", "gat"):
            fused_size += config.latent_dim if config.fuse == "raw" else config.reasoning_dim
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(fused_size, len(config.id2label))
        if config.ranking_view:
            config.ranking_gains()  # a missing gain is an error now, not at the first product
        self.post_init()

    @classmethod
    def from_encoder(
        cls,
        name_or_path: str,
        *,
        revision: str | None = None,
        attn_implementation: str | None = None,
        **config_kwargs: Any,
    ) -> LRKDForSequenceClassification:
        """Build a student around a pretrained encoder; extractor, projection and classifier start at random.

        In evaluation mode, as `from_pretrained` returns models; Trainer switches it to training.

        Args:
            name_or_path: Encoder on the Hub or in a local folder, e.g. `bert-base-multilingual-uncased`.
            revision: Commit, tag or branch of the encoder on the Hub.
            attn_implementation: `sdpa`, `eager`...; the encoder's default if None.
            config_kwargs: Options of `LRKDConfig`, e.g. `extractor_type="poly"`, `id2label={0: "Exact", ...}`.

        Raises:
            TypeError: `config_kwargs` holds a name that `LRKDConfig` does not know.
        """
        known = {*inspect.signature(LRKDConfig.__init__).parameters, "id2label", "label2id", "num_labels"}
        known -= {"self", "kwargs", "encoder_config"}
        unknown = sorted(set(config_kwargs) - known)
        if unknown:
            raise TypeError(
                f"from_encoder: unknown option {unknown[0]!r}; LRKDConfig knows {', '.join(sorted(known))}."
            )
        encoder_config = AutoConfig.from_pretrained(name_or_path, revision=revision)
        encoder = AutoModel.from_pretrained(name_or_path, config=encoder_config, revision=revision)
        requested = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        model = cls._from_config(LRKDConfig(encoder_config=encoder.config, **config_kwargs), **requested)
        state = encoder.state_dict()
        if model.encoder.state_dict().keys() != state.keys():  # pooling other than `pooler` builds none
            state = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
        model.encoder.load_state_dict(state)
        return model.to(encoder.dtype).eval()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cot_embeddings: Tensor | None = None,
        cot_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> LRKDSequenceClassifierOutput | tuple[Any, ...]:
        """Classify pairs, and compute eq. 9 of what is given.

        Args:
            input_ids: See `LRKDModel.forward`, as for the arguments up to `inputs_embeds`.
            attention_mask: See there.
            token_type_ids: See there.
            position_ids: See there.
            inputs_embeds: See there.
            labels: Class of each row, `(batch,)`.
            cot_embeddings: Frozen embedding of each row's chain of thought, `(batch, reasoning_dim)`; with
                `config.perspectives` one a perspective, `(batch, perspectives, reasoning_dim)`.
            cot_mask: 1 for the rows that have one, `(batch,)`; all by default. Rows at 0 add no guidance, and
                what stands in their embedding is not looked at. With `config.perspectives`: `(batch, perspectives)`.
            output_attentions: See there.
            output_hidden_states: See there.
            return_dict: See there.

        Raises:
            ValueError: A mask without a valid token, embeddings or a mask of them of another shape, or an embedding
                that is not finite in a row that counts.
        """
        features = self._encode(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        logits = self.classifier(self.dropout(self._fuse(features)))
        classification_loss = None if labels is None else F.cross_entropy(logits.float(), labels)  # eq. 7
        guidance_loss = None
        if cot_embeddings is not None and features.projected_reasoning is not None:
            if features.perspective_latents is None:
                guidance_loss = self._guidance(features.projected_reasoning, cot_embeddings, cot_mask)
            else:
                guidance_loss = self._guidance_by_perspective(features.perspective_latents, cot_embeddings, cot_mask)
        output = LRKDSequenceClassifierOutput(
            loss=_total(classification_loss, guidance_loss, self.config.guidance_weight),
            logits=self._ranking_logits(logits) if self.config.ranking_view else logits,
            latent_reasoning=features.latent_reasoning,
            projected_reasoning=features.projected_reasoning,
            classification_loss=classification_loss,
            guidance_loss=guidance_loss,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
            perspective_latents=features.perspective_latents,
            perspective_weights=features.perspective_weights,
        )
        return output.to_tuple() if return_dict is False else output

    def classify_together(self, query: Tensor, product: Tensor, attention_mask: Tensor) -> Tensor:
        """Classify pairs from what `encode_segment` returned of query and product: the layers that read together.

        Args:
            query: The query's token vectors, through `mark_matches`, `(batch, query length, hidden)`.
            product: The product's, `(batch, product length, hidden)`.
            attention_mask: 1 for tokens, 0 for padding, `(batch, query length + product length)`.

        Returns:
            What `forward` would return as logits for the pairs, `(batch, labels)`.
        """
        mask, count = attention_mask.bool(), query.shape[1]
        last = len(self.encoder.encoder.layer) - self.config.query_layers
        both = slice(self.config.separate_layers, last)
        states = read_together(self.encoder, both, torch.cat([query, product], dim=1), mask)
        if self.config.query_layers:
            query, product = states[-1][:, :count], states[-1][:, count:]
            states = read_by_query(self.encoder, slice(last, None), query, product, mask)
        logits: Tensor = self.classifier(
            self.dropout(self._fuse(self._features(as_encoder_output(self.encoder, states), mask)))
        )
        return self._ranking_logits(logits) if self.config.ranking_view else logits

    def _ranking_logits(self, logits: Tensor) -> Tensor:
        """Log-odds of the expected gain, log(Σ P·g / Σ P·(1 - g)), `(batch, labels)` to `(batch, 1)`.

        In the log domain: as long as the logits are finite so is the result, however sure the model is.
        """
        gains = torch.tensor(self.config.ranking_gains(), dtype=torch.float32, device=logits.device)
        if gains.min() < 0 or gains.max() > 1:
            gains = (gains - gains.min()) / (gains.max() - gains.min())
        log_probabilities = F.log_softmax(self.config.calibrated(logits.float()), dim=1)
        gained = torch.logsumexp(log_probabilities + gains.log(), dim=1, keepdim=True)
        missed = torch.logsumexp(log_probabilities + (1 - gains).log(), dim=1, keepdim=True)
        return gained - missed

    def _fuse(self, features: Any) -> Tensor:
        """h_fuse of section 3.3.2, `(batch, hidden + latent)`."""
        if self.config.extractor_type in ("none", "cls"):  # `cls`: the fused vector would repeat h_cls
            return features.pooler_output
        reasoning = features.latent_reasoning if self.config.fuse == "raw" else features.projected_reasoning
        return torch.cat([features.pooler_output, reasoning], dim=1)

    def _guidance_by_perspective(self, latents: Tensor, embeddings: Tensor, mask: Tensor | None) -> Tensor:
        r"""Eq. 8 for each perspective's own latent and rationale, averaged over the batch and the perspectives.

        .. math:: L = \frac{1}{B P} \sum_{i=1}^B \sum_{p=1}^P m_{ip}\, \ell(W r_{ip} + c,\ e_{ip})

        All B·P count, whichever have a rationale: a missing one adds nothing and changes no other's weight. InfoNCE
        contrasts rows within a perspective, never the rationales of one pair with each other.
        """
        shape = (*latents.shape[:2], self.config.reasoning_dim)
        if embeddings.shape != shape:
            raise ValueError(
                f"cot_embeddings: expected shape {tuple(shape)} (batch, perspectives, reasoning_dim), one embedding "
                f"for each of {', '.join(self.config.perspectives)}, got {tuple(embeddings.shape)}."
            )
        if mask is not None and mask.shape != shape[:2]:
            raise ValueError(
                f"cot_mask: expected shape {tuple(shape[:2])} (batch, perspectives), got {tuple(mask.shape)}."
            )
        assert self.reasoning_projection is not None  # as `perspectives` need an extractor
        projected = self.reasoning_projection(latents)  # (batch, perspectives, reasoning_dim)
        losses = [
            self._guidance(projected[:, p], embeddings[:, p], None if mask is None else mask[:, p])
            for p in range(shape[1])
        ]
        return torch.stack(losses).mean()

    def _guidance(self, projected: Tensor, embeddings: Tensor, mask: Tensor | None) -> Tensor:
        """Eq. 8 averaged over the batch: rows without an embedding count as rows, with no guidance.

        Dividing by the whole batch keeps the weight of a guided row the same in every batch, so that gradient
        accumulation and data parallel training give the same sum as one large batch.
        """
        if embeddings.shape != projected.shape:
            raise ValueError(
                f"cot_embeddings: expected shape {tuple(projected.shape)} (batch, reasoning_dim), got "
                f"{tuple(embeddings.shape)}. Set `reasoning_dim` to the size of the embeddings."
            )
        guided = torch.ones(len(projected), device=projected.device) if mask is None else mask
        guided = guided.bool()
        if not _is_tracing() and not bool(torch.isfinite(embeddings[guided]).all()):
            raise ValueError("cot_embeddings: NaN or infinite values in a row whose cot_mask is 1. Embed it again.")
        projected = projected.float()
        embeddings = embeddings.float().masked_fill(~guided.unsqueeze(1), 0.0)
        if self.config.guidance_loss == "mse":
            squared = (projected - embeddings).square()
            rows = squared.sum(dim=1) if self.config.guidance_reduction == "sum" else squared.mean(dim=1)
        elif self.config.guidance_loss == "cosine":
            rows = 1.0 - F.cosine_similarity(projected, embeddings, dim=1)
        else:
            similarity = F.normalize(projected, dim=1) @ F.normalize(embeddings, dim=1).T  # (row, embedding)
            similarity = (similarity / self.config.guidance_temperature).masked_fill(~guided, -torch.inf)
            target = torch.arange(len(projected), device=projected.device)
            # A row without guidance would be its own impossible target: give it a finite one, weighted 0 below.
            target = torch.where(guided, target, guided.float().argmax())
            rows = F.cross_entropy(similarity, target, reduction="none") if bool(guided.any()) else projected.sum(1) * 0
        return rows.masked_fill(~guided, 0.0).mean()


def _build_extractor(config: Any) -> nn.Module | None:
    if config.extractor_type in ("none", "cls"):
        return None
    if config.perspectives is None:
        return _one_extractor(config)
    return PerspectiveExtractors(_one_extractor(config) for _ in config.perspectives)


def _one_extractor(config: Any) -> nn.Module:
    if config.extractor_type == "mlp":
        return MLPExtractor(config.hidden_size, config.latent_dim, config.num_extractor_layers)
    if config.extractor_type == "poly":
        return PolyExtractor(config.hidden_size, config.latent_dim, config.num_codes)
    return GATExtractor(config.hidden_size, config.latent_dim, config.negative_slope)


def _total(classification: Tensor | None, guidance: Tensor | None, weight: float) -> Tensor | None:
    """Eq. 9 of what is there."""
    if guidance is None:
        return classification
    return weight * guidance if classification is None else classification + weight * guidance


def _is_tracing() -> bool:
    """Whether the graph is being recorded, where checks on values cannot be."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined]
