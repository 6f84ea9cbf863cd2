"""Makes the repository root importable as the package `mosaicbert`, the way the Hub and pip see its files, and keeps
tests away from the network and from the user's cache."""

import atexit
import importlib.machinery
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Read when huggingface_hub and transformers are imported, so set before either is.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mosaicbert-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


def _import_root_as_package(name: str) -> None:
    spec = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
    spec.submodule_search_locations = [str(ROOT)]
    sys.modules[name] = importlib.util.module_from_spec(spec)


_import_root_as_package("mosaicbert")
