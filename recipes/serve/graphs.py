"""The graphs of an export: a student as ONNX, and its int8 forms for ONNX Runtime and for OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError
from recipes.serve.plan import FILES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OPSET = 18


def save_float32(model_folder: str, output: Path) -> float:
    """Save the student and `onnx/model.onnx`; return the largest difference from the plain forward.

    Raises:
        UserError: It is above 1e-4.
    """
    import logging
    import warnings

    import numpy as np
    import onnxruntime
    import torch
    from torch import nn
    from transformers import AutoTokenizer

    from modeling_lrkd import LRKDForSequenceClassification
    from recipes.student.saving import save_tokenizer

    # Eager attention: plain products and softmax, which both runtimes know how to fuse.
    model = LRKDForSequenceClassification.from_pretrained(model_folder, attn_implementation="eager").float().eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model.save_pretrained(output)
    save_tokenizer(tokenizer, output)
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids" or takes_segments(model)]
    outputs = ["logits"] if model.config.extractor_type == "none" else ["logits", "latent_reasoning"]
    outputs += [] if model.config.perspectives is None else ["perspective_weights"]  # what the gate says of a pair

    class Exported(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            result = self.model(**dict(zip(names, inputs, strict=True)))
            return tuple(result[name] for name in outputs)

    generator = torch.Generator().manual_seed(0)

    def example(rows: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, model.config.vocab_size, (rows, length), generator=generator)
        valid = torch.randint(1, length + 1, (rows, 1), generator=generator)
        mask = (torch.arange(length) < valid).long()
        segments = (torch.arange(length) > valid // 2).long() * mask
        return {name: {"input_ids": ids, "attention_mask": mask}.get(name, segments) for name in names}

    path = output / FILES["onnx-float32"]
    path.parent.mkdir(parents=True)
    dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        torch.onnx.export(
            Exported(),
            tuple(example(3, 17).values()),
            path,
            input_names=names,
            output_names=outputs,
            opset_version=OPSET,
            dynamo=True,  # the older tracer gives other values for these models
            dynamic_shapes=(tuple(dimensions for _ in names),),
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    largest = 0.0
    for rows, length in ((1, 1), (2, 31), (5, 8)):
        batch = example(rows, length)
        with torch.inference_mode():
            expected = model(**batch)
        found = session.run(outputs, {name: values.numpy() for name, values in batch.items()})
        largest = max(
            largest, *(float(np.abs(expected[n].numpy() - f).max()) for n, f in zip(outputs, found, strict=True))
        )
    if not largest <= 1e-4:
        raise UserError(f"{model_folder}: the exported graph differs from the plain forward by {largest:.2g}.")
    return largest


def takes_segments(model: Any) -> bool:
    """Whether the encoder reads `token_type_ids`."""
    import inspect

    return "token_type_ids" in inspect.signature(model.encoder.forward).parameters


def quantise_onnx(folder: Path) -> None:
    """Write `onnx/model_int8.onnx`: weights of the products in int8 per channel, activations as they come."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(folder / FILES["onnx-float32"])
    del graph.graph.value_info[:]  # the quantiser transposes weights whose recorded shapes would then be wrong
    quantize_dynamic(
        graph,
        folder / FILES["onnx-int8"],
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )


def quantise_openvino(folder: Path, batches: list[dict[str, NDArray[np.int64]]]) -> None:
    """Write the OpenVINO model: weights and activations in int8, ranges from the calibration batches.

    Products of two activations, attention's, stay as they are: in int8 they cost more to lay out anew than they save,
    and most of the error.
    """
    import logging

    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    graph = openvino.Core().read_model(folder / FILES["onnx-float32"])
    quantised = nncf.quantize(
        graph,
        nncf.Dataset(batches),
        # Symmetric activations: zero points cost the matrix units a fifth of their speed.
        preset=nncf.QuantizationPreset.PERFORMANCE,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
        ignored_scope=nncf.IgnoredScope(names=products_of_activations(graph)),
    )
    path = folder / FILES["openvino-int8"]
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(quantised, path, compress_to_fp16=False)


def products_of_activations(graph: Any) -> list[str]:
    """Return the names of the matrix products of an OpenVINO graph that multiply no weights."""

    def is_weight(value: Any) -> bool:
        node = value.get_node()
        if node.get_type_name() in ("Convert", "Transpose", "Reshape"):  # of a weight, it is one
            return is_weight(node.input_value(0))
        return node.get_type_name() == "Constant"

    products = (node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul")
    return [node.get_friendly_name() for node in products if not any(map(is_weight, node.input_values()))]
