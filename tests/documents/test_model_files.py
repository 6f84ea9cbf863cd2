"""The rules that keep the model files loadable from the Hub."""

import ast
import re
import sys

import pytest
from conftest import ROOT
from lib.common import CODE_FILES
from processes import start_python

# What each model file may import: packages, and files of ours.
MAY_IMPORT = {
    "configuration_bert.py": {"transformers"},
    "bert_checks.py": {"torch"},
    "bert_padding.py": {"torch", ".bert_checks"},
    "bert_attention.py": {"torch", ".bert_padding", ".bert_checks"},
    "bert_linear_cpu.py": {"torch", ".bert_padding", ".bert_checks"},
    "bert_attention_cpu.py": {"torch", ".bert_padding", ".bert_checks", ".bert_linear_cpu"},
    "bert_loss.py": {"torch", ".bert_padding", ".bert_checks"},
    "bert_compat.py": {"torch", "transformers"},
    **dict.fromkeys(
        ("launch_triton.py", "flash_attn_triton.py", "geglu_triton.py", "layer_norm_triton.py"),
        {"torch", "triton", ".bert_checks", ".launch_triton"},
    ),
    "bert_layers.py": {"torch", "transformers", *(f".{name.removesuffix('.py')}" for name in CODE_FILES)},
}


def imports(tree):
    """(root module, or `.name` for a relative import, node) of every import statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node
        elif isinstance(node, ast.ImportFrom):
            yield (f".{node.module or ''}" if node.level else node.module.split(".")[0]), node


@pytest.mark.parametrize("name", CODE_FILES)
def test_model_files_import_what_the_design_allows(name):
    tree = ast.parse((ROOT / name).read_text())
    guarded = {id(n) for block in ast.walk(tree) if isinstance(block, ast.Try) for n in ast.walk(block)}
    for module, node in imports(tree):
        # `from . import x` is never copied by the loaders, and stands in no set.
        assert module in MAY_IMPORT[name] or module in sys.stdlib_module_names, f"line {node.lineno}: {module}"
        assert module != "triton" or id(node) in guarded, f"line {node.lineno}: triton outside try"


def test_the_hub_imports_every_leaf_so_that_loaders_copy_it():
    # transformers finds relative imports with such an expression on the raw text.
    found = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", (ROOT / "bert_layers.py").read_text(), flags=re.M))
    assert found == {name.removesuffix(".py") for name in CODE_FILES} - {"bert_layers"}


def test_importing_the_package_warns_about_nothing_and_starts_no_device():
    script = f"""
        import importlib.machinery, importlib.util, sys, warnings
        import transformers, torch
        before = set(sys.modules)
        warnings.simplefilter("error")
        spec = importlib.machinery.ModuleSpec("mosaicbert", loader=None, is_package=True)
        spec.submodule_search_locations = [{str(ROOT)!r}]
        sys.modules["mosaicbert"] = importlib.util.module_from_spec(spec)
        import mosaicbert.bert_layers
        print(torch.cuda.is_initialized(), "".join(sorted(k for k in set(sys.modules) - before if k == "einops")))
    """
    result = start_python(script)
    assert (result.stdout.split(), result.stderr) == (["False"], "")


def public_definitions(tree):
    """Classes, functions and methods that a reader can call; nested functions are not."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_"))


def test_every_public_function_and_class_has_a_docstring():
    # A module's forward and transformers' accessors say all in their names and their class.
    self_evident = re.compile(r"forward|backward|[gs]et_(in|out)put_embeddings")
    for name in CODE_FILES:
        for node in public_definitions(ast.parse((ROOT / name).read_text())):
            assert self_evident.fullmatch(node.name) or ast.get_docstring(node), f"{name}:{node.lineno} {node.name}"
