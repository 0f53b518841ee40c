"""Configuration of LRKD models."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoConfig, BertConfig, PretrainedConfig

from .separation_lrkd import check_query_layers, check_separable, first_position

EXTRACTOR_TYPES = ("mlp", "poly", "gat", "none", "cls")
POOLINGS = ("pooler", "cls", "mean")
FUSES = ("raw", "projected")
GUIDANCE_LOSSES = ("mse", "cosine", "infonce")
GUIDANCE_REDUCTIONS = ("sum", "mean")


def custom_pipelines() -> dict[str, dict[str, Any]]:
    """Return what config.json says of the task `lrkd-relevance`; transformers changes the dict that it reads."""
    pt_classes = ["AutoModelForSequenceClassification"]
    return {"lrkd-relevance": {"impl": "pipeline_lrkd.LRKDRelevancePipeline", "pt": pt_classes, "type": "text"}}


class LRKDConfig(PretrainedConfig):
    r"""Configuration of a cross-encoder with a latent reasoning extractor (arXiv 2601.21611, section 3.3).

    Args:
        encoder_config: Configuration of the encoder, any family that `AutoModel` knows (BERT, XLM-R, ModernBERT,
            DeBERTa...), as an object or as a dict with `model_type`. Default: `BertConfig()`.
        extractor_type: How the token vectors become the latent reasoning vector r_qp (appendix A): `mlp`, `poly`,
            `gat`; `none` is a plain cross-encoder; `cls` is the ablation without extractor, r_qp := h_cls.
        perspectives: Names of the perspectives that have a latent reasoning vector of their own, each from an extractor
            of its own (`mlp`, `poly` or `gat`) and fused by a gate, see `LRKDModel`. None: one vector, as in the paper.
        extractor_dim: Size of r_qp. None: the encoder's hidden size, which reproduces the parameter counts of the
            paper's Table 2; its appendix B says 128, which contradicts them.
        num_codes: Context codes of the poly extractor (eq. 12).
        num_extractor_layers: Linear layers of the mlp extractor (eq. 10).
        negative_slope: Slope of the LeakyReLU of the gat extractor (eq. 14).
        pooling: What h_cls is: `pooler`, the encoder's own pooled output where it has one, else its first token's
            vector; `cls`, the first token's vector; `mean`, the mean over the valid tokens. The last two build no
            pooler. The paper says [CLS].
        fuse: What is concatenated to h_cls for classification: `raw` r_qp, or its `projected` form.
        reasoning_dim: Size of the embedding of the chain of thought (1024: BGE-M3).
        guidance_weight: λ of eq. 9.
        guidance_loss: `mse`, the squared error of eq. 8; `cosine`, 1 - cos; `infonce`, each embedding against
            those of the other rows of the batch.
        guidance_reduction: How the squared error is reduced over the embedding's dimensions: `sum` is eq. 8
            to the letter; `mean` is `torch.nn.MSELoss`, reasoning_dim times smaller. The batch is always averaged.
        guidance_temperature: Temperature of `infonce`.
        classifier_dropout: Dropout on the fused vector before the classifier.
        label_gains: Gain of each class, in the order of the logits. Products are ranked by the expected gain,
            Σ P(c)·gain(c); the task `lrkd-relevance` and `ranking_view` need them, nothing else does.
        temperature: Divides the logits before the softmax where probabilities are served: `lrkd-relevance` and
            `ranking_view`. Otherwise `forward` returns the logits as they are.
        class_scales: Vector scaling after the temperature: each class's log-probability is multiplied by its scale,
            and `class_biases` are added, in the order of the logits. arXiv 1706.04599, section 4.2, scales the logits;
            the log-probabilities (arXiv 1910.12656's diagonal map) are what predictions record, and do not change
            when a constant is added to all logits. None: ones.
        class_biases: See there. None: zeros.
        tier_thresholds: Ascending expected gains that separate tiers 0, 1, 2...: the tier of a score is the number
            of thresholds at or below it. None: no tiers.
        ranking_view: True: the model shows a single output, so that tools that rank by one score can use it:
            `num_labels` is 1 and the logits are `(batch, 1)`, the log-odds of the expected gain, of which the
            sigmoid is the expected gain. (Gains that leave [0, 1] are first scaled into it.) Classes, weights and
            losses stay as they are, so any checkpoint loads either way: `CrossEncoder(folder,
            trust_remote_code=True, config_kwargs={"ranking_view": True}).rank(query, titles)`.
        separate_layers: k: the first k layers of the encoder read query and product apart, each with positions of
            its own, so that products can be encoded before there is a query; the others read them together. 0: the
            encoder as it is. Encoders of the BERT family only (BERT, RoBERTa, XLM-R).
        match_marks: With `separate_layers`: where query and product first meet, a learnt vector is added to each token
            that the other text has too (see `MatchMarks`).
        query_layers: With `separate_layers`: how many of the layers that read both texts, the last ones, are for the
            query's tokens only. The product's are read there and stay as they were: several times less work where
            products are stored (see `read_by_query`).
        kwargs: As in `PretrainedConfig`; `id2label` or `num_labels` set the classes.

    Raises:
        ValueError: An option has a value it cannot have; the message names it and what it can be.

    Example:
    >>> config = LRKDConfig(extractor_type="gat", id2label={0: "Exact", 1: "Irrelevant"}, reasoning_dim=384)
    >>> config.hidden_size, config.num_labels
    (768, 2)
    >>> view = LRKDConfig(id2label={0: "Exact", 1: "Irrelevant"}, label_gains=[1.0, 0.0], ranking_view=True)
    >>> view.num_labels, len(view.id2label)
    (1, 2)
    """

    model_type = "lrkd"
    sub_configs = {"encoder_config": AutoConfig}  # noqa: RUF012  the name transformers reads
    # Declared, or transformers takes it for a generation parameter and refuses to save.
    temperature: float = 1.0
    ranking_view: bool = False  # what `num_labels` looks at while the base class settles the classes
    # Trainer gathers every output over the whole evaluation set; the metrics need the logits only.
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "latent_reasoning",
        "projected_reasoning",
        "perspective_latents",
        "perspective_weights",
        "classification_loss",
        "guidance_loss",
        "hidden_states",
        "attentions",
    ]

    def __init__(
        self,
        encoder_config: PretrainedConfig | dict[str, Any] | None = None,
        extractor_type: str = "gat",
        extractor_dim: int | None = None,
        num_codes: int = 32,
        num_extractor_layers: int = 2,
        negative_slope: float = 0.2,
        pooling: str = "pooler",
        fuse: str = "raw",
        reasoning_dim: int = 1024,
        guidance_weight: float = 0.1,
        guidance_loss: str = "mse",
        guidance_reduction: str = "sum",
        guidance_temperature: float = 0.05,
        classifier_dropout: float = 0.1,
        label_gains: list[float] | None = None,
        temperature: float = 1.0,
        class_scales: list[float] | None = None,
        class_biases: list[float] | None = None,
        tier_thresholds: list[float] | None = None,
        ranking_view: bool = False,
        perspectives: list[str] | None = None,
        separate_layers: int = 0,
        match_marks: bool = False,
        query_layers: int = 0,
        **kwargs: Any,
    ) -> None:
        if encoder_config is None:
            encoder_config = BertConfig()
        elif isinstance(encoder_config, dict):
            if "model_type" not in encoder_config:
                raise ValueError("encoder_config: a dict needs `model_type`, e.g. {'model_type': 'bert', ...}.")
            options = {key: value for key, value in encoder_config.items() if key != "model_type"}
            encoder_config = AutoConfig.for_model(encoder_config["model_type"], **options)
        self.encoder_config: Any = encoder_config
        self.extractor_type = _one_of("extractor_type", extractor_type, EXTRACTOR_TYPES)
        self.perspectives = _distinct_names("perspectives", perspectives)
        if perspectives is not None and extractor_type in ("none", "cls"):
            raise ValueError(
                f"perspectives: need an extractor (mlp, poly, gat), but extractor_type is {extractor_type}."
            )
        self.extractor_dim = extractor_dim if extractor_dim is None else _positive("extractor_dim", extractor_dim)
        self.num_codes = _positive("num_codes", num_codes)
        self.num_extractor_layers = _positive("num_extractor_layers", num_extractor_layers)
        self.negative_slope = negative_slope
        self.pooling = _one_of("pooling", pooling, POOLINGS)
        self.fuse = _one_of("fuse", fuse, FUSES)
        self.reasoning_dim = _positive("reasoning_dim", reasoning_dim)
        if guidance_weight < 0:
            raise ValueError(f"guidance_weight: expected λ >= 0 (eq. 9), got {guidance_weight}.")
        self.guidance_weight = guidance_weight
        self.guidance_loss = _one_of("guidance_loss", guidance_loss, GUIDANCE_LOSSES)
        self.guidance_reduction = _one_of("guidance_reduction", guidance_reduction, GUIDANCE_REDUCTIONS)
        self.guidance_temperature = _positive("guidance_temperature", guidance_temperature)
        self.classifier_dropout = classifier_dropout
        self.label_gains = label_gains
        self.class_scales = class_scales
        self.class_biases = class_biases
        self.tier_thresholds = tier_thresholds
        check_separable(encoder_config, separate_layers)
        self.separate_layers = separate_layers
        if match_marks and separate_layers == 0:
            raise ValueError("match_marks: are for texts that are read apart; set separate_layers to 1 or more.")
        self.match_marks = match_marks
        check_query_layers(encoder_config, separate_layers, query_layers)
        self.query_layers = query_layers
        if not __name__.startswith("transformers_modules."):
            # Not remote code but an installed package, which registers the task itself: `pipeline` need not fetch it.
            kwargs.pop("custom_pipelines", None)
        super().__init__(**kwargs)
        self.temperature = _positive("temperature", temperature)  # transformers 4.57 sets it to 1.0 just before
        self.ranking_view = ranking_view  # from here on, `num_labels` may be 1: the classes are settled
        if label_gains is not None and len(label_gains) != len(self.id2label):
            raise ValueError(f"label_gains: expected {len(self.id2label)} gains, one a label, got {len(label_gains)}.")
        for name, values in (("class_scales", class_scales), ("class_biases", class_biases)):
            if values is not None and len(values) != len(self.id2label):
                raise ValueError(f"{name}: expected {len(self.id2label)} numbers, one a label, got {len(values)}.")
        if tier_thresholds is not None and list(tier_thresholds) != sorted(tier_thresholds):
            raise ValueError(f"tier_thresholds: expected ascending scores, got {tier_thresholds}.")

    @property
    def num_labels(self) -> int | None:
        """Columns of the logits: the number of classes, or 1 with `ranking_view`."""
        return 1 if self.ranking_view else PretrainedConfig.num_labels.fget(self)

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        if not (self.ranking_view and value == 1):  # else the classes would be forgotten
            PretrainedConfig.num_labels.fset(self, value)

    def calibrated(self, logits: Tensor) -> Tensor:
        """Return the logits `(..., labels)` whose softmax are the served probabilities."""
        logits = logits / self.temperature
        if self.class_scales is not None:
            logits = logits.log_softmax(dim=-1) * logits.new_tensor(self.class_scales)
        return logits if self.class_biases is None else logits + logits.new_tensor(self.class_biases)

    def ranking_gains(self) -> list[float]:
        """Return `label_gains`, or say why products cannot be ranked by them.

        There is no rule for a model without gains: which of two classes is the better one, only its maker knows.

        Raises:
            ValueError: `label_gains` is not set, has another length than the classes, or is the same for every class.
        """
        names = [self.id2label[index] for index in range(len(self.id2label))]
        if self.label_gains is None or len(self.label_gains) != len(names) or len(set(self.label_gains)) == 1:
            raise ValueError(
                f"label_gains: ranking needs one gain a class that tells the classes apart, in the order "
                f"{', '.join(names)}; the configuration has {self.label_gains}. Set `model.config.label_gains`, or "
                "`label_gains` in config.json, e.g. 1.0 for the best class and 0.0 for the worst."
            )
        return [float(gain) for gain in self.label_gains]

    @property
    def hidden_size(self) -> int:
        """Size of the encoder's token vectors."""
        return int(self.encoder_config.hidden_size)

    @hidden_size.setter
    def hidden_size(self, value: int) -> None:
        self.encoder_config.hidden_size = value

    @property
    def vocab_size(self) -> int:
        """Rows of the encoder's token embeddings; `resize_token_embeddings` sets it."""
        return int(self.encoder_config.vocab_size)

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.encoder_config.vocab_size = value

    @property
    def max_position_embeddings(self) -> int:
        """Longest input of the encoder, in tokens."""
        return int(self.encoder_config.max_position_embeddings) - first_position(self.encoder_config)

    @property
    def latent_dim(self) -> int:
        """Size of r_qp: the hidden size unless an extractor of its own size makes it."""
        if self.extractor_dim is None or self.extractor_type == "cls":
            return self.hidden_size
        return self.extractor_dim


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}.")
    return value


def _distinct_names(name: str, values: Any) -> list[str] | None:
    if values is None:
        return None
    names = [value for value in values if isinstance(value, str) and value.strip()] if isinstance(values, list) else []
    if not names or len(set(names)) != len(values):
        raise ValueError(f"{name}: expected a list of distinct names, or None, got {values!r}.")
    return names


def _positive(name: str, value: Any) -> Any:
    if not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value!r}.")
    return value
