"""Load modules of scripts/ and tests/, and the model code of a checkout."""

import functools
import importlib
import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_file(path: str):
    """Import a Python file of this repository under its own name, so that other files can import it too.

    Args:
        path: relative to the root, such as `scripts/lib/recipe.py`. Load the files of its folder that it imports first.

    Returns:
        The module.
    """
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@functools.cache
def load_checkout(path: Path):
    """Import `bert_layers` of a checkout of this repository into a package of its own, so that several can coexist.

    Args:
        path: root folder of the checkout.

    Returns:
        The module.

    Raises:
        ValueError: the folder is not a checkout.
    """
    root = Path(path).resolve()
    if not (root / "bert_layers.py").is_file():
        raise ValueError(f"path must be a checkout of this repository, {path} holds no bert_layers.py")
    package = importlib.machinery.ModuleSpec("checkout" + re.sub(r"\W", "_", str(root)), None, is_package=True)
    package.submodule_search_locations = [str(root)]
    sys.modules[package.name] = importlib.util.module_from_spec(package)
    return importlib.import_module(f"{package.name}.bert_layers")
