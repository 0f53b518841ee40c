"""Column contracts of the hand-offs between stages, and the label schemas.

Every hand-off is a parquet file (pairs: a folder with one parquet file a split). Both ends check it with the same
`Contract`, so a stage can be run alone, resumed, or replaced by another tool's output.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from recipes.arguments import UserError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

PERSPECTIVES = ("user_intent", "structured_analysis", "business_rule")
SPLITS = ("train", "validation", "test")
LABELS_FOLDER = Path(__file__).parent / "labels"


@dataclass(frozen=True)
class Column:
    """One column of a contract.

    Attributes:
        kind: `string`, `integer`, `number`, `vector` (a list of numbers, one length in the whole column), or
            `messages` (a list, never empty, of chat messages: structs of `role` and `content`).
        required: False: the column may be absent.
        nullable: True: cells may be null.
        blank: False: a string of white space alone is an error.
    """

    kind: str
    required: bool = True
    nullable: bool = False
    blank: bool = True


@dataclass(frozen=True)
class Contract:
    """The columns of one hand-off.

    Attributes:
        name: What the error messages call it.
        made_by: The stage that writes it.
        columns: Column name -> what it must hold. Columns that are not named pass through untouched.
        key: The columns that together identify a row; duplicates are an error. Empty: rows may repeat.
    """

    name: str
    made_by: str
    columns: Mapping[str, Column]
    key: tuple[str, ...]


_ID = Column("string", blank=False)
_TEXT = Column("string", blank=False)
_OPTIONAL = Column("string", required=False, nullable=True)
_VECTOR = Column("vector", required=False)

PAIRS = Contract(
    name="pairs",
    made_by="recipes.data.prepare or recipes.data.bazaar",
    columns={
        "pair_id": _ID,
        "query": _TEXT,
        "product_title": _TEXT,
        "locale": _TEXT,
        "label": _TEXT,
        "product_id": _OPTIONAL,
        "brand": _OPTIONAL,
        "color": _OPTIONAL,
        "bullet_point": _OPTIONAL,
        "description": _OPTIONAL,
        "source": _OPTIONAL,
    },
    key=("pair_id",),
)

COMPLETIONS = Contract(
    name="completions",
    made_by="recipes.teacher.generate or recipes.teacher.scripted",
    columns={
        "pair_id": _ID,
        "perspective": _TEXT,
        "sample_index": Column("integer"),
        "rationale": Column("string", nullable=True),
        "predicted_label": Column("string", nullable=True),
        "prompt_hash": _OPTIONAL,
        "model": _OPTIONAL,
        "sampling": _OPTIONAL,
        "text": _OPTIONAL,
        "parse_error": _OPTIONAL,
    },
    key=("pair_id", "perspective", "sample_index"),
)

SFT = Contract(
    name="sft",
    made_by="recipes.teacher.sft_data",
    columns={
        "prompt": Column("messages"),
        "completion": Column("messages"),
        "pair_id": _ID,
        "perspective": _TEXT,
    },
    key=(),
)

PREFERENCES = Contract(
    name="preferences",
    made_by="recipes.teacher.preferences",
    columns={
        "prompt": Column("messages"),
        "chosen": Column("messages"),
        "rejected": Column("messages"),
        "pair_id": _ID,
        "chosen_perspective": _TEXT,
        "rejected_perspective": _TEXT,
    },
    key=(),
)

RATIONALES = Contract(
    name="rationales",
    made_by="recipes.rationales.build (cot_embedding: recipes.rationales.embed)",
    columns={
        "pair_id": _ID,
        "query": _TEXT,
        "product_title": _TEXT,
        "locale": _TEXT,
        "label": _TEXT,
        "perspective": _TEXT,
        "rationale": _TEXT,
        "predicted_label": Column("string", nullable=True),
        "cot_embedding": _VECTOR,
        "encoder": _OPTIONAL,
        "encoder_revision": _OPTIONAL,
    },
    key=("pair_id", "perspective", "rationale"),
)

FAITHFULNESS = Contract(
    name="judged completions",
    made_by="recipes.evaluate.faithfulness",
    columns={
        "pair_id": _ID,
        "perspective": _TEXT,
        "sample_index": Column("integer"),
        "faithful": Column("integer"),
        "claims": Column("integer"),
        "invented": Column("string"),
        "named": Column("string"),
        "other_verdict": Column("integer"),
        "right": Column("integer"),
        "words": Column("integer"),
        "grounding": Column("number"),
        "duplicate_of": Column("string", nullable=True),
    },
    key=("pair_id", "perspective", "sample_index"),
)

PREDICTIONS = Contract(
    name="predictions",
    made_by="recipes.evaluate.run",
    columns={
        "pair_id": _ID,
        "query": _TEXT,
        "locale": _TEXT,
        "label": _TEXT,
        "predicted_label": _TEXT,
        "probabilities": Column("vector"),
    },
    key=("pair_id",),
)


def read(path: str | Path, contract: Contract) -> pd.DataFrame:
    """Read a parquet file and check it.

    Raises:
        UserError: No such file, not parquet, or the contract is broken (see `check`).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file. Expected {contract.name}, made by {contract.made_by}.")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path}: not a readable parquet file ({error}). Make it again with {contract.made_by}."
        ) from None
    check(table, contract, source=path)
    return table.to_pandas()


