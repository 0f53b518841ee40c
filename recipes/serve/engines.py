"""The engines of a scorer: a padded batch of token ids in, logits out, callable from several threads at once."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Engine = Callable[[Mapping[str, "NDArray[np.int64]"]], NDArray[np.float32]]


def torch_engine(folder: Path, precision: str, threads: int) -> Engine:
    """Return the plain forward, on a GPU if there is one; `threads` is set for the whole process.

    Raises:
        UserError: The weights are missing, damaged, or not those of a classifier.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    import modeling_lrkd  # noqa: F401  registers the lrkd classes

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads)
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=getattr(torch, precision), output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: not a loadable student: {' '.join(str(error).split())}") from None
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"]))
        raise UserError(f"{folder}: the weights lack {missing}, which would be random. Pass a trained student.")
    model = model.to(device).eval()

    def run(batch: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        with torch.inference_mode():  # of this thread only, so it cannot stand around
            logits = model(**{name: torch.from_numpy(values).to(device) for name, values in batch.items()}).logits
            return logits.float().cpu().numpy()

    return run


def onnx_engine(path: Path, threads: int, streams: int) -> Engine:
    """Return ONNX Runtime on one session, whose weights all streams share."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(1, threads // streams)
    options.inter_op_num_threads = 1
    # A waiting thread that spins takes the core from another stream.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    wanted = {node.name for node in session.get_inputs()}

    def run(batch: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        return session.run(["logits"], {name: values for name, values in batch.items() if name in wanted})[0]

    return run


def openvino_engine(path: Path, precision: str, threads: int, streams: int) -> Engine:
    """Return OpenVINO with one infer request a stream; int8 keeps what lies between its products in bfloat16."""
    import numpy as np
    import openvino

    from recipes.serve.plan import cpu_flags, multiplied

    low = precision != "float32" and "bfloat16" in multiplied(cpu_flags())
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if low else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": streams,
        "ENABLE_CPU_PINNING": False,  # two scorers on one machine would sit on the same core
    }
    # OpenVINO's fused attention is slower than its single nodes at these lengths (short texts, profiled),
    # and further from the plain forward. The option is not a documented one, and a version may not know it.
    try:
        compiled = openvino.Core().compile_model(path, "CPU", {**options, "SNIPPETS_MODE": "DISABLE"})
    except RuntimeError:
        compiled = openvino.Core().compile_model(path, "CPU", options)
    wanted = {name for node in compiled.inputs for name in node.names}
    logits = compiled.output("logits")
    idle: queue.LifoQueue[Any] = queue.LifoQueue()
    for _ in range(streams):
        request = compiled.create_infer_request()
        # Two threads that hand OpenVINO their first arrays at the same moment can wait for each other for ever.
        request.infer({name: np.ones((1, 4), dtype=np.int64) for name in wanted}, share_inputs=True)
        request.get_tensor(logits).data.copy()
        idle.put(request)

    def run(batch: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        request = idle.get()
        try:
            request.infer({name: values for name, values in batch.items() if name in wanted}, share_inputs=True)
            return request.get_tensor(logits).data.copy()  # the request writes its next result to the same place
        finally:
            idle.put(request)

    return run
