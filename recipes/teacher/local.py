"""Completions in process, with transformers: a base model, or a base model under a LoRA adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from recipes.arguments import UserError
from recipes.minilm import public_name
from recipes.rationales.embed import folder_hash
from recipes.teacher.endpoint import Answer, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class LocalModel:
    """A causal language model that completes batches of chat prompts."""

    def __init__(
        self, name: str, revision: str | None = None, adapter: str | None = None, device: str | None = None
    ) -> None:
        """Load the tokenizer, the model and its adapter.

        Args:
            name: Repository or folder of the base model.
            revision: Of that repository.
            adapter: Folder of a LoRA adapter that was trained on it.
            device: `cpu`, `cuda`...; a GPU where there is one by default. On a CPU weights are float32.

        Raises:
            UserError: No such model, no chat template, no token to pad or end with, or the adapter does not fit.
        """
        import torch
        from transformers import AutoModelForCausalLM

        self.name = name
        self.tokenizer = load_tokenizer(name, revision, adapter)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device == "cpu" else "auto"
        try:
            model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"model: {name!r} could not be loaded as a causal language model: {error}") from None
        if adapter is not None:
            model = load_adapter(model, name, adapter)
        self.model = model.to(device).eval()

    def complete(self, prompts: Sequence[Messages], options: dict[str, Any], seed: int) -> list[Answer]:
        """Complete a batch of prompts, padded on the left.

        Args:
            prompts: Chat messages each.
            options: `temperature` (0: greedy), `top_p`, `top_k`, `max_tokens`; None switches one off.
            seed: Of the batch.

        Returns:
            One answer a prompt, in their order.
        """
        import torch
        from transformers import GenerationConfig

        texts = [self.tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        batch = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        ends = self._ends()
        sampled = options["temperature"] > 0
        # Nothing is left to the model's own defaults, so that the record of the sampling is whole.
        sampling = {
            "temperature": options["temperature"],
            "top_p": 1.0 if options["top_p"] is None else options["top_p"],
            "top_k": options["top_k"] or 0,
        }
        config = GenerationConfig(
            do_sample=sampled,
            max_new_tokens=options["max_tokens"],
            repetition_penalty=1.0,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=ends,
            **(sampling if sampled else {}),
        )
        torch.manual_seed(seed)
        with torch.inference_mode():
            tokens = self.model.generate(**batch, generation_config=config)
        return [self._answer(row, ends) for row in tokens[:, batch["input_ids"].shape[1] :].tolist()]

    def prompt_tokens(self, prompt: Messages) -> int:
        """Count the tokens of a prompt as the model sees it."""
        text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def max_length(self) -> int:
        """Tokens of prompt and completion together that the model was made for."""
        return self.model.config.max_position_embeddings

    def _ends(self) -> list[int]:
        """List the tokens that end a turn: the tokenizer's, and those of the model's generation config."""
        own = self.model.generation_config.eos_token_id
        own = [] if own is None else [own] if isinstance(own, int) else list(own)
        return sorted({self.tokenizer.eos_token_id, *own})

    def _answer(self, row: list[int], ends: list[int]) -> Answer:
        end = next((place for place, token in enumerate(row) if token in ends), None)
        kept = row if end is None else row[:end]
        # Special tokens stay: in some vocabularies the think tags are among them.
        text = self.tokenizer.decode(kept, skip_special_tokens=False)
        return Answer(text, "length" if end is None else "stop", len(row) if end is None else end + 1)


def load_tokenizer(name: str, revision: str | None = None, adapter: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside the adapter, or else the base model's, ready to pad on the left.

    Raises:
        UserError: There is none, it has no chat template, or no token to pad or end with.
    """
    from transformers import AutoTokenizer

    beside_adapter = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    source, revision = (adapter, None) if beside_adapter else (name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, padding_side="left", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model: no tokenizer could be loaded from {source!r}: {error}") from None
    if tokenizer.chat_template is None:
        raise UserError(
            f"model: the tokenizer of {source!r} has no chat template, so it cannot be asked in messages. Take an "
            f"instruction-tuned model, or save a chat_template.jinja beside its tokenizer."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model: the tokenizer of {source!r} names no end-of-text token (eos_token), so that no completion would "
            f"end. Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        # Safe: padded places are masked, and what follows the first end of text is cut off.
        tokenizer.pad_token = tokenizer.eos_token
        print(f"{source}: the tokenizer has no pad token; {tokenizer.eos_token} pads")
    return tokenizer


def load_adapter(model: PreTrainedModel, name: str, adapter: str) -> PreTrainedModel:
    """Put a LoRA adapter on its base model; every weight must find its place.

    Raises:
        UserError: It was made for another base model.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    weights = Path(adapter) / ADAPTER_WEIGHTS
    try:
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
        adapted = PeftModel.from_pretrained(model, adapter)
        with safe_open(weights, framework="pt") as file:
            saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(
            f"adapter: {adapter!r} does not fit the base model {name!r}: {str(error).splitlines()[0][:300]} "
            f"Pass the --model that it was trained on."
        ) from None
    loaded = {key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(adapted).items()}
    if wrong := sorted({key for key in {**saved, **loaded} if saved.get(key) != loaded.get(key)}):
        raise UserError(
            f"adapter: {adapter!r} does not fit the base model {name!r}: {len(wrong)} of its {len(saved)} weights have "
            f"no such place there, e.g. {wrong[0]}. It was trained on {base!r}: pass that as --model."
        )
    if public_name(base or name) != public_name(name):
        print(f"{adapter}: it says that it was trained on {base!r}; its weights fit {name!r} too")
    return adapted


def fingerprint(name: str, revision: str | None, adapter: str | None) -> dict[str, str | None]:
    """Identify the weights of a local model and its adapter, so that a change of either is noticed.

    Args:
        name: Repository or folder of the model. The files of a folder are hashed.
        revision: Of a repository.
        adapter: Folder of the adapter.

    Raises:
        UserError: The repository cannot be reached, or the adapter has no weights.
    """
    if Path(name).is_dir():
        version = folder_hash(Path(name))
    else:
        try:
            # The cache keeps files by commit, so this resolves a branch or tag, online or from the cache alike.
            version = Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
        except (OSError, HFValidationError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"model: {name!r}: no such folder here, and the Hub does not give it ({reason}). Check the name, "
                f"--revision and the network; a private or gated one needs `hf auth login`."
            ) from None
    if adapter is not None and not (Path(adapter) / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"adapter: {adapter!r} is no folder of a LoRA adapter: {ADAPTER_WEIGHTS} is missing.")
    return {"revision": version, "adapter": adapter and folder_hash(Path(adapter))}
