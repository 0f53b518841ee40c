"""Score (query, product) pairs with a student, as fast as this machine can, for any iterable of them.

```python
with Scorer("runs/demo/exported") as scorer:
    for probabilities in scorer.score([("usb c cable", "USB-C cable, 2 m"), ("usb c cable", "Desk lamp")]):
        print(dict(zip(scorer.labels, probabilities)))
```

Pairs are read a window at a time, tokenised on a thread of their own while the window before is being scored, sorted
by length, and batched by tokens rather than by pairs. Each core works on a batch of its own. Results come in the order
of the input; memory does not grow with it.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.arguments import UserError
from recipes.serve.engines import onnx_engine, openvino_engine, torch_engine
from recipes.serve.plan import EXPORT, FILES, plan_for

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# No word piece comes from more characters than this; what lies behind is cut before it costs time.
CHARACTERS_PER_TOKEN = 100
WINDOW = 8192  # pairs that are sorted together, at most
FIRST_WINDOW = 512
# Widths of batches: few of them, because an engine prepares its kernels anew for each, and none that is odd for
# matrix units, which take 8-bit numbers by fours.
ROUND_TO = 4


class RowError(UserError):
    """A row of the input cannot be scored; names it, counted from 0."""


@dataclass(frozen=True)
class Batch:
    """Rows of a window that the engine takes at once: their places in it, and padded inputs `(rows, longest)`."""

    rows: NDArray[np.int64]
    inputs: Mapping[str, NDArray[np.int64]]


@dataclass
class Window:
    """Pairs that are sorted together: row number of the first, how many, their batches, and what scores those."""

    first: int
    rows: int
    batches: Future[list[Batch]]
    scored: list[tuple[Batch, Future[NDArray[np.float32]]]] = field(default_factory=list)


def token_batches(lengths: Sequence[int], budget: int) -> list[NDArray[np.int64]]:
    """Group rows, longest first, so that rows times the longest of them stay within `budget` tokens.

    Raises:
        ValueError: One row alone is longer than the budget.

    Example:
        >>> [batch.tolist() for batch in token_batches([3, 9, 4, 2], budget=12)]
        [[1], [2, 0, 3]]
    """
    import numpy as np

    order = np.argsort([-length for length in lengths], kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = lengths[order[start]]
        if longest > budget:
            raise ValueError(f"a row of {longest} tokens does not fit into a batch of {budget}.")
        batches.append(order[start : start + budget // longest])
        start += len(batches[-1])
    return batches


def served_probabilities(config: Any, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn logits `(rows, labels)` into the probabilities that the task `lrkd-relevance` serves: calibrated."""
    import torch

    served = torch.from_numpy(logits)
    if config.model_type == "lrkd":  # a plain classifier has no calibration of its own
        served = config.calibrated(served)
    return served.softmax(dim=1).numpy()


