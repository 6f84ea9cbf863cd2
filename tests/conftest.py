"""Makes the repository root importable as the package `mosaicbert`, the way the Hub and pip see its files."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _import_root_as_package(name: str) -> None:
    spec = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
    spec.submodule_search_locations = [str(ROOT)]
    sys.modules[name] = importlib.util.module_from_spec(spec)


_import_root_as_package("mosaicbert")
