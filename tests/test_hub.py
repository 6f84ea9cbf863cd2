"""Pushing and loading through the Hub's protocol: hub_server.py on one side, an unmodified client on the other."""

import json
import os
import subprocess
import sys
import textwrap

import numerics
import push_to_hub
import pytest
import torch
from conftest import ROOT
from folders import write_complete_repository
from hub_server import HubServer
from huggingface_hub import HfApi
from models import ragged_batch

SAME = numerics.SAME[torch.float32]
CODE = set(push_to_hub.CODE_FILES)


def client(hub, home, program, token="hf_tester", fails=False):
    """Run a Python program as a client with a cache of its own, far from this repository; returns what it prints."""
    home.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **hub.environment(home, token), "PYTHONPATH": str(ROOT / "scripts")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=home,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (result.returncode != 0) == fails, result.stderr[-3000:]
    return result.stderr if fails else result.stdout


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A Hub to which three states were pushed, each with other weights and other code: by `push_to_hub` of model and
    tokenizer, by the script to the same branch, by the script to a branch. And the logits each must give."""
    tmp_path = tmp_path_factory.mktemp("push")
    ids, mask = ragged_batch([9, 4], vocab=26)
    expected = []
    for number in range(3):
        model = write_complete_repository(tmp_path / f"state{number}", seed=number)
        expected.append(model(ids, mask).logits)
        with open(tmp_path / f"state{number}" / "bert_layers.py", "a") as code:
            code.write(f"\nSTATE = {number}\n")
    with HubServer() as hub:
        output = client(
            hub,
            tmp_path / "pusher",
            f"""
            import sys
            from transformers import AutoModelForMaskedLM, AutoTokenizer
            import push_to_hub

            tokenizer = AutoTokenizer.from_pretrained("{tmp_path}/state0")
            model = AutoModelForMaskedLM.from_pretrained("{tmp_path}/state0", trust_remote_code=True)
            tokenizer.push_to_hub("tester/bert")
            print(model.push_to_hub("tester/bert").oid)
            for folder, *options in (["{tmp_path}/state1"], ["{tmp_path}/state2", "--branch", "long"]):
                sys.argv = ["push_to_hub.py", folder, "tester/bert", *options]
                push_to_hub.main()
            """,
        )
        yield hub, output, expected


def test_model_and_tokenizer_push_carry_code_and_auto_map(pushed):
    hub, output, _ = pushed
    files = hub.repositories["tester/bert"].commits[output.split()[0]].files
    assert CODE | {"config.json", "model.safetensors", "tokenizer_config.json"} <= set(files)
    auto_map = json.loads(files["config.json"].content)["auto_map"]
    assert len(auto_map) == 7 and not any("--" in reference for reference in auto_map.values())
    assert files["model.safetensors"].sha256 in hub.large


def test_the_script_pushes_card_code_and_tokenizer_in_one_commit(pushed):
    hub, output, _ = pushed
    repository = hub.repositories["tester/bert"]
    tip = repository.commits[repository.branches["main"]]
    assert tip.parent == output.split()[0]
    assert CODE | {"README.md", "tokenizer_config.json"} <= set(tip.files)
    assert f'pin it with revision="{repository.branches["main"]}"' in output
    assert repository.branches["long"] != repository.branches["main"]


def test_revisions_branches_and_code_revisions_load_elsewhere(pushed, tmp_path):
    """Two commits: `revision=` of the first still gives its numbers and its code; `code_revision` goes its own way."""
    hub, output, expected = pushed
    repository = hub.repositories["tester/bert"]
    first, second = output.split()[0], repository.branches["main"]
    ids, mask = ragged_batch([9, 4], vocab=26)
    torch.save({"ids": ids, "mask": mask}, tmp_path / "batch.pt")
    calls = {
        "first": {"revision": first},
        "second": {"revision": second},
        "latest": {},
        "branch": {"revision": "long"},
        "old code": {"code_revision": first},
    }
    client(
        hub,
        tmp_path / "loader",
        f"""
        import pathlib, sys, torch
        import convert_checkpoint
        from transformers import AutoModelForMaskedLM, pipeline

        batch = torch.load("{tmp_path}/batch.pt")
        results = {{}}
        for name, arguments in {calls!r}.items():
            model = AutoModelForMaskedLM.from_pretrained("tester/bert", trust_remote_code=True, **arguments)
            logits = model(batch["ids"], batch["mask"]).logits.detach()
            results[name] = logits, getattr(sys.modules[type(model).__module__], "STATE", None)
        fill = pipeline("fill-mask", "tester/bert", trust_remote_code=True, device="cpu")
        convert_checkpoint.convert("tester/bert", pathlib.Path("{tmp_path}/converted"), revision="{first}")
        results["answers"] = [answer["token_str"] for answer in fill("the [MASK] sat on the mat")]
        torch.save(results, "{tmp_path}/results.pt")
        """,
        token=None,
    )
    results = torch.load(tmp_path / "results.pt")
    # The first push came through `save_pretrained`, whose code is the loaded folder's: state 0 as well.
    for name, weights, code in (
        ("first", 0, 0),
        ("second", 1, 1),
        ("latest", 1, 1),
        ("branch", 2, 2),
        ("old code", 1, 0),
    ):
        logits, state = results[name]
        numerics.assert_same(logits, expected[weights], SAME, name)
        assert state == code, name
    assert len(results["answers"]) == 5
    card = (tmp_path / "converted" / "README.md").read_text(encoding="utf-8")
    assert "[tester/bert](https://huggingface.co/tester/bert)" in card and f"`{first}`" in card


def test_a_private_repository_needs_a_token(pushed, tmp_path):
    hub, _, _ = pushed
    client(
        hub,
        tmp_path / "owner",
        """
        from huggingface_hub import HfApi
        HfApi().create_repo("tester/secret", private=True)
        HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="tester/secret")
        """,
    )
    program = 'from huggingface_hub import hf_hub_download; print(hf_hub_download("tester/secret", "config.json"))'
    assert "RepositoryNotFoundError" in client(hub, tmp_path / "stranger", program, token=None, fails=True)
    assert "config.json" in client(hub, tmp_path / "owner", program)


def test_an_interrupted_download_resumes_where_it_stopped(pushed, tmp_path):
    hub, _, _ = pushed
    hub.cuts[:], hub.ranges[:] = [15_000_000], []
    output = client(
        hub,
        tmp_path / "client",
        """
        import contextlib, pathlib
        from huggingface_hub import HfApi, hf_hub_download

        content = bytes(range(256)) * 80_000
        HfApi().create_repo("tester/large")
        HfApi().upload_file(path_or_fileobj=content, path_in_repo="x.bin", repo_id="tester/large")
        with contextlib.suppress(Exception):  # before 1.0 a broken connection ends the call, and the next one resumes
            hf_hub_download("tester/large", "x.bin")
        print(pathlib.Path(hf_hub_download("tester/large", "x.bin")).read_bytes() == content)
        """,
    )
    assert output.strip() == "True"
    assert hub.cuts == []
    starts = [int(wanted.removeprefix("bytes=").rstrip("-")) for wanted in hub.ranges if wanted]
    assert len(starts) == 1 and 0 < starts[0] <= 15_000_000, "the client keeps what it had in full chunks"


def test_a_corrupted_blob_is_noticed(pushed, tmp_path):
    """A short one by the download itself; one with other bytes by the client's check of the checksums."""
    hub, _, _ = pushed
    repository = hub.repositories["tester/bert"]
    file = repository.commits[repository.branches["main"]].files["model.safetensors"]
    good = hub.large[file.sha256]
    try:
        hub.large[file.sha256] = good[:-100]
        program = 'from huggingface_hub import hf_hub_download; hf_hub_download("tester/bert", "model.safetensors")'
        assert "Consistency check failed" in client(hub, tmp_path / "short", program, fails=True)
        hub.large[file.sha256] = good[:-100] + bytes(100)
        output = client(
            hub,
            tmp_path / "other",
            """
            from huggingface_hub import HfApi, snapshot_download
            snapshot_download("tester/bert")
            if hasattr(HfApi, "verify_repo_checksums"):  # since 1.0
                print([mismatch["path"] for mismatch in HfApi().verify_repo_checksums("tester/bert").mismatches])
            """,
        )
        assert output.strip() == ("['model.safetensors']" if hasattr(HfApi, "verify_repo_checksums") else "")
    finally:
        hub.large[file.sha256] = good