def write(frame: pd.DataFrame | pa.Table, path: str | Path, contract: Contract) -> Path:
    """Check a table and write it as parquet, whole or not at all: a killed or full-disk write leaves the old file.

    A pyarrow table keeps its own types (fixed-size vectors); a pandas frame gets pyarrow's.

    Raises:
        UserError: The contract is broken, or the disk refuses the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    table = frame if isinstance(frame, pa.Table) else pa.Table.from_pandas(frame, preserve_index=False)
    check(table, contract, source=path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, temporary)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error}). Free some space or choose another folder.") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def make_folder(folder: str | Path) -> Path:
    """Make a folder to write to, before the work whose result goes there.

    Raises:
        UserError: It cannot be made or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: not a folder to write to ({error.strerror}). Choose another output.") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: you may not write here. Choose another output.")
    return folder


def read_pairs(folder: str | Path, splits: Iterable[str] = SPLITS) -> dict[str, pd.DataFrame]:
    """Read `<folder>/<split>.parquet` for each of `splits`.

    Raises:
        UserError: A split is missing or breaks the contract of pairs.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Expected pairs, one parquet file a split, made by {PAIRS.made_by}.")
    return {split: read(folder / f"{split}.parquet", PAIRS) for split in splits}


def check(table: pa.Table, contract: Contract, source: str | Path) -> None:
    """Check a table against a contract: columns, types, nulls, blanks, vector lengths, NaN, unique key.

    Raises:
        UserError: Naming the source, the column, the first offending row, and what was expected.
    """
    for name, column in contract.columns.items():
        if name not in table.column_names:
            if column.required:
                raise UserError(
                    f"{source}: column {name!r} is missing from {contract.name}, which {contract.made_by} makes; "
                    f"found {', '.join(table.column_names)}."
                )
            continue
        _check_column(table.column(name), name, column, source)
    _check_unique(table, contract, source)


def _check_column(values: pa.ChunkedArray, name: str, column: Column, source: str | Path) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    def refuse(row: int, found: str, expected: str) -> UserError:
        return UserError(f"{source}: row {row}, column {name!r}: {found}; expected {expected}.")

    kind = values.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    is_chat = is_list and pa.types.is_struct(kind.value_type)
    is_chat = is_chat and {"role", "content"} <= {
        kind.value_type.field(i).name for i in range(kind.value_type.num_fields)
    }
    matches = {
        "string": is_string,
        "integer": pa.types.is_integer(kind),
        "number": is_number,
        "vector": is_list and not is_chat,
        "messages": is_chat,
    }
    # A column of nulls alone has no type of its own.
    if not matches[column.kind] and not (pa.types.is_null(kind) and column.nullable):
        expected = "messages (role, content)" if column.kind == "messages" else column.kind
        raise UserError(f"{source}: column {name!r} holds {kind}; expected {expected}.")
    if not column.nullable and values.null_count:
        raise refuse(pc.index(pc.is_null(values), True).as_py(), "is null", f"a {column.kind}")
    if is_string and not column.blank:
        blank = pc.equal(pc.utf8_trim_whitespace(values.cast(pa.large_string())), "")
        if pc.any(blank).as_py():
            raise refuse(pc.index(blank, True).as_py(), "is empty or blank", "some text")
    if column.kind == "messages":
        lengths = pc.list_value_length(values)
        if pc.any(pc.equal(lengths, 0)).as_py():
            raise refuse(pc.index(lengths, pa.scalar(0, lengths.type)).as_py(), "has no message", "one or more")
        messages = pc.list_flatten(values)
        for part in ("role", "content"):
            texts = pc.struct_field(messages, part)
            if not pa.types.is_string(texts.type) and not pa.types.is_large_string(texts.type):
                raise UserError(f"{source}: column {name!r}: {part} holds {texts.type}; expected string.")
            missing = pc.is_null(texts)
            if pc.any(missing).as_py():
                parents = pc.list_parent_indices(values)
                row = parents[pc.index(missing, True).as_py()].as_py()
                raise refuse(row, f"has a message without {part}", "a text")
    if column.kind == "vector" and len(values):
        lengths = pc.list_value_length(values).to_numpy()
        if (lengths != lengths[0]).any():
            row = int(np.flatnonzero(lengths != lengths[0])[0])
            raise refuse(row, f"has {lengths[row]} numbers", f"{lengths[0]}, as in row 0")
        flat = pc.list_flatten(values).to_numpy().reshape(len(values), -1)
        if not np.isfinite(flat).all():
            row = int(np.flatnonzero(~np.isfinite(flat).all(axis=1))[0])
            raise refuse(row, "has NaN or infinite numbers", "finite numbers")


def _check_unique(table: pa.Table, contract: Contract, source: str | Path) -> None:
    if not contract.key:
        return
    keys = table.select(list(contract.key)).to_pandas()
    duplicated = keys.duplicated()
    if duplicated.any():
        row = int(duplicated.to_numpy().argmax())
        values = ", ".join(f"{name}={keys.iloc[row][name]!r}" for name in contract.key)
        raise UserError(
            f"{source}: row {row} repeats {values}; {' + '.join(contract.key)} must be unique in {contract.name}."
        )


@dataclass(frozen=True)
class Label:
    """One class of a label schema.

    Attributes:
        name: What the class is called everywhere.
        gain: For nDCG and the expected-gain score.
        definition: For prompts.
        aliases: Other spellings that data may use.
        translations: Language -> words by which a language model may answer; only `recipes.teacher.parse` reads them.
    """

    name: str
    gain: float
    definition: str
    aliases: list[str] = field(default_factory=list)
    translations: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelSchema:
    """The classes of a marketplace, in the order of the model's logits (`recipes/labels/*.yaml`)."""

    name: str
    labels: list[Label]
    relevant: list[str]

    @property
    def names(self) -> list[str]:
        """Class names, in the order of the logits."""
        return [label.name for label in self.labels]

    @property
    def id2label(self) -> dict[int, str]:
        """As `LRKDConfig` wants it."""
        return dict(enumerate(self.names))

    @property
    def label2id(self) -> dict[str, int]:
        """As `LRKDConfig` wants it."""
        return {name: index for index, name in enumerate(self.names)}

    @property
    def gains(self) -> list[float]:
        """Gain of each class for nDCG and for the expected-gain score."""
        return [label.gain for label in self.labels]

    @cached_property
    def _spellings(self) -> dict[str, str]:
        return {spelling.casefold(): label.name for label in self.labels for spelling in (label.name, *label.aliases)}

    def canonical(self, spelling: str) -> str | None:
        """Return the class name for a name or alias in any case, None for anything else."""
        return self._spellings.get(spelling.strip().casefold())

    def canonical_column(self, values: pd.Series, source: str | Path) -> pd.Series:
        """Replace each label by its class name; nulls stay.

        Raises:
            UserError: A label is outside the schema; names the first row and the accepted spellings.
        """
        distinct = {value: self.canonical(str(value)) for value in values.dropna().unique()}
        unknown = [value for value, name in distinct.items() if name is None]
        if unknown:
            row = int((values == unknown[0]).to_numpy().argmax())
            accepted = ", ".join("/".join([label.name, *label.aliases]) for label in self.labels)
            raise UserError(
                f"{source}: row {row}, column {values.name!r}: label {unknown[0]!r} is not in the schema {self.name!r} "
                f"({accepted}). Correct the data or pass another label schema."
            )
        return values.map(distinct)


