"""A `transformers.Trainer` for students: a learning rate of their own for the new layers, and the parts of the loss."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer

from recipes.arguments import UserError
from recipes.student.dataset import LengthBucketSampler
from recipes.student.votes import vote_divergence

LOSS_PARTS = (
    "classification_loss",
    "guidance_loss",
    "vote_loss",
    # recipes.student.rivals
    "reconstruction_loss",
    "tagging_loss",
    "score_loss",
    "reasoning_loss",
    "contrastive_loss",
    "agreement_loss",
)


class LRKDTrainer(Trainer):
    """Train an `LRKDForSequenceClassification` on a `PairDataset`.

    Args:
        head_learning_rate: Learning rate of everything but the encoder: extractor, projection, classifier. None: the
            same as the encoder's, as in the paper. Its 2e-6 over about 2,000 steps can move a randomly initialised
            weight by about 0.004, so a larger one is worth trying.
        vote_weight: Weight of KL(p_T || p_S) to the teacher's votes, for batches that have `teacher_votes`.
        kwargs: As in `transformers.Trainer`.
    """

    def __init__(
        self, *args: Any, head_learning_rate: float | None = None, vote_weight: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.head_learning_rate = head_learning_rate
        self.vote_weight = vote_weight
        self._loss_parts: dict[str, list[torch.Tensor]] = {name: [] for name in LOSS_PARTS}
        if self.is_fsdp_enabled:
            self.check_layers(self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap or [])

    def check_layers(self, names: list[str]) -> None:
        """Refuse an encoder without the layers that are to be sharded, given by the names of their classes.

        Raises:
            UserError: One is missing.
        """
        classes = {type(module).__name__ for module in self.model.modules()}
        if missing := [name for name in names if name not in classes]:
            raise UserError(
                f"fsdp_transformer_layer_cls_to_wrap: the encoder has no {missing[0]}. Expected the class of its layers"
                f", of {', '.join(sorted(name for name in classes if name.endswith('Layer')))}: correct the file of "
                "`accelerate launch --config_file`."
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Let accelerate shard (FSDP) on CPUs too: torch does, through gloo.

        By itself it turns to FSDP from MULTI_GPU alone, and CPU processes would each train the whole model without a
        word. By now they are joined and know their device, so that nothing else is read from this type.
        """
        state = PartialState()
        if parse_flag_from_env("ACCELERATE_USE_FSDP") and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU  # becomes FSDP in the next line
        super().create_accelerator_and_postprocess()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer of the training arguments over four groups: encoder or head, decayed or not."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_head = not name.removeprefix("module.").startswith("encoder.")
                groups.setdefault((is_head, name in decayed), []).append(parameter)
        head_learning_rate = self.head_learning_rate or self.args.learning_rate
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": head_learning_rate if is_head else self.args.learning_rate,
                    "weight_decay": self.args.weight_decay if is_decayed else 0.0,
                }
                for (is_head, is_decayed), parameters in groups.items()
            ],
            **options,
        )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthBucketSampler(dataset.lengths, step, seed=self.args.seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return eq. 9 as the model computes it, with the votes' part if there are any; keep the parts for the log."""
        votes = inputs.pop("teacher_votes", None)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if votes is not None:
            vote_loss = vote_divergence(votes, outputs.logits).mean()
            loss = loss + self.vote_weight * vote_loss
            self._loss_parts["vote_loss"].append(vote_loss.detach())
        if model.training:
            for name in LOSS_PARTS:
                if outputs.get(name) is not None:
                    self._loss_parts[name].append(outputs[name].detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each part of the loss since the last log."""
        if "loss" in logs:
            for name, values in self._loss_parts.items():
                if values:
                    logs[name] = round(torch.stack(values).mean().item(), 4)
                    values.clear()
        super().log(logs, start_time)
