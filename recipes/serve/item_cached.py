"""Score one query against many stored products: its own tokens below, both texts above, nothing twice.

    from recipes.serve.item_cached import ItemCachedScorer

    scorer = ItemCachedScorer("runs/esci/item_cached", "runs/esci/store", backend="openvino", precision="bfloat16")
    probabilities = scorer.score("usb c cable", ["USB-C cable, 2 m", "Desk lamp"])      # (2, labels), by name

A store is made by `recipes.serve.encode_products`. With a float32 store, float32 gives the probabilities of the plain
forward over whole pairs (to 1e-4). The lower layers run over the query once; products come from the store, sorted by
length, and each batch goes through the joint layers while the next one is gathered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from recipes.arguments import UserError
from recipes.serve.encode_products import batches, query_tokens
from recipes.serve.plan import cpu_flags, multiplied
from recipes.serve.product_store import ProductStore, load_student
from recipes.serve.scorer import longest_input, served_probabilities

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from modeling_lrkd import LRKDForSequenceClassification

BATCH_TOKENS = 2048
LENGTH_STEP = 4  # lengths are rounded up to it: OpenVINO prepares each new shape once


class ItemCachedScorer:
    """A student and its store of products.

    Args:
        model: The student that made the store: a folder or a name on the Hub.
        store: Folder of the store.
        backend: Of the joint layers: `torch`, or `openvino` (extra `export`), which is faster.
        precision: Of the joint layers. bfloat16 is for CPUs that multiply it; on another one float32 takes its place,
            with a warning.
        threads: CPU threads (None: as torch has them). OpenVINO runs a batch a thread.

    Attributes:
        labels: Names of the classes, in the order of the columns.
        precision: Of the joint layers, as they are computed.

    Raises:
        UserError: The model cannot be loaded, reads query and product together, or did not make the store.
    """

    def __init__(
        self,
        model: str,
        store: str | Path,
        backend: Literal["torch", "openvino"] = "torch",
        precision: Literal["float32", "bfloat16"] = "float32",
        threads: int | None = None,
    ) -> None:
        import torch

        if threads is not None and threads < 1:
            raise UserError(f"threads: expected 1 or more, got {threads}.")
        self.model, self.tokenizer, identity = load_student(model)
        self.store = ProductStore(store, identity)
        self.labels = identity.labels
        self.threads = threads or torch.get_num_threads()
        torch.set_num_threads(self.threads)
        if precision not in multiplied(cpu_flags()):
            # torch would emulate it, many times slower than float32; OpenVINO would take float32 and not say so.
            reason = f"this CPU has no instructions for {precision}: the joint layers are computed in float32 instead"
            warnings.warn(reason, stacklevel=2)
            precision = "float32"
        self.precision = precision
        run = {"torch": _torch_runner, "openvino": _openvino_runner}[backend]
        self._run: Runner = run(self.model, precision, self.threads)

    def score(self, query: str, products: Sequence[str]) -> NDArray[np.float32]:
        """Return class probabilities of the query with each product, float32 `(products, labels)`, in their order.

        Args:
            query: Its text; never cut.
            products: Titles or product_ids, whichever the store is keyed by.

        Raises:
            UserError: A product is not in the store, its stored vectors are damaged, the query is blank or too long, or
                logits are not finite.
        """
        if not isinstance(query, str):
            raise UserError(f"query: is {query!r:.60}; expected text.")
        if not query.strip():
            raise UserError("query: is blank; expected some text.")
        if len(products) == 0:
            return np.empty((0, len(self.labels)), dtype=np.float32)
        rows = self.store.find(products)
        ids, vectors = self.encode_query(query)  # (query tokens,), (query tokens, hidden)
        chunks = list(batches((self.store.lengths[rows]).tolist(), max(1, BATCH_TOKENS - len(vectors))))
        logits = np.empty((len(rows), len(self.labels)), dtype=np.float32)
        inputs = (self._join(ids, vectors, rows[chunk]) for chunk in chunks)
        for chunk, result in zip(chunks, self._run(inputs), strict=True):
            logits[chunk] = result
        finite = np.isfinite(logits).all(axis=1)
        if not finite.all():
            name = products[int(np.argmin(finite))]
            raise UserError(f"product {name!r:.60}: the model's logits are NaN or infinite. Its weights are damaged.")
        return served_probabilities(self.model.config, logits)

    def encode_query(self, query: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the lower layers over a query: its token ids `(tokens,)` and their vectors `(tokens, hidden)`."""
        import torch

        ids = query_tokens(self.tokenizer, query)
        longest = longest_input(self.tokenizer, self.model.config) - self.store.manifest["max_product_tokens"]
        if len(ids) > longest:
            raise UserError(
                f"The query {query[:60]!r}... has {len(ids)} tokens; beside a product of this store there is room for "
                f"{longest}. Shorten it, or encode the products with a smaller --max_product_tokens."
            )
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            return tokens[0], self.model.encode_segment(tokens, torch.ones(1, len(ids)), segment=0)[0]

    def _join(self, ids: torch.Tensor, query: torch.Tensor, rows: NDArray[np.int64]) -> Inputs:
        """Put the query beside some products: what `score_together` takes."""
        import torch

        lengths = self.store.lengths[rows]
        longest = int(lengths.max())
        longest += -(len(query) + longest) % LENGTH_STEP
        vectors = torch.empty(len(rows), longest, query.shape[1])
        mask = torch.from_numpy(np.arange(len(query) + longest) < len(query) + lengths[:, None]).long()
        if self.model.match_marks is None:
            self.store.read_into(rows, vectors)
            return query, vectors, mask
        tokens = ids.new_empty(len(rows), longest)
        self.store.read_into(rows, vectors, tokens)
        return query, vectors, mask, ids, tokens


