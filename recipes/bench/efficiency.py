"""Table 2 on this machine: what a latent reasoning extractor costs over the plain cross-encoder.

    python -m recipes.bench.efficiency --config recipes/configs/bench/efficiency_cpu.yaml
    python -m recipes.bench.efficiency --config recipes/configs/bench/efficiency_gpu.yaml
    python -m recipes.bench.efficiency --size tiny --pairs 4 --length 16 --rounds 2 --output runs/tiny/results

Weights are random: the time does not depend on them. Extractors are timed in pooled form and in the literal form of
the equations (`mlp, literal`), all on one encoder, in rounds. Overheads are the median of the rounds' ratios, with its
95 % interval. `extractor alone` times nothing but the extractor, on given token vectors, against the same rounds'
plain forward: where it is a hundredth of that, the noise of two whole forwards hides it. `operations` are those of all
matrix products of a forward, over the plain one's: counted, so without noise.

bfloat16 on a CPU that only emulates it, many times slower than float32, says nothing of an extractor: such settings are
left out and named, and the training step is then float32. So are compiled ones where torch finds no C++ compiler; on a
CPU, where each graph takes it half a minute, they are of the pooled forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.bench.measure import (
    RESULTS,
    emulated,
    facts,
    interleave,
    paired_ratio,
    peak_memory,
    percentiles,
    show_left_out,
    show_overhead,
    table,
    write_results,
)
from recipes.schemas import make_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

SIZES = {
    # bert-base-multilingual-uncased
    "mbert": {"vocab_size": 105879},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "tiny": {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
}
KINDS = ("mlp", "poly", "gat")


@dataclass
class EfficiencyArguments:
    """Options of the efficiency bench."""

    output: str = field(default=RESULTS, metadata={"help": "Folder of efficiency.json and efficiency.md."})
    name: str = field(default="efficiency", metadata={"help": "Of the files."})
    size: Literal["mbert", "minilm", "tiny"] = field(default="mbert", metadata={"help": "Of the encoder."})
    pairs: int = field(default=100, metadata={"help": "Pairs a batch (the paper: 100)."})
    length: int = field(default=128, metadata={"help": "Tokens a pair (the paper: 128)."})
    rounds: int = field(default=5, metadata={"help": "Rounds; every variant is timed once in each."})
    patience: float = field(default=45.0, metadata={"help": "Seconds after which no 4th or later round begins."})
    settings: list[str] = field(
        default_factory=lambda: ["sdpa-float32", "sdpa-bfloat16"],
        metadata={"help": "Attention, precision, and whether compiled: eager-float32, sdpa-bfloat16-compiled..."},
    )
    literal: bool = field(default=True, metadata={"help": "The literal forms, too."})
    training_pairs: int = field(default=8, metadata={"help": "Pairs of a training step; 0 times none."})
    training_rounds: int = field(default=15, metadata={"help": "Rounds of the training step, whose times vary more."})


def efficiency(arguments: EfficiencyArguments) -> dict[str, Any]:
    """Measure every setting; return what efficiency.json holds.

    Raises:
        UserError: A setting is unknown, a number below 1, or this CPU multiplies none of the settings.
    """
    import torch
    from transformers import BertConfig

    from recipes.serve.plan import cpu_flags

    settings = {setting: read_setting(setting) for setting in arguments.settings}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flags = cpu_flags()
    precisions = {setting: precision for setting, (_, precision, _) in settings.items()}
    left_out = {} if device.type == "cuda" else emulated(precisions, flags)
    compiled_settings = [name for name, (_, _, compiled) in settings.items() if compiled and name not in left_out]
    if compiled_settings and (trouble := compiler_trouble(device)):
        left_out |= dict.fromkeys(compiled_settings, trouble)
    if len(left_out) == len(settings):
        reasons = "; ".join(dict.fromkeys(left_out.values()))
        raise UserError(f"--settings {' '.join(settings)}: {reasons}. Add sdpa-float32.")
    step = "bfloat16" if device.type == "cuda" or not emulated({"step": "bfloat16"}, flags) else "float32"
    for name in ("pairs", "length", "rounds", "training_rounds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: expected at least 1.")
    longest = BertConfig(**SIZES[arguments.size]).max_position_embeddings
    if arguments.length > longest:
        raise UserError(f"--length {arguments.length}: the encoder takes at most {longest} tokens.")
    make_folder(arguments.output)
    models, parameters = build_models(arguments.size, device, arguments.literal)
    config = models["plain"].config.encoder_config
    ids = torch.randint(5, config.vocab_size, (arguments.pairs, arguments.length), device=device)
    flops = forward_flops(config, arguments.pairs, arguments.length)
    content: dict[str, Any] = {
        "command": command_line("recipes.bench.efficiency", arguments),
        "facts": facts(to_dict(arguments)),
        "parameters": parameters,
        "forward_flops": flops,
        "settings": {},
        "left_out": left_out,
    }
    for name, (attention, precision, compiled) in settings.items():
        if name in left_out:
            continue
        for model in models.values():
            model.set_attn_implementation(attention)
            model.to(getattr(torch, precision)).eval()
        content["settings"][name] = measure_setting(models, ids, compiled, arguments, flops, name)
    if arguments.training_pairs:
        content["training_precision"] = step
        content["training"] = measure_training(models, ids[: arguments.training_pairs], arguments, step)
    return content


def read_setting(setting: str) -> tuple[str, str, bool]:
    """Read `sdpa-bfloat16-compiled`."""
    parts = setting.split("-")
    known = parts[0] in ("eager", "sdpa") and parts[1:2] in (["float32"], ["bfloat16"])
    if not known or parts[2:] not in ([], ["compiled"]):
        raise UserError(
            f"--settings {setting}: expected eager or sdpa, float32 or bfloat16, e.g. sdpa-bfloat16-compiled."
        )
    return parts[0], parts[1], len(parts) == 3


def compiler_trouble(device: torch.device) -> str | None:
    """Say why torch.compile cannot be timed here; None: it can."""
    import torch

    try:
        torch.compile(lambda numbers: numbers.sin() + 1)(torch.ones(3, device=device))
    except RuntimeError as error:  # of torch._dynamo, around whatever its backend raised
        return f"torch.compile does not work here: {str(error).strip().splitlines()[0]:.100}"
    return None


def build_models(size: str, device: torch.device, literal: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """Return models by variant, all on one encoder, and the parameters of each kind."""
    import torch
    from transformers import BertConfig

    from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification
    from recipes.bench.literal import LiteralExtractor

    torch.manual_seed(0)
    # The paper's head: six classes, BGE-M3's 1024 numbers, so that Table 2's counts come out.
    head = {"num_labels": 6, "reasoning_dim": 1024}
    encoder = None
    models: dict[str, Any] = {}
    parameters = {}
    for variant in ("plain", *KINDS):
        kind = "none" if variant == "plain" else variant
        config = LRKDConfig(encoder_config=BertConfig(**SIZES[size]), extractor_type=kind, **head)
        if encoder is None:
            model = LRKDForSequenceClassification(config)
            encoder = model.encoder
            parameters[variant] = model.num_parameters()
        else:
            with torch.device("meta"):
                model = LRKDForSequenceClassification(config)
            parameters[variant] = model.num_parameters()
            model.encoder = encoder
            for module in (model.extractor, model.reasoning_projection, model.classifier):
                module.to_empty(device="cpu")
                for parameter in module.parameters():
                    torch.nn.init.normal_(parameter, std=0.02)
        models[variant] = model.to(device)
    for kind in KINDS if literal else ():
        with torch.device("meta"):
            model = LRKDForSequenceClassification(models[kind].config)
        model.encoder, model.classifier = models[kind].encoder, models[kind].classifier
        model.reasoning_projection = models[kind].reasoning_projection
        model.extractor = LiteralExtractor(models[kind].extractor, kind)
        models[f"{kind}, literal"] = model
    return models, parameters


def forward_flops(config: Any, pairs: int, length: int) -> float:
    """Return the floating-point operations of the encoder's matrix products in one forward pass."""
    hidden, inner = config.hidden_size, config.intermediate_size
    token = 2 * (4 * hidden * hidden + 2 * hidden * inner) + 4 * length * hidden
    return float(config.num_hidden_layers * token * pairs * length)


