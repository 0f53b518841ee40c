"""The rationale bank: the teacher's rationales that travel with a student, found by its latent reasoning.

Two files beside the weights, read in place:

- `rationale_bank.safetensors`, its metadata saying of which weights and which embeddings it is;
- `rationale_bank.txt`, the rationales one a line, UTF-8, of which a search reads only the lines it returns.

A flat scan of 100,000 float32 vectors takes too long to come with every product. So the vectors of a perspective
stand by k-means cell, a search looks into the cells nearest to the latent only, and each vector is stored in int8
with one scale: the inverted file of faiss (arXiv 1702.08734, section 2.1), in plain torch.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

BANK_FILE = "rationale_bank.safetensors"
TEXTS_FILE = "rationale_bank.txt"
PROBES = 8
_ABOUT = "lrkd_rationale_bank"  # one key of metadata: safetensors writes several in any order
_FACTS = ("perspectives", "labels", "weights_sha256", "encoder", "encoder_revision")
_TENSORS = (
    "vectors",
    "scales",
    "centroids",
    "cell_starts",
    "perspective_cells",
    "means",
    "verdicts",
    "text_starts",
)


@dataclass
class RationaleBank:
    r"""Rationales by perspective, and the search among them.

    With m_p the mean embedding of a perspective's rationales and m the mean of the m_p, a rationale of embedding e is
    as near to a latent r as cos(r - m, e - m_p): what all embeddings of a perspective share tells nothing about a
    pair, and the latent was drawn to the mean over the perspectives. (recipes.evaluate.explanations measures what
    this and the plain cosine find.)

    Attributes:
        vectors: Unit offsets e - m_p, times 127 over their largest component, `(entries, reasoning_dim)`, int8; by
            perspective, then by cell.
        scales: What a row of `vectors` is to be multiplied by, `(entries,)`.
        centroids: Unit centre of each cell, `(cells, reasoning_dim)`.
        cell_starts: Where each cell's entries begin, and the end, `(cells + 1,)`.
        perspective_cells: Where each perspective's cells begin, and the end, `(perspectives + 1,)`.
        means: m_p, `(perspectives, reasoning_dim)`.
        verdicts: Index in `labels` of what each rationale concludes, `(entries,)`, uint8.
        text_starts: Byte at which each line of the text file begins, and the end, `(entries + 1,)`.
        perspectives: Their names.
        labels: The verdicts' names.
        weights_sha256: Digest of the `model.safetensors` that the bank belongs to.
        encoder: Encoder of the embeddings.
        encoder_revision: Its revision.
        texts: Path of the text file.
    """

    vectors: Tensor
    scales: Tensor
    centroids: Tensor
    cell_starts: Tensor
    perspective_cells: Tensor
    means: Tensor
    verdicts: Tensor
    text_starts: Tensor
    perspectives: list[str]
    labels: list[str]
    weights_sha256: str
    encoder: str
    encoder_revision: str
    texts: Path

    def __len__(self) -> int:
        return len(self.vectors)

    @classmethod
    def load(cls, path: str | Path, texts: str | Path, weights: str | Path, reasoning_dim: int) -> RationaleBank:
        """Open a bank, memory-mapped, if it belongs to this model.

        Args:
            path: Its safetensors file.
            texts: Its text file.
            weights: `model.safetensors` of the model.
            reasoning_dim: Size of the model's projected reasoning.

        Raises:
            ValueError: A file is damaged, or not the other's; the bank is empty, or of another model or embedding.
        """
        again = "Build it again with recipes.rationales.bank, or remove the file."
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})[_ABOUT])
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
            known = {name: about[name] for name in _FACTS}
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: truncated, damaged or no rationale bank ({error}). {again}") from None
        bank = cls(**tensors, **known, texts=Path(texts))
        if not len(bank):
            raise ValueError(f"{path}: the rationale bank is empty. {again}")
        if bank.vectors.shape[1] != reasoning_dim:
            raise ValueError(
                f"{path}: holds embeddings of {bank.vectors.shape[1]} numbers by {bank.encoder}, but the model's "
                f"reasoning_dim is {reasoning_dim}: another encoder. {again}"
            )
        if bank.weights_sha256 != file_sha256(weights):
            raise ValueError(
                f"{path}: was built for other weights (sha256 {bank.weights_sha256[:12]}...) than {weights}; another "
                f"model's latent lies elsewhere among them. {again}"
            )
        if bank.texts.stat().st_size != int(bank.text_starts[-1]):
            raise ValueError(
                f"{texts}: has {bank.texts.stat().st_size} bytes, its bank was made with {int(bank.text_starts[-1])}. "
                f"{again}"
            )
        return bank

    def save(self, folder: str | Path, weights: str | Path) -> None:
        """Write both files into `folder`, bound to the file `weights`."""
        tensors = {name: getattr(self, name).clone(memory_format=torch.contiguous_format) for name in _TENSORS}
        about = {**{name: getattr(self, name) for name in _FACTS}, "weights_sha256": file_sha256(weights)}
        content = self.texts.read_bytes()
        Path(folder, TEXTS_FILE).write_bytes(content)
        save_file(tensors, Path(folder, BANK_FILE), metadata={_ABOUT: json.dumps(about)})

    def nearest(self, reasoning: Tensor, count: int = 1, probes: int | None = PROBES) -> list[dict[str, Any]]:
        """Return the rationales that a latent lies nearest to.

        Args:
            reasoning: A projected latent, `(reasoning_dim,)`.
            count: How many of each perspective, at most.
            probes: Cells to look into, of each perspective; None: all, the exact search.

        Returns:
            `perspective`, `rationale`, `label` (its verdict) and `similarity` in [-1, 1] of each; perspective by
            perspective, the nearest first.
        """
        found = []
        for name, (entries, similarities) in zip(self.perspectives, self.search(reasoning, count, probes), strict=True):
            for entry, similarity in zip(entries.tolist(), similarities.tolist(), strict=True):
                verdict = self.labels[int(self.verdicts[entry])]
                found.append(
                    {
                        "perspective": name,
                        "rationale": self.text(entry),
                        "label": verdict,
                        "similarity": max(-1.0, min(1.0, similarity)),
                    }
                )
        return found

    def search(self, reasoning: Tensor, count: int, probes: int | None = PROBES) -> list[tuple[Tensor, Tensor]]:
        """Return the numbers of the nearest entries and their similarities, both `(at most count,)`, by perspective."""
        offset = F.normalize(reasoning.float().cpu() - self.means.mean(dim=0), dim=0)  # (reasoning_dim,)
        closeness = self.centroids @ offset  # (cells,)
        borders = self.perspective_cells.tolist()
        cells: list[int] = []
        counts = []  # cells of each perspective
        for first, end in pairwise(borders):
            wanted = end - first if probes is None else min(probes, end - first)
            cells += (closeness[first:end].topk(wanted).indices + first).tolist()
            counts.append(wanted)
        # One product for the cells of all perspectives: at this size the calls cost as much as the arithmetic.
        starts, ends = self.cell_starts[:-1][cells].tolist(), self.cell_starts[1:][cells].tolist()
        spans = list(zip(starts, ends, strict=True))
        rows = torch.cat([self.vectors[start:end] for start, end in spans])
        scales = torch.cat([self.scales[start:end] for start, end in spans])
        similarities = (rows.float() @ offset) * scales
        found, at = [], 0
        for wanted in counts:
            mine, spans = spans[:wanted], spans[wanted:]
            sizes = list(accumulate(end - start for start, end in mine))
            best = similarities[at : at + sizes[-1]].topk(min(count, sizes[-1]))
            entries = []
            for place in best.indices.tolist():
                span = bisect_right(sizes, place)
                entries.append(mine[span][1] - (sizes[span] - place))
            found.append((torch.tensor(entries), best.values))
            at += sizes[-1]
        return found

    def text(self, entry: int) -> str:
        """Read one rationale."""
        start, end = self.text_starts[entry : entry + 2].tolist()
        with open(self.texts, "rb") as file:
            file.seek(start)
            return file.read(end - start).decode("utf-8").rstrip("\n")


def quantize(units: Tensor) -> tuple[Tensor, Tensor]:
    """Round unit vectors `(rows, size)` to int8; the second result `(rows,)` scales them back.

    Example:
    >>> rows, scales = quantize(torch.tensor([[0.6, -0.8]]))
    >>> rows, scales * rows
    (tensor([[  95, -127]], dtype=torch.int8), tensor([[ 0.5984, -0.8000]]))
    """
    scales = units.abs().amax(dim=1).clamp_min(1e-12) / 127
    return (units / scales.unsqueeze(1)).round().to(torch.int8), scales


def file_sha256(path: str | Path) -> str:
    """Return the hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
