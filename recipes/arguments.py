"""Command lines of the recipes: a dataclass a verb, a flat YAML file, and overrides on the command line.

A verb declares one dataclass and calls `parse`:

```python
@dataclass
class EmbedArguments:
    rationales: str = field(metadata={"help": "Rationales to embed (parquet)."})
    batch_size: int = field(default=32, metadata={"help": "Texts a batch."})

arguments = parse(EmbedArguments, __doc__)
```

`python -m recipes.rationales.embed --config embed.yaml --batch_size 64` then reads the YAML file first and lets
the command line win. A key that the dataclass does not have, or a value of another type, is an error: a
misspelt key that is silently ignored costs a training run.
"""

from __future__ import annotations

import difflib
import functools
import shlex
import sys
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

T = TypeVar("T")


class UserError(Exception):
    """A mistake in what the user gave us: shown as one message, without a traceback.

    The message names the file, row or column, what was expected, and what to do.
    """


def parse(cls: type[T], description: str | None, argv: Sequence[str] | None = None) -> T:
    """Read `--config FILE` and `--key value` into one instance of the dataclass `cls`.

    Args:
        cls: A dataclass; each field's `metadata["help"]` is shown by `--help`. `typing.Literal` fields become choices.
        description: Shown above the options by `--help`; pass the module's `__doc__`.
        argv: The arguments, `sys.argv[1:]` by default.

    Returns:
        The instance, every value checked against its annotation.

    Raises:
        UserError: The file is missing or not a mapping, a key is unknown, or a value has the wrong type.
    """
    # transformers is slower to import than everything else here together, so --help pays for it only once.
    from transformers import HfArgumentParser

    # Without abbreviations: `--conf x.yaml` would be taken for --config only after the file should have been read.
    parser = HfArgumentParser(
        cls, description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file with any of the options below; the command line wins.")
    required = [action.dest for action in parser._actions if action.required]
    for action in parser._actions:
        # Only what is typed comes out of argparse: it would convert the file's strings and blame the command line.
        action.required = False
        if action.dest != "help":
            action.default = SUPPRESS
    argv = list(sys.argv[1:] if argv is None else argv)
    config_path = _config_path(argv)
    typed = vars(parser.parse_args(argv))
    typed.pop("config", None)
    values = {**(read_yaml(cls, config_path) if config_path is not None else {}), **typed}
    if missing := [f"--{name}" for name in required if name not in values]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return build(cls, values, source=config_path or "command line")


def _config_path(argv: Sequence[str]) -> str | None:
    """Return the value of `--config` before argparse runs, because its content changes the defaults."""
    for position, argument in enumerate(argv):
        if argument == "--config" and position + 1 < len(argv):
            return argv[position + 1]
        if argument.startswith("--config="):
            return argument.split("=", 1)[1]
    return None


def read_yaml(cls: type, path: str | Path) -> dict[str, Any]:
    """Read one recipe and check its keys against the fields of the dataclass `cls`.

    Raises:
        UserError: The file does not exist, is not YAML, is not a mapping, or holds a key that `cls` does not have.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file. Pass the path of a YAML recipe, e.g. one of recipes/configs/."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable UTF-8 text file ({error}).") from None
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: expected `key: value` lines, found a {type(values).__name__}.")
    check_keys(cls, values, path)
    return dict(values)


def check_keys(cls: type, values: Mapping[str, Any], source: str | Path) -> None:
    """Check that every key is a field of the dataclass `cls`.

    Raises:
        UserError: One is not; the message names the source, the key and the nearest field.
    """
    known = [field.name for field in fields(cls)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Known keys: {', '.join(known)}."
            raise UserError(f"{source}: unknown key {key!r}.{hint}")


def build(cls: type[T], values: Mapping[str, Any], source: str | Path) -> T:
    """Instantiate the dataclass `cls`, each value checked against its annotation.

    Raises:
        UserError: A value has another type than its field; the message names the source and the field.
    """
    hints = get_type_hints(cls)
    for field in fields(cls):
        field.type = hints[field.name]  # HfArgumentParser rewrites `int | None` as `int`
    # YAML reads `1e-4` as a string and `1` as an int; both are what a person means by a float.
    values = {
        key: float(value) if "float" in str(hints[key]) and _is_number(value) else value
        for key, value in values.items()
    }
    try:
        return _checked(cls)(**values)
    except StrictDataclassError as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None


@functools.cache
def _checked(cls: type[T]) -> type[T]:
    """Make `cls` check its values (`strict` changes the class itself, so once)."""
    return strict(cls)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def to_dict(arguments: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as plain values, to be recorded beside what the verb wrote."""
    return asdict(arguments)


def command_line(verb: str, arguments: Any) -> str:
    """Return the command that gives `verb` these arguments, to be recorded beside what it wrote and published with it.

    Options at their default are left out, but for the seed. Of a path on this machine only the last name is kept.
    """

    def public(value: object) -> str:
        text = str(value)
        is_path = isinstance(value, str) and text and (Path(text).is_absolute() or Path(text).exists())
        return Path(text).name if is_path else text

    words = ["python", "-m", verb]
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name == "seed" or (value is not None and value != default):
            words += [f"--{field.name}", *map(public, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def run(main: Any) -> None:
    """Call a verb's `main` and show a `UserError` as one line on standard error, with exit status 2.

    A library of an extra that is not installed is shown the same way, with the command that installs it.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("recipes", "modeling_lrkd", "hub_cards"):
            raise  # ours to mend
        spec = sys.modules["__main__"].__spec__  # python -m recipes.<stage>.<verb>
        stage = spec.name.split(".")[1] if spec is not None and spec.name.count(".") > 1 else "train"
        extra = {"bench": "export"}.get(stage, stage if stage in ("teacher", "serve", "publish") else "train")
        print(
            f"error: {error.name} is not installed. This step needs the extra '{extra}': "
            f"pip install -e '.[{extra}]' -c constraints.txt",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