def synchronised(function: Callable[[], Any]) -> Callable[[], None]:
    """Wait for the GPU after `function`, so that its time is the work's."""
    import torch

    def call() -> None:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return call


def measure_setting(
    models: dict[str, Any], ids: torch.Tensor, compiled: bool, arguments: EfficiencyArguments, flops: float, name: str
) -> dict[str, Any]:
    """Time all variants in one attention implementation and precision."""
    import torch

    torch.compiler.reset()  # what another setting compiled counts towards a limit
    # Graph replay on a GPU: nothing else hides the launches of 12 layers.
    mode = "reduce-overhead" if ids.is_cuda else "default"
    mask = torch.ones_like(ids)
    forwards: dict[str, Callable[[], Any]] = {}
    for variant, model in models.items():
        if compiled and not ids.is_cuda and "literal" in variant:
            continue
        call = torch.compile(model, mode=mode) if compiled else model
        forwards[variant] = synchronised(lambda call=call: call(input_ids=ids))  # no padding: no mask
    hidden = torch.randn(*ids.shape, models["plain"].config.hidden_size, device=ids.device, dtype=models["plain"].dtype)
    alone = {
        f"{variant} alone": synchronised(lambda extractor=model.extractor: extractor(hidden, mask))
        for variant, model in models.items()
        if model.extractor is not None
    }
    result: dict[str, Any] = {"variants": {}}
    operations = {variant: count_operations(models[variant], ids) for variant in forwards}
    with torch.inference_mode():
        seconds = interleave({**forwards, **({} if compiled else alone)}, arguments.rounds, name, arguments.patience)
        for variant, forward in forwards.items():
            with peak_memory() as memory:
                forward()
            measured = {"milliseconds": percentiles([1000 * value for value in seconds[variant]]), **memory}
            measured["over_plain"] = paired_ratio(seconds[variant], seconds["plain"])
            measured["operations"] = operations[variant]
            measured["operations_over_plain"] = operations[variant] / operations["plain"]
            if f"{variant} alone" in seconds:
                share = paired_ratio(seconds[f"{variant} alone"], seconds["plain"])
                measured["alone_over_plain"] = {key: 1 + value for key, value in share.items()}
            result["variants"][variant] = measured
        rate = flops / (result["variants"]["plain"]["milliseconds"]["p50"] / 1000)
        peak = matmul_flops_per_second(models["plain"].dtype, ids.device)
    return result | {"matmul_peak_flops_per_second": peak, "share_of_matmul_peak": rate / peak}


