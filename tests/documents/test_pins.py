"""The pins resolve against the default package index for every Python that `setup.cfg` declares, and for the next."""

import configparser
import itertools
import os
import re
import subprocess
from functools import partial
from multiprocessing.pool import ThreadPool

import pytest
from conftest import ROOT

PINS = ROOT / "constraints.txt"
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
DECLARED = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
NEXT = "3.14"  # which has run nothing yet
TARGETS = [*itertools.product([*DECLARED, NEXT], ["linux", "macos"]), ("3.11", "windows"), (NEXT, "windows")]


def requirements():
    """The requirement lines of the package and of what the tests and lint need."""
    groups = [SETUP["options"]["install_requires"], *(SETUP["options.extras_require"][e] for e in ("test", "lint"))]
    return [line for group in groups for line in group.split("\n") if line]


def resolve(uv, target):
    """Resolves from metadata only, as a machine without pip or uv settings of its own would; downloads no wheel."""
    python, platform = target
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    # Wheels of recent PyTorch releases start at macOS 14; the resolver assumes an older one.
    environment |= {"MACOSX_DEPLOYMENT_TARGET": "14.0", "UV_HTTP_RETRIES": "1"}
    command = [uv, "pip", "compile", "-", "--constraint", PINS]
    command += ["--no-config", "--no-python-downloads", "--only-binary", ":all:", "--no-annotate", "--no-header"]
    return subprocess.run(
        [*command, "--python-version", python, "--python-platform", platform],
        input="\n".join(requirements()), env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def resolved():
    """What the resolver says for each target. It waits for the index most of the time, so all of them wait at once."""
    uv = pytest.importorskip("uv").find_uv_bin()
    with ThreadPool(len(TARGETS)) as pool:
        return dict(zip(TARGETS, pool.map(partial(resolve, uv), TARGETS)))


@pytest.mark.parametrize("python, platform", TARGETS)
def test_pins_resolve(resolved, python, platform):
    run = resolved[python, platform]
    if "Failed to fetch" in run.stderr:
        pytest.skip("the package index cannot be reached")
    assert run.returncode == 0, run.stderr
    found = dict(re.findall(r"^([\w-]+)==(\S+)$", run.stdout, flags=re.M))
    pins = re.findall(r'^([\w-]+)==([^;\s]+)(?:; python_version (<|>=) "3.11")?$', PINS.read_text(), flags=re.M)
    ours = {name: version for name, version, marker in pins if marker != (">=" if python == "3.10" else "<")}
    if platform != "linux":
        assert "triton" not in found
        del ours["triton"]
    assert {name: found.get(name) for name in ours} == ours


def test_the_readme_names_the_ranges_of_setup_cfg():
    packages = dict(re.findall(r"^(\w+)>=(\S+)$", SETUP["options"]["install_requires"], flags=re.M))
    oldest, newer = packages["transformers"].split(",<")
    python = SETUP["options"]["python_requires"].removeprefix(">=")
    told = f"Needs Python {python}, torch {packages['torch']} and transformers {oldest} or newer, below {newer}."
    assert told in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_every_requirement_is_pinned():
    pinned = {line.split("==")[0] for line in PINS.read_text().splitlines() if "==" in line}
    named = {re.match(r"[\w-]+", line)[0] for line in requirements()}
    assert named and named <= pinned