def test_a_refused_push_ends_with_the_hubs_words(pushed, tmp_path):
    hub, _, _ = pushed
    folder = tmp_path / "model"
    write_complete_repository(folder)
    program = f"""
        import sys
        import push_to_hub
        sys.argv = ["push_to_hub.py", "{folder}", "tester/other"]
        push_to_hub.main()
    """
    last = client(hub, tmp_path / "stranger", program, token="hf_wrong", fails=True)
    assert "push_to_hub.py: " in last and "Invalid username or password" in last and "Traceback" not in last
    assert "tester/other" not in hub.repositories


def broken_folder(tmp_path, change):
    """A complete repository, changed by `change(folder, config)`."""
    folder = tmp_path / "model"
    write_complete_repository(folder)
    config = json.loads((folder / "config.json").read_text())
    change(folder, config)
    if (folder / "config.json").is_file():
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, config: (folder / "config.json").unlink(), "expected a config.json"),
        (lambda folder, config: (folder / "bert_padding.py").unlink(), "missing bert_padding.py"),
        (lambda folder, config: (folder / "model.safetensors").unlink(), "missing \\*.safetensors"),
        (lambda folder, config: config["auto_map"].pop("AutoModel"), "auto_map in config.json lacks AutoModel"),
        (
            lambda folder, config: config["auto_map"].update(AutoModel="a/b--bert_layers.BertModel"),
            "auto_map leads to another repository: a/b--bert_layers.BertModel",
        ),
    ],
)
def test_an_incomplete_folder_is_not_pushed(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        push_to_hub.check_folder(broken_folder(tmp_path, change))