def load_labels(name_or_path: str) -> LabelSchema:
    """Load a label schema by its name in `recipes/labels/` or by the path of a YAML file.

    Raises:
        UserError: No such schema, or a field is missing or has the wrong form.
    """
    path = Path(name_or_path) if name_or_path.endswith((".yaml", ".yml")) else LABELS_FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in LABELS_FOLDER.glob("*.yaml")))
        raise UserError(f"label schema {name_or_path!r}: no such file. Known: {known}, or the path of a YAML file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        schema = LabelSchema(
            name=content["name"],
            labels=[Label(**label) for label in content["labels"]],
            relevant=content["relevant"],
        )
    except (yaml.YAMLError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a label schema ({reason}); compare recipes/labels/esci.yaml.") from None
    unknown = [name for name in schema.relevant if name not in schema.names]
    if unknown or len(set(schema.names)) != len(schema.names):
        raise UserError(f"{path}: `relevant` must name classes of `labels` ({unknown}), each class once.")
    _check_spellings(schema, path)
    if len(schema.labels) < 2:
        raise UserError(f"{path}: expected two classes or more, found {', '.join(schema.names) or 'none'}.")
    return schema


def _check_spellings(schema: LabelSchema, path: Path) -> None:
    """Check that no word stands for two classes: whoever reads it would have to guess."""
    owners: dict[str, str] = {}
    for label in schema.labels:
        if not isinstance(label.translations, Mapping):
            raise UserError(f"{path}: {label.name}: `translations` must be `language: [words]` lines.")
        for words in (label.aliases, *label.translations.values()):
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise UserError(f"{path}: {label.name}: expected a list of words, found {words!r}.")
        for word in (label.name, *label.aliases, *(word for words in label.translations.values() for word in words)):
            owner = owners.setdefault(word.strip().casefold(), label.name)
            if owner != label.name:
                raise UserError(f"{path}: {word!r} stands for {owner} and for {label.name}; leave it to one of them.")