Inputs = tuple[Any, ...]
Runner = Callable[[Iterator[Inputs]], Iterator[Any]]


def score_together(
    model: LRKDForSequenceClassification,
    query: torch.Tensor,
    products: torch.Tensor,
    mask: torch.Tensor,
    query_ids: torch.Tensor | None = None,
    product_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return logits of one query with each product, `(products, labels)`.

    Args:
        model: The student.
        query: Vectors of the query, `(query length, hidden)`.
        products: Of the products, `(products, length, hidden)`.
        mask: 1 for tokens, 0 for padding, `(products, query length + length)`.
        query_ids: Token ids of the query, `(query length,)`; of a student with `match_marks`, as the next.
        product_ids: Of the products, `(products, length)`.
    """
    import torch

    query = query.expand(products.shape[0], -1, -1)
    if query_ids is None or product_ids is None:
        return model.classify_together(query, products, mask)
    query_ids = query_ids.expand(products.shape[0], -1)
    ids = torch.cat([query_ids, product_ids], dim=1)
    segments = torch.cat([torch.zeros_like(query_ids), torch.ones_like(product_ids)], dim=1)
    met = model.mark_matches(torch.cat([query, products], dim=1), ids, segments, mask.bool())
    return model.classify_together(met[:, : query.shape[1]], met[:, query.shape[1] :], mask)


def _torch_runner(model: LRKDForSequenceClassification, precision: str, threads: int) -> Runner:
    """Return what maps batches of `_join` to logits `(batch, labels)`, in their order."""
    import copy

    import torch

    dtype = getattr(torch, precision)
    upper = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)

    def run(inputs: Iterator[Inputs]) -> Iterator[Any]:
        with torch.inference_mode():
            for query, products, *others in inputs:
                yield score_together(upper, query.to(dtype), products.to(dtype), *others).float().numpy()

    return run


def _openvino_runner(model: LRKDForSequenceClassification, precision: str, threads: int) -> Runner:
    """As `_torch_runner`: the joint layers as one graph, a stream a thread, so that no core waits for another."""
    import openvino
    import torch

    class Upper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return score_together(self.model, *inputs)

    size = model.config.hidden_size
    example: Inputs = (torch.zeros(3, size), torch.zeros(2, 5, size), torch.ones(2, 8, dtype=torch.long))
    if model.match_marks is not None:
        example += (torch.zeros(3, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long))
    with torch.inference_mode():
        graph = openvino.convert_model(Upper().eval(), example_input=example)
    options = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        "NUM_STREAMS": str(threads),
        "INFERENCE_NUM_THREADS": threads,
    }
    queue = openvino.AsyncInferQueue(openvino.compile_model(graph, "CPU", options), threads)

    def run(inputs: Iterator[Inputs]) -> Iterator[Any]:
        found: dict[int, Any] = {}
        queue.set_callback(lambda request, number: found.__setitem__(number, request.get_output_tensor(0).data.copy()))
        for number, tensors in enumerate(inputs):
            queue.start_async([tensor.numpy() for tensor in tensors], number)
        queue.wait_all()
        return iter([found[number] for number in range(len(found))])

    run(iter([example]))  # as in recipes.serve.engines: first arrays, before there are two threads
    return run
