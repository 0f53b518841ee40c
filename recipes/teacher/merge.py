"""Merge an adapter into its base: a plain model, for servers that take no adapter.

    python -m recipes.teacher.merge --adapter runs/esci/teacher/mpcot_dpo --output runs/esci/teacher/merged

vLLM, TGI and `peft.PeftModel.from_pretrained` take the adapter as it is. The merge is checked: on a few tokens the
merged model has to give the logits of base and adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from recipes.arguments import UserError, parse, run
from recipes.schemas import make_folder
from recipes.student.saving import explain_failed_writes, save_tokenizer
from recipes.teacher.tuning import TuningArguments, base_of, load_model, load_tokenizer, with_adapter


@dataclass
class MergeArguments:
    """Options of `python -m recipes.teacher.merge`."""

    adapter: str = field(metadata={"help": "Folder of the adapter."})
    output: str = field(metadata={"help": "Folder of the merged model and its tokenizer."})
    model: str | None = field(default=None, metadata={"help": "Base (None: the adapter's own)."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the base."})
    device: Literal["auto", "cpu"] = field(default="auto", metadata={"help": "auto: a GPU, in bfloat16, if any."})


def main() -> None:
    """Run the verb."""
    arguments = parse(MergeArguments, __doc__)
    difference = merge(arguments)
    print(f"wrote {arguments.output}: its logits differ from base and adapter by {difference:.1e} at most")
    print(f"next: vllm serve {arguments.output}, or python -m recipes.teacher.generate --help")


def merge(arguments: MergeArguments) -> float:
    """Load base and adapter, merge, compare and save.

    Returns:
        The largest difference between the logits before and after, relative to their largest.

    Raises:
        UserError: The adapter does not fit its base, or the merged model gives other logits.
    """
    import torch

    common: Any = TuningArguments(
        data="", output=arguments.output, adapter=arguments.adapter, model=arguments.model,
        model_revision=arguments.model_revision, device=arguments.device,
    )  # fmt: skip
    name, revision = base_of(common)
    output = make_folder(arguments.output)
    own = Path(arguments.adapter, "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(arguments.adapter) if own else load_tokenizer(name, revision)
    adapted = with_adapter(load_model(name, revision, common), arguments.adapter).eval()
    token_ids = torch.arange(min(16, adapted.config.vocab_size)).unsqueeze(0).to(adapted.device)  # (1, 16)
    with torch.no_grad():
        before = adapted(token_ids).logits
        merged = adapted.merge_and_unload()
        after = merged(token_ids).logits
    difference = float((before - after).abs().max() / before.abs().max())
    # bfloat16 keeps 8 bits of a weight, and the merged weight is rounded once more.
    if not difference < (1e-4 if merged.dtype == torch.float32 else 0.05):
        raise UserError(f"{arguments.adapter}: merged, its logits differ by {difference:.1e}; nothing was written.")
    with explain_failed_writes(output):
        merged.save_pretrained(output)
        save_tokenizer(tokenizer, output)
    return difference


if __name__ == "__main__":
    run(main)
