"""Products encoded once, kept on disk: what an item-cached student needs of a product before there is a query.

A store is a folder: `store.json` says which model made it and from what, and `shard-N.safetensors` hold the token
vectors after the layers that read apart, one after the other:

    vectors    (tokens, hidden)   float32, float16, or int8 with a scale a token
    scales     (tokens,)          float32, of int8
    tokens     (tokens,)          int32 token ids, of a student with match_marks
    offsets    (products + 1,)    product i owns the rows offsets[i] to offsets[i + 1]
    keys       (products,)        the first 8 bytes of the BLAKE2b of product_id or title
    checksums  (products,)        CRC-32 of each product's vectors, scales and tokens

Shards are memory-mapped. A product's checksum is compared when it is first read, so a damaged page is an error, not a
wrong score, and a large store opens at once.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.arguments import UserError
from recipes.record import sha256

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from modeling_lrkd import LRKDForSequenceClassification

MANIFEST = "store.json"
FORMAT = 1
DTYPES = ("float32", "float16", "int8")
_INDEX = ("offsets", "keys", "checksums")


@dataclass(frozen=True)
class Identity:
    """What a store and the model that reads it must agree on."""

    labels: list[str]
    separate_layers: int
    hidden_size: int
    weights_sha256: str
    tokenizer_sha256: str


def load_student(name: str) -> tuple[LRKDForSequenceClassification, PreTrainedTokenizerBase, Identity]:
    """Load a student that reads query and product apart, from a folder or the Hub, in float32 on the CPU.

    Raises:
        UserError: It cannot be loaded, or was not trained with `separate_layers`.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import cached_file

    from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        apart = config.separate_layers if isinstance(config, LRKDConfig) else 0
        if apart == 0 or config.ranking_view:
            what = "it was saved with ranking_view" if apart else "its layers all read query and product together"
            raise UserError(
                f"{name}: {what}. Pass a student trained with --separate_layers above 0 "
                "(recipes/configs/student/esci_item_cached.yaml)."
            )
        files = {file: cached_file(name, file) for file in ("model.safetensors", "tokenizer.json")}
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = LRKDForSequenceClassification.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: not a loadable student: {' '.join(str(error).split())}") from None
    labels = [config.id2label[index] for index in range(len(config.id2label))]
    weights, words = sha256(files["model.safetensors"]), sha256(files["tokenizer.json"])
    return model, tokenizer, Identity(labels, apart, config.hidden_size, weights, words)


def product_keys(names: Iterable[str]) -> np.ndarray:
    """Return the key of each product, int64 `(products,)`."""
    encoded = (name.encode(errors="surrogatepass") for name in names)  # what is no text is not found, and no accident
    digests = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in encoded)
    return np.frombuffer(digests, dtype="<i8")


def quantize(vectors: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """Return float32 `(tokens, hidden)` as they are stored, and the scales `(tokens,)` of int8.

    >>> import torch
    >>> stored, scales = quantize(torch.tensor([[1.0, -2.0, 0.5]]), "int8")
    >>> stored.tolist(), round(scales.item() * 127, 4)
    ([[64, -127, 32]], 2.0)
    """
    import torch

    if dtype != "int8":
        return vectors.to(getattr(torch, dtype)), None
    scales = vectors.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (vectors / scales.unsqueeze(1)).round().to(torch.int8), scales


def write_shard(
    path: Path, vectors: Tensor, lengths: Sequence[int], keys: np.ndarray, dtype: str, tokens: Tensor | None = None
) -> None:
    """Write one shard, whole or not at all.

    Args:
        path: Its file.
        vectors: Token vectors of its products, one product after the other, float32 `(tokens, hidden)`.
        lengths: Tokens of each product.
        keys: `product_keys` of them.
        dtype: One of `DTYPES`.
        tokens: Their ids, `(tokens,)`, where the student compares them with the query's.

    Raises:
        UserError: A vector is not finite, or beyond float16.
    """
    import torch
    from safetensors.torch import save_file

    stored, scales = quantize(vectors, dtype)
    if not bool((stored if scales is None else scales).isfinite().all()):
        reason = "--dtype float32 or int8 holds them" if bool(vectors.isfinite().all()) else "its weights are damaged"
        raise UserError(f"{path}: the model gives vectors that are not finite numbers in {dtype}: {reason}.")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tensors = {
        "vectors": stored.contiguous(),
        "offsets": torch.from_numpy(offsets),
        "keys": torch.from_numpy(keys.copy()),
    }
    if scales is not None:
        tensors["scales"] = scales
    if tokens is not None:
        tensors["tokens"] = tokens.to(torch.int32)
    checksums = [_checksum(tensors, *span) for span in pairwise(offsets)]
    tensors["checksums"] = torch.tensor(checksums, dtype=torch.int64)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"index_crc32": str(_index_checksum(tensors))})
    temporary.replace(path)


def _checksum(shard: dict[str, Tensor], start: int, stop: int) -> int:
    value = 0
    for name in ("vectors", "scales", "tokens"):
        if name in shard:
            value = zlib.crc32(shard[name][start:stop].numpy(), value)
    return value


def _index_checksum(tensors: dict[str, Tensor]) -> int:
    value = 0
    for name in _INDEX:
        value = zlib.crc32(tensors[name].numpy(), value)
    return value


