"""LRKD: cross-encoders for e-commerce relevance that keep a teacher's reasoning as one latent vector.

Importing this package registers the models with transformers' Auto classes. A published checkpoint does not need it:
`from_pretrained(..., trust_remote_code=True)` loads the code beside the weights. This file is never uploaded.
"""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_lrkd import LRKDConfig
from .modeling_lrkd import (
    LRKDForSequenceClassification,
    LRKDModel,
    LRKDModelOutput,
    LRKDPreTrainedModel,
    LRKDSequenceClassifierOutput,
)
from .pipeline_lrkd import LRKDRelevancePipeline

# With a pip install: `AutoModel.from_pretrained(folder)` needs no remote code.
AutoConfig.register(LRKDConfig.model_type, LRKDConfig)
AutoModel.register(LRKDConfig, LRKDModel)
AutoModelForSequenceClassification.register(LRKDConfig, LRKDForSequenceClassification)
PIPELINE_REGISTRY.register_pipeline(
    "lrkd-relevance", LRKDRelevancePipeline, pt_model=AutoModelForSequenceClassification, type="text"
)

# On saving: the code travels with the weights.
LRKDConfig.register_for_auto_class()
LRKDModel.register_for_auto_class("AutoModel")
LRKDForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "LRKDConfig",
    "LRKDForSequenceClassification",
    "LRKDModel",
    "LRKDModelOutput",
    "LRKDPreTrainedModel",
    "LRKDRelevancePipeline",
    "LRKDSequenceClassifierOutput",
]