class Scorer:
    """A student on the fastest engine of this machine.

    Args:
        folder: A student (`backend="torch"`), or what `recipes.serve.export` made of one.
        backend: `auto` takes the fastest that was exported and is installed.
        precision: `auto` takes the lowest that passed the export's guard and that the CPU multiplies. One that it
            does not multiply is replaced by one that it does, with a warning.
        threads: Cores to use; all that this process may by default.
        streams: Batches at a time; by default one a core, and one for torch.
        tokens_per_batch: Most tokens a batch, padding included. 1024 fit a core's cache; a GPU wants more.
        max_length: Tokens of query and product together; the longer of the two is cut first. By default the
            tokenizer's own, as far as the encoder goes.

    Attributes:
        labels: Class names, in the order of the probabilities.
        form: Engine and precision that score, e.g. `openvino-int8`.

    Raises:
        UserError: The folder holds no student, the engine is not there, or an option has a value it cannot have.
    """

    def __init__(
        self,
        folder: str | Path,
        backend: Literal["auto", "torch", "onnx", "openvino"] = "auto",
        *,
        precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto",
        threads: int | None = None,
        streams: int | None = None,
        tokens_per_batch: int = 1024,
        max_length: int | None = None,
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer
        from transformers.utils import logging

        import modeling_lrkd  # noqa: F401  registers the lrkd configuration

        logging.disable_progress_bar()  # of loading weights
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json there. Pass the folder of a student or of its export.")
        for name, value in (("threads", threads), ("streams", streams), ("max_length", max_length)):
            if value is not None and value < 1:
                raise UserError(f"{name}: expected at least 1, got {value}.")
        try:
            config = AutoConfig.from_pretrained(folder)
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: not a loadable student: {' '.join(str(error).split())}") from None
        if config.num_labels != len(config.id2label):
            raise UserError(f"{folder}: saved with ranking_view. Set it to false in its config.json.")
        self.labels = [config.id2label[index] for index in range(config.num_labels)]
        self.config = config
        longest = longest_input(self.tokenizer, config)
        self.max_length = longest if max_length is None else max_length
        if self.max_length > longest:
            raise UserError(f"max_length: {folder} takes at most {longest} tokens, got {max_length}.")
        if tokens_per_batch < self.max_length:
            raise UserError(
                f"tokens_per_batch: expected at least max_length, {self.max_length}, so that every pair fits into a "
                f"batch; got {tokens_per_batch}."
            )
        self.tokens_per_batch = tokens_per_batch
        plan = plan_for(folder, backend, precision)
        if plan.backend != "torch" and not (folder / FILES[plan.form]).is_file():
            raise UserError(f"{folder / FILES[plan.form]}: no such file, though {EXPORT} names it. Export again.")
        self.form = plan.form
        self.threads = threads or usable_cores()
        self.streams = streams or (1 if plan.backend == "torch" else self.threads)
        if plan.backend == "torch":
            self._run = torch_engine(folder, plan.precision, self.threads)
        elif plan.backend == "onnx":
            self._run = onnx_engine(folder / FILES[plan.form], self.threads, self.streams)
        else:
            self._run = openvino_engine(folder / FILES[plan.form], plan.precision, self.threads, self.streams)
        self._workers = ThreadPoolExecutor(self.streams, "scorer")
        self._tokenising = ThreadPoolExecutor(1, "tokenise")  # fast tokenizers do not like two threads at once

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; what was not yet begun is not scored."""
        self._tokenising.shutdown(cancel_futures=True)
        self._workers.shutdown(cancel_futures=True)

    def score(
        self, pairs: Iterable[tuple[str, str]], *, progress: bool = False, window: int = WINDOW
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the class probabilities `(labels,)` of each pair, in the order of the input.

        Args:
            pairs: (query, product) texts; read as they are needed, in the thread that asks for the results.
            progress: Show a progress bar; in a log, a state every ten seconds.
            window: Pairs that are sorted by length together. At most three windows are held at a time.

        Raises:
            UserError: A row is not a pair of texts, or its logits are not finite; the message names the row, counted
                from 0. What comes before its window has then been yielded. Or `window` is below 1.
        """
        from tqdm import tqdm

        if window < 1:  # or nothing would come out, without a word
            raise UserError(f"window: expected at least 1, got {window}.")
        total = len(pairs) if isinstance(pairs, Sequence) else None
        rows = iter(pairs)
        scoring: deque[Window] = deque()
        bar_options = {"mininterval": progress_interval(), "disable": not progress}
        with tqdm(total=total, unit="pair", desc="score", **bar_options) as bar:
            # Small windows first: the cores need not wait until thousands of texts are tokenised.
            prepared = self._prepare_next(rows, 0, min(FIRST_WINDOW, window))
            try:
                while prepared is not None:
                    end = prepared.first + prepared.rows
                    following = self._prepare_next(rows, end, min(2 * prepared.rows, window))
                    for batch in prepared.batches.result():
                        prepared.scored.append((batch, self._workers.submit(self._run, batch.inputs)))
                    scoring.append(prepared)
                    while len(scoring) > 1:
                        yield from self._finish(scoring.popleft(), bar)
                    prepared = following
                while scoring:
                    yield from self._finish(scoring.popleft(), bar)
            except RowError:  # of a window that is not yet being scored
                while scoring:
                    yield from self._finish(scoring.popleft(), bar)
                raise
            finally:  # also when the caller stops asking
                for unfinished in scoring:
                    for _, result in unfinished.scored:
                        result.cancel()

    def prepare(self, chunk: Sequence[tuple[str, str]], first: int = 0) -> list[Batch]:
        """Check, tokenise, sort and pad the rows of one window, of which the first is row `first` of the input."""
        import numpy as np

        longest = CHARACTERS_PER_TOKEN * self.max_length
        queries, products = [], []
        for row, pair in enumerate(chunk, start=first):
            query, product = checked_pair(pair, row)
            queries.append(query[:longest])
            products.append(product[:longest])
        try:
            encoded = self.tokenizer(queries, products, truncation=True, max_length=self.max_length)
        except TypeError:  # half of a surrogate pair, which JSON and str can hold, and no tokenizer
            for row, texts in enumerate(zip(queries, products, strict=True), start=first):
                try:
                    "".join(texts).encode()
                except UnicodeEncodeError as error:
                    half = error.object[error.start]
                    raise RowError(f"row {row}: {half!r} is half a character. Decode the text again.") from None
            raise
        lengths = [len(tokens) for tokens in encoded["input_ids"]]
        widths = [min(-(-length // ROUND_TO) * ROUND_TO, self.max_length) for length in lengths]
        # A request of a few pairs is shared out among the streams, too: twice as many batches even out their ends.
        share = -(-sum(widths) // (2 * self.streams))
        budget = max(min(self.tokens_per_batch, share), *widths)
        padding = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": 0, "attention_mask": 0}
        batches = []
        for rows in token_batches(widths, budget):
            inputs = {}
            for name, values in encoded.items():
                padded = np.full((len(rows), widths[rows[0]]), padding[name], dtype=np.int64)
                for place, row in enumerate(rows):
                    padded[place, : lengths[row]] = values[row]
                inputs[name] = padded
            batches.append(Batch(rows, inputs))
        return batches

    def _prepare_next(self, rows: Iterator[tuple[str, str]], first: int, size: int) -> Window | None:
        chunk = list(itertools.islice(rows, size))
        return Window(first, len(chunk), self._tokenising.submit(self.prepare, chunk, first)) if chunk else None

    def _finish(self, window: Window, bar: Any) -> Iterator[NDArray[np.float32]]:
        import numpy as np

        logits = np.empty((window.rows, len(self.labels)), dtype=np.float32)
        for batch, result in window.scored:
            logits[batch.rows] = result.result()
            bar.update(len(batch.rows))
        finite = np.isfinite(logits).all(axis=1)
        if not finite.all():
            row = window.first + int(np.argmin(finite))
            raise UserError(f"row {row}: the model's logits are NaN or infinite. Its weights are damaged.")
        # Once a window: batch by batch, many small torch calls would take the cores from the engine.
        yield from served_probabilities(self.config, logits)


def checked_pair(pair: Any, row: int) -> tuple[str, str]:
    """Return a row as (query, product).

    Raises:
        RowError: It is not two texts; names the row.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise RowError(f"row {row}: expected a (query, product) pair, got {pair!r:.80}.")
    for name, text in zip(("query", "product"), pair, strict=True):
        if not isinstance(text, str):
            raise RowError(f"row {row}: the {name} is {text!r:.60}; expected text. Remove the row or fill it in.")
    return pair[0], pair[1]


def longest_input(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """Return how many tokens of query and product together a classifier takes."""
    return int(min(tokenizer.model_max_length, config.max_position_embeddings))


def progress_interval() -> float:
    """Return the seconds between two states of a progress bar, which in a log are all kept."""
    return 0.1 if sys.stderr.isatty() else 10.0


def usable_cores() -> int:
    """Return the cores that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
