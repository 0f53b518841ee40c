"""The peers of the throughput bench: what one writes with each library, sorted batches and all cores included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pairs = list[tuple[str, str]]
    # Pairs and a batch size to probabilities (pairs, labels).
    Peer = Callable[[Pairs, int], NDArray[np.float32]]

BATCH_SIZES = (16, 32, 64, 128)


def cross_encoder(folder: Path, precision: str) -> Peer:
    """Return `sentence_transformers.CrossEncoder.predict`, which sorts by length itself."""
    import torch
    from sentence_transformers import CrossEncoder

    import modeling_lrkd  # noqa: F401  registers the lrkd classes

    model = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": getattr(torch, precision)})

    def predict(pairs: Pairs, batch_size: int) -> NDArray[np.float32]:
        return model.predict(pairs, batch_size=batch_size, apply_softmax=True, show_progress_bar=False)

    return predict


def loop(folder: Path, run: Callable[[dict[str, NDArray[np.int64]]], NDArray[np.float32]]) -> Peer:
    """Return the loop that documentation shows around a runtime: sort, tokenise, run, softmax; batch after batch."""
    import numpy as np
    from scipy.special import softmax
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def predict(pairs: Pairs, batch_size: int) -> NDArray[np.float32]:
        order = np.argsort([-len(query) - len(product) for query, product in pairs], kind="stable")
        parts = []
        for start in range(0, len(pairs), batch_size):
            queries, products = zip(*(pairs[row] for row in order[start : start + batch_size]), strict=True)
            batch = tokenizer(list(queries), list(products), truncation=True, padding=True, return_tensors="np")
            parts.append(softmax(run({name: values.astype(np.int64) for name, values in batch.items()}), axis=1))
        probabilities = np.empty((len(pairs), parts[0].shape[1]), dtype=np.float32)
        probabilities[order] = np.concatenate(parts)
        return probabilities

    return predict


def onnx_peer(folder: Path, threads: int, int8: bool) -> Peer:
    """Return ONNX Runtime with its default session; int8 as its documentation makes it, dynamic and per tensor."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    from recipes.serve.plan import FILES

    path = folder / FILES["onnx-float32"]
    if int8:
        graph = onnx.load(path)
        del graph.graph.value_info[:]
        path = path.with_name("peer_int8.onnx")
        quantize_dynamic(graph, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    wanted = {node.name for node in session.get_inputs()}
    return loop(folder, lambda batch: session.run(["logits"], {key: batch[key] for key in batch if key in wanted})[0])


def openvino_peer(folder: Path, threads: int, precision: str) -> Peer:
    """Return OpenVINO on one stream of all cores."""
    import openvino

    from recipes.serve.plan import FILES

    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(folder / FILES["openvino-float32"], "CPU", options)
    wanted = {name for node in compiled.inputs for name in node.names}
    return loop(folder, lambda batch: compiled({key: batch[key] for key in batch if key in wanted})["logits"])


def fastest_batch_size(peer: Peer, pairs: Pairs) -> int:
    """Return the batch size at which a peer is fastest: the best of two runs each."""
    import time

    def seconds(batch_size: int) -> float:
        started = time.perf_counter()
        peer(pairs, batch_size)
        return time.perf_counter() - started

    peer(pairs[:32], 32)
    return min(BATCH_SIZES, key=lambda size: min(seconds(size), seconds(size)))
