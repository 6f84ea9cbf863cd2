"""Model files use private names of torch in one file only, and run without them; older releases are refused."""

import configparser
import importlib.util
import re
import sys

import numerics
import pytest
import torch
import transformers
from conftest import ROOT
from lib.common import CODE_FILES
from models import ragged_batch, tiny_model

from mosaicbert import bert_attention_cpu, bert_checks, bert_linear_cpu

PRIVATE = r"\btorch(?:\.\w+)*\._[a-zA-Z]\w*|\btorch\.ops\.\w+|\bnn\.modules\.module\b|from torch(?:\.\w+)*\._\w+"
SAME = numerics.SAME[torch.float32]


@pytest.mark.parametrize("name", [name for name in CODE_FILES if name != "bert_checks.py"])
def test_private_names_of_torch_are_in_one_file(name):
    assert not re.findall(PRIVATE, (ROOT / name).read_text())


def test_bert_checks_reads_private_names_through_private_only():
    text = (ROOT / "bert_checks.py").read_text()
    found = {name for name in re.findall(PRIVATE, text) if name != "nn.modules.module"}
    assert not found and len(re.findall(r"^\w+ = private\(", text, flags=re.M)) == 8


def test_a_name_that_torch_lacks_gives_the_fallback():
    assert bert_checks.private("ops.mkldnn._no_such_operator", 3) == 3
    assert bert_checks.private("_C._no_such.name") is None
    assert bert_checks.private("nn.Linear") is torch.nn.Linear


def test_hooks_for_all_modules_are_seen_without_torchs_function():
    assert not bert_checks.global_hooks_by_kind()
    for register in (
        torch.nn.modules.module.register_module_forward_hook,
        torch.nn.modules.module.register_module_forward_pre_hook,
        torch.nn.modules.module.register_module_full_backward_hook,
        torch.nn.modules.module.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert bert_checks.global_hooks_by_kind()
        handle.remove()
    assert not bert_checks.global_hooks_by_kind()


def test_the_fallback_gradient_of_softmax_equals_torchs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    weights = scores.softmax(-1)
    weights.backward(grad)
    found = bert_checks.plain_softmax_gradient(grad, weights.detach(), -1, torch.float64)
    numerics.assert_same(found, scores.grad, numerics.SAME[torch.float64])


def test_an_assertion_without_torchs_raises_its_message():
    bert_checks.assert_now(torch.tensor(True), "never")
    with pytest.raises(RuntimeError, match="^one text per row$"):
        bert_checks.assert_now(torch.tensor(False), "one text per row")


def test_the_model_runs_without_the_kernels_of_private_names(monkeypatch):
    model = tiny_model()
    batch = ragged_batch([150, 90])
    expected = model(*batch).logits
    monkeypatch.setattr(bert_attention_cpu, "flash_forward", None)
    monkeypatch.setattr(bert_linear_cpu, "onednn_pointwise", None)
    monkeypatch.setattr(bert_linear_cpu, "processor", lambda: ("AuthenticAMD", frozenset({"avx512_bf16"})))
    numerics.assert_same(model(*batch).logits, expected, SAME)
    model.set_attn_implementation("cpu")
    with pytest.raises(ValueError, match=f"'cpu' cannot serve this call: torch {re.escape(torch.__version__)} lacks"):
        model(*batch)


def load_again(name):
    """Execute a model file once more, as a module of another name."""
    spec = importlib.util.spec_from_file_location("again", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("package", "name", "field"),
    [(torch, "bert_checks.py", "OLDEST_TORCH"), (transformers, "configuration_bert.py", "OLDEST_TRANSFORMERS")],
    ids=["torch", "transformers"],
)
def test_below_the_floor_of_setup_cfg_loading_says_so_in_one_sentence(monkeypatch, package, name, field):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    floor = re.search(rf"{package.__name__}>=([\d.]+)", setup["options"]["install_requires"])[1]
    assert ".".join(map(str, getattr(load_again(name), field))) == floor
    for version in (f"{floor}+cpu", f"{floor}.post1", "99.0.0.dev0"):
        monkeypatch.setattr(sys.modules[package.__name__], "__version__", version)
        load_again(name)
    monkeypatch.setattr(sys.modules[package.__name__], "__version__", "1.13.0rc1")
    with pytest.raises(ImportError, match=f"^MosaicBERT needs {package.__name__} {floor} or newer, got 1.13.0rc1$"):
        load_again(name)