def open_shard(path: Path) -> dict[str, Tensor]:
    """Map one shard into memory, its index checked.

    Raises:
        UserError: It is missing, truncated, or its index is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            expected = (file.metadata() or {}).get("index_crc32")
        if not {*_INDEX, "vectors"} <= tensors.keys() or str(_index_checksum(tensors)) != expected:
            raise ValueError("its index does not match its checksum")
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{path}: missing, truncated or damaged ({error}). Delete it and run recipes.serve.encode_products with "
            "the same options: it makes what is missing."
        ) from None
    return tensors


class ProductStore:
    """A finished store, for reading.

    Args:
        folder: What `recipes.serve.encode_products` wrote.
        identity: Of the model that is to read it, see `load_student`. None: the store is only looked at.

    Raises:
        UserError: There is no finished store, it was made by another model, or a shard is damaged.
    """

    def __init__(self, folder: str | Path, identity: Identity | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if identity is not None:
            refuse_another_model(self.folder, self.manifest, identity)
        if not self.manifest["complete"]:
            raise UserError(f"{self.folder}: not finished. Run recipes.serve.encode_products again: it goes on.")
        self.paths = [shard_path(self.folder, number) for number in range(self.manifest["shards"])]
        self.shards = [open_shard(path) for path in self.paths]
        keys = [shard["keys"].numpy() for shard in self.shards]
        self.shard_of = np.repeat(np.arange(len(keys)), [len(part) for part in keys])
        self.first = np.concatenate([[0], np.cumsum([len(part) for part in keys])])
        self.lengths = np.concatenate([np.diff(shard["offsets"].numpy()) for shard in self.shards])
        every_key = np.concatenate(keys)
        self._order = np.argsort(every_key, kind="stable")
        self._sorted = every_key[self._order]
        self._verified = np.zeros(len(every_key), dtype=bool)

    def __len__(self) -> int:
        return len(self._verified)

    def find(self, names: Sequence[str]) -> np.ndarray:
        """Return the rows of products, `(len(names),)`, by the name that the store is keyed by.

        Raises:
            UserError: One is not in the store, or no text.
        """
        for row, name in enumerate(names):
            if not isinstance(name, str):
                raise UserError(f"product {row} is {name!r:.60}; expected a {self.manifest['key']}.")
        keys = product_keys(names)
        places = np.minimum(np.searchsorted(self._sorted, keys), len(self) - 1)
        missing = np.flatnonzero(self._sorted[places] != keys)
        if len(missing):
            raise UserError(
                f"{self.folder}: {len(missing)} of {len(names)} products are not in the store, e.g. "
                f"{self.manifest['key']} {names[missing[0]]!r}. Encode them too (recipes.serve.encode_products)."
            )
        return self._order[places]

    def read_into(self, rows: np.ndarray, out: Tensor, tokens: Tensor | None = None) -> None:
        """Write the token vectors of each product into its row of `out`, float32 `(len(rows), width, hidden)`.

        Behind a product's last token stands that token again, for an attention mask to hide: one pass over the memory,
        and nothing that is not a number.

        Args:
            rows: Of the products, as `find` returns them.
            out: Where their vectors go.
            tokens: Where their ids go, int64 `(len(rows), width)`; only of a student with `match_marks`.

        Raises:
            UserError: A product's vectors do not match their checksum.
        """
        import torch

        places = np.arange(out.shape[1])
        for number in np.unique(self.shard_of[rows]):
            shard, chosen = self.shards[number], np.flatnonzero(self.shard_of[rows] == number)
            own = rows[chosen] - self.first[number]
            self._verify(number, shard, own)
            starts, last = shard["offsets"].numpy()[own], self.lengths[rows[chosen]] - 1
            index = torch.from_numpy((starts[:, None] + np.minimum(places, last[:, None])).ravel())
            vectors = shard["vectors"].index_select(0, index)
            if "scales" in shard:
                vectors = vectors.float().mul_(shard["scales"].index_select(0, index).unsqueeze(1))
            vectors = vectors.view(len(chosen), *out.shape[1:])
            if tokens is not None:
                tokens[torch.from_numpy(chosen)] = shard["tokens"].index_select(0, index).view(len(chosen), -1).long()
            if len(chosen) == len(rows):
                out.copy_(vectors)
            else:
                out[torch.from_numpy(chosen)] = vectors.float()

    def _verify(self, number: int, shard: dict[str, Tensor], own: np.ndarray) -> None:
        offsets, expected = shard["offsets"].numpy(), shard["checksums"].numpy()
        for product in own[~self._verified[self.first[number] + own]]:
            found = _checksum(shard, offsets[product], offsets[product + 1])
            if found != expected[product]:
                raise UserError(
                    f"{self.paths[number]}: product {product} does not match its checksum; the file is damaged. Delete "
                    "it and run recipes.serve.encode_products with the same options: it makes what is missing."
                )
            self._verified[self.first[number] + product] = True


def shard_path(folder: Path, number: int) -> Path:
    """Return where a shard lies."""
    return folder / f"shard-{number:05d}.safetensors"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what a store says of itself.

    Raises:
        UserError: There is none, or it is of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{path}: no such file. Expected a product store, made by recipes.serve.encode_products.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, expected {FORMAT}")
        if lacking := {"complete", "shards", "model", "key", "max_product_tokens"} - manifest.keys():
            raise ValueError(f"lacks {', '.join(sorted(lacking))}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a store's description ({error}). Encode the products again.") from None
    return dict(manifest)


def refuse_another_model(folder: Path, manifest: dict[str, Any], identity: Identity) -> None:
    """Check that a model is the one that made a store.

    Raises:
        UserError: It is not; says what differs.
    """
    for name, value in asdict(identity).items():
        if manifest["model"][name] != value:
            raise UserError(
                f"{folder}: made by another model: {name} is {manifest['model'][name]!r} there and {value!r} here. Use "
                "the model that made it, or encode the products with this one (recipes.serve.encode_products)."
            )