def count_operations(model: nn.Module, ids: torch.Tensor) -> int:
    """Count the floating-point operations of the matrix products of a forward pass; of attention's, too."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # sdpa on a CPU is one operation that is not counted
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids[:1])
    model.set_attn_implementation(attention)
    return counter.get_total_flops() * len(ids)


def matmul_flops_per_second(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the best rate of a large square product, in this precision, here and now."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = interleave({"product": synchronised(lambda: left @ right)}, 20, "matrix peak")["product"]
    return 2 * size**3 / min(times)


def measure_training(
    models: dict[str, Any], ids: torch.Tensor, arguments: EfficiencyArguments, precision: str
) -> dict[str, Any]:
    """Time a step of AdamW of plain BERT and of LRKD-GAT, guidance included, in float32 or in bfloat16 autocast."""
    import torch

    def stepper(model: nn.Module, guided: bool) -> Callable[[], None]:
        model.float().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        labels = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        inputs = {"input_ids": ids, "labels": labels}
        if guided:
            inputs["cot_embeddings"] = torch.randn(len(ids), model.config.reasoning_dim, device=ids.device)

        def step() -> None:
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return synchronised(step)

    steps = {"plain": stepper(models["plain"], False), "gat": stepper(models["gat"], True)}
    seconds = interleave(steps, arguments.training_rounds, "training step", arguments.patience)
    result = {}
    for variant, step in steps.items():
        with peak_memory() as memory:
            step()
        milliseconds = percentiles([1000 * value for value in seconds[variant]])
        ratio = paired_ratio(seconds[variant], seconds["plain"])
        result[variant] = {"milliseconds": milliseconds, "over_plain": ratio, **memory}
    return result


def format_tables(content: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    options, parts = content["facts"]["arguments"], []
    megabytes = 2**20
    for name, setting in content["settings"].items():
        rows = []
        for variant, values in setting["variants"].items():
            kind = variant.split(",")[0]
            time = values["milliseconds"]
            rows.append(
                {
                    name: variant,
                    "parameters": f"{content['parameters'][kind] / 1e6:.2f} M",
                    "p50": f"{time['p50']:.1f} ms",
                    "p95": f"{time['p95']:.1f} ms",
                    "p99": f"{time['p99']:.1f} ms",
                    "peak memory": f"{values['peak_bytes'] / megabytes:.0f} MiB",
                    "over plain": "" if variant == "plain" else show_overhead(values["over_plain"]),
                    "operations": "" if variant == "plain" else f"{100 * (values['operations_over_plain'] - 1):+.2f} %",
                    "extractor alone": show_overhead(values["alone_over_plain"])
                    if "alone_over_plain" in values
                    else "",
                }
            )
        share, peak = setting["share_of_matmul_peak"], setting["matmul_peak_flops_per_second"]
        note = f"The plain forward reaches {100 * share:.0f} % of the matrix peak measured here"
        parts.append(f"{table(rows)}\n\n{note}, {peak / 1e12:.2f} TFLOP/s.")
    if "training" in content:
        rows = [
            {
                "training step": variant,
                "p50": f"{values['milliseconds']['p50']:.0f} ms",
                "peak memory": f"{values['peak_bytes'] / megabytes:.0f} MiB",
                "over plain": "" if variant == "plain" else show_overhead(values["over_plain"]),
            }
            for variant, values in content["training"].items()
        ]
        precision = "float32" if content["training_precision"] == "float32" else "bfloat16 autocast"
        pairs = min(options["training_pairs"], options["pairs"])  # the same batch, or its first rows
        parts.append(f"{pairs} pairs, AdamW, {precision}, guidance included.\n\n{table(rows)}")
    head = f"{options['pairs']} pairs of {options['length']} tokens, {options['size']}.\n\n"
    return head + "\n\n".join(parts) + show_left_out(content["left_out"])


def main() -> None:
    """Measure from the command line."""
    arguments = parse(EfficiencyArguments, __doc__)
    content = efficiency(arguments)
    write_results(arguments.output, arguments.name, content, format_tables(content))
    print("Next: python -m recipes.bench.throughput")


if __name__ == "__main__":
    run(main)
