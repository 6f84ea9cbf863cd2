"""The package that `pip install .` installs."""

import json
import shutil
import subprocess
import sys

from conftest import ROOT
from processes import run_python
from repositories import write_repository

import mosaicbert
from mosaicbert.configuration_bert import AUTO_MAP

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import mosaicbert
from mosaicbert import BertForMaskedLM
model = BertForMaskedLM.from_pretrained(sys.argv[2])
print(json.dumps([mosaicbert.__file__, mosaicbert.__version__, mosaicbert.__all__, type(model).__module__]))
"""


def test_pip_installs_classes_that_run_no_code_of_a_repository(tmp_path):
    tree, target = tmp_path / "tree", tmp_path / "site"
    tree.mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), ROOT / "setup.cfg", ROOT / "README.md"]:
        shutil.copy(path, tree)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", target, tree], check=True, timeout=300)
    repository = write_repository(tmp_path / "model")
    for path in repository.glob("*.py"):
        path.write_text("raise RuntimeError('code of the repository ran')")
    file, version, names, module = json.loads(run_python(SCRIPT, target, repository, cwd=tmp_path))
    assert file == str(target / "mosaicbert" / "__init__.py")
    assert (version, names, module) == (mosaicbert.__version__, mosaicbert.__all__, "mosaicbert.bert_layers")
    assert (target / f"mosaicbert-{version}.dist-info").is_dir()


def test_every_model_class_is_exported():
    names = {reference.split(".")[-1] for reference in AUTO_MAP.values()}
    assert names - {"UnavailableHead"} <= set(mosaicbert.__all__)


def test_the_suite_runs_in_a_clone_whose_folder_is_no_package_name(tmp_path):
    clone = tmp_path / "mosaic-bert"
    (clone / "tests").mkdir(parents=True)
    for name in ("__init__.py", "setup.cfg"):
        shutil.copy(ROOT / name, clone)
    (clone / "tests" / "test_one.py").write_text("def test_one():\n    pass\n")
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    run = subprocess.run(pytest, capture_output=True, text=True, cwd=clone, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
