"""The README is true: its code runs, its table is the backend table, its commands exist."""

import re

import torch
from conftest import ROOT

from mosaicbert.bert_layers import ATTENTION_BACKENDS

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code_blocks_run_in_order(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^(?:> )?```python\n(.*?)^(?:> )?```", README, flags=re.S | re.M)
    assert len(blocks) >= 5
    names = {}
    for block in blocks:
        code = re.sub(r"^> ?", "", block, flags=re.M)
        exec(compile(code, "README.md", "exec"), names)
    assert names["embeddings"].shape[0] == 2 and torch.isfinite(names["loss"])
    assert capsys.readouterr().out


def test_attention_table_is_the_backend_table():
    rows = re.findall(r"^\| (\w+) \| (float16.*?) \| (.*?) \| (.*?) \| (\w+) \| (\w+) \|$", README, flags=re.M)
    expected = [
        (
            name,
            ", ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes),
            ", ".join(row.devices) or "any",
            f"up to {row.max_head_dim}" if row.max_head_dim else "any",
            "yes" if row.dropout else "no",
            "yes" if row.returns_weights else "no",
        )
        for name, row in ATTENTION_BACKENDS.items()
    ]
    assert rows == expected


def test_commands_and_files_that_the_readme_names_exist():
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), flags=re.M)) | {"matrix"}
    assert set(re.findall(r"\bmake (\w+)", README)) <= targets
    files = set(re.findall(r"`((?:scripts|tests|benchmarks|examples|docs)/[\w./-]+)`", README))
    assert files and all((ROOT / name).exists() for name in files), [n for n in files if not (ROOT / n).exists()]
