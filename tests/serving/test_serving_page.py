"""docs/serving.md: its code prints what it shows, and all of it is Python."""

import re

import pytest
from conftest import ROOT
from processes import run_blocks

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^```python\n((?:(?!^```).)*?)^```\n\n```text\n(.*?)^```", PAGE, flags=re.S | re.M)


def test_a_block_prints_what_it_shows(export_demo, tmp_path):
    pytest.importorskip("openvino")
    (tmp_path / "my-onnx").symlink_to(export_demo("onnx"))
    assert run_blocks([block for block, _ in SHOWN], cwd=tmp_path) == [shown for _, shown in SHOWN]


def test_every_other_block_is_python():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.S | re.M)
    assert len(SHOWN) == 2 and len(blocks) > 5
    for block in blocks:
        compile(block, "docs/serving.md", "exec")
