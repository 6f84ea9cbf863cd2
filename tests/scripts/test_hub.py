"""Pushing and loading through the Hub's protocol: hub_server.py on one side, an unmodified client on the other."""

import json
import os
import re

import numerics
import push_to_hub
import pytest
import repositories
import torch
from conftest import ROOT
from folders import set_fields, write_complete_repository, write_tokenizer
from hub_server import Commit, File, HubServer, Repository
from lib import common
from models import ragged_batch
from processes import run_python
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from mosaicbert.bert_layers import BertForMaskedLM
from mosaicbert.configuration_bert import AUTO_MAP

SAME = numerics.SAME[torch.float32]
CODE = set(push_to_hub.CODE_FILES)


def client(hub, home, program, token="hf_tester", fails=False):
    """Run a Python program as a client with a cache of its own, far from this repository; returns what it prints."""
    home.mkdir(parents=True, exist_ok=True)
    return run_python(program, cwd=home, fails=fails, environment=hub.environment(home, token))


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
            from lib import cli

            tokenizer = AutoTokenizer.from_pretrained("{tmp_path}/state0")
            model = AutoModelForMaskedLM.from_pretrained("{tmp_path}/state0", trust_remote_code=True)
            tokenizer.push_to_hub("tester/bert")
            print(model.push_to_hub("tester/bert").oid)
            for folder, *options in (["{tmp_path}/state1"], ["{tmp_path}/state2", "--branch", "long"]):
                sys.argv = ["push_to_hub.py", folder, "tester/bert", *options]
                cli.run(push_to_hub.main)
            """,
        )
        yield hub, output, expected


def test_model_and_tokenizer_push_carry_code_and_auto_map(pushed):
    hub, output, _ = pushed
    files = hub.repositories["tester/bert"].commits[output.split()[0]].files
    assert CODE | {"config.json", "model.safetensors", "tokenizer_config.json"} <= set(files)
    auto_map = json.loads(files["config.json"].content)["auto_map"]
    assert auto_map == AUTO_MAP and not any("--" in reference for reference in auto_map.values())
    assert files["model.safetensors"].sha256 in hub.large


def test_the_script_pushes_card_code_and_tokenizer_in_one_commit(pushed):
    hub, output, _ = pushed
    repository = hub.repositories["tester/bert"]
    tip = repository.commits[repository.branches["main"]]
    assert tip.parent == output.split()[0]
    assert CODE | {"README.md", "tokenizer_config.json"} <= set(tip.files)
    assert f'pin it with revision="{repository.branches["main"]}"' in output
    assert repository.branches["long"] != repository.branches["main"]


# Arguments of `from_pretrained`, and whose weights and code of the three states they give: the first push came through
# `save_pretrained`, whose code is the loaded folder's, state 0 as well.
REVISIONS = {
    "first": ({"revision": "FIRST"}, 0, 0),
    "second": ({"revision": "SECOND"}, 1, 1),
    "latest": ({}, 1, 1),
    "branch": ({"revision": "long"}, 2, 2),
    "old code": ({"code_revision": "FIRST"}, 1, 0),
}


@pytest.fixture(scope="module")
def loaded(pushed, tmp_path_factory):
    """What a client elsewhere gets: logits and `STATE` by the name of a revision, and the answers of a pipeline; the
    folder that the first commit was converted to; and that commit."""
    hub, output, _ = pushed
    home = tmp_path_factory.mktemp("loader")
    commits = {"FIRST": output.split()[0], "SECOND": hub.repositories["tester/bert"].branches["main"]}
    calls = {
        name: {option: commits.get(value, value) for option, value in arguments.items()}
        for name, (arguments, *_) in REVISIONS.items()
    }
    ids, mask = ragged_batch([9, 4], vocab=26)
    torch.save({"ids": ids, "mask": mask}, home / "batch.pt")
    client(
        hub,
        home,
        f"""
        import pathlib, sys, torch
        from lib import checkpoint_conversion
        from transformers import AutoModelForMaskedLM, pipeline

        batch = torch.load("{home}/batch.pt")
        results = {{}}
        for name, arguments in {calls!r}.items():
            model = AutoModelForMaskedLM.from_pretrained("tester/bert", trust_remote_code=True, **arguments)
            logits = model(batch["ids"], batch["mask"]).logits.detach()
            results[name] = logits, getattr(sys.modules[type(model).__module__], "STATE", None)
        fill = pipeline("fill-mask", "tester/bert", trust_remote_code=True, device="cpu")
        checkpoint_conversion.convert("tester/bert", pathlib.Path("{home}/converted"), revision="{commits["FIRST"]}")
        results["answers"] = [answer["token_str"] for answer in fill("the [MASK] sat on the mat")]
        torch.save(results, "{home}/results.pt")
        """,
        token=None,
    )
    return torch.load(home / "results.pt"), home / "converted", commits["FIRST"]


@pytest.mark.parametrize("name", REVISIONS)
def test_revisions_branches_and_code_revisions_load_elsewhere(pushed, loaded, name):
    """`revision=` of the first commit still gives its numbers and its code; `code_revision` goes its own way."""
    (logits, state), (_, weights, code) = loaded[0][name], REVISIONS[name]
    numerics.assert_same(logits, pushed[2][weights], SAME, name)
    assert state == code


def test_a_pushed_model_answers_in_a_pipeline(loaded):
    assert len(loaded[0]["answers"]) == 5


def test_a_revision_that_is_converted_stands_in_the_card(loaded):
    _, folder, commit = loaded
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "[tester/bert](https://huggingface.co/tester/bert)" in card and f"`{commit}`" in card


def test_a_tokenizer_of_a_repository_without_owner_is_taken_and_nothing_else_is_fetched(tmp_path):
    write_complete_repository(tmp_path / "model")
    write_tokenizer(tmp_path)
    names = ("vocab.txt", "tokenizer_config.json")
    files = {name: (tmp_path / name).read_bytes() for name in names}
    files |= {"model.safetensors": b"large", "onnx/model.onnx": b"large", "tokenization.py": b"raise SystemExit"}
    with HubServer() as hub:
        hub.repositories["bert-base-uncased"] = Repository(private=False)
        contents = {name: File(content, None, len(content)) for name, content in files.items()}
        hub.repositories["bert-base-uncased"].add("main", Commit(contents, None, "old"))
        output = client(
            hub,
            tmp_path / "home",
            f"""
            import pathlib
            from lib import checkpoint_conversion
            from huggingface_hub import scan_cache_dir

            target = pathlib.Path("{tmp_path}/new")
            checkpoint_conversion.convert("{tmp_path}/model", target, tokenizer="bert-base-uncased")
            (repository,) = scan_cache_dir().repos
            (revision,) = repository.revisions
            print(sorted(file.file_name for file in revision.files))
            """,
            token=None,
        )
    assert output.splitlines()[-1] == str(sorted(names))
    assert (tmp_path / "new" / "vocab.txt").read_bytes() == files["vocab.txt"]


def push_program(folder, repo_id, *options, token=None, then=""):
    """A program that pushes a folder as the command line does; what ends it is printed, then more is done."""
    return f"""
        import os, pathlib, sys
        import push_to_hub
        from lib import cli
        sys.argv = ["push_to_hub.py", "{folder}", "{repo_id}", *{list(options)!r}]
        os.environ["HF_TOKEN"] = {token!r} or os.environ["HF_TOKEN"]
        try:
            cli.run(push_to_hub.main)
        except SystemExit as end:
            print("ended:", end.code)
        {then}
    """


def test_a_refused_push_ends_with_the_hubs_words(pushed, tmp_path):
    hub, _, _ = pushed
    write_complete_repository(tmp_path / "model")
    program = push_program(tmp_path / "model", "tester/other")
    *_, last = client(hub, tmp_path / "stranger", program, token="hf_wrong").splitlines()
    assert last.startswith("ended: push_to_hub.py: ") and "Invalid username or password" in last
    assert "tester/other" not in hub.repositories


def test_a_push_without_login_or_network_ends_in_one_line(tmp_path):
    write_complete_repository(tmp_path / "model")
    with HubServer() as hub:
        pass
    push = (tmp_path / "model", "tester/other")
    programs = (push_program(*push), push_program(*push, token="hf_tester"), push_program(*push, "--dry_run"))
    without_login, without_network, last = client(
        hub, tmp_path / "nobody", "    print(chr(0))".join(programs), token=None
    ).split("\0\n")
    assert without_login.endswith(
        "ended: push_to_hub.py: not logged in to the Hub; run `hf auth login` or set HF_TOKEN\n"
    )
    assert without_network.splitlines()[-1].startswith(
        f"ended: push_to_hub.py: the Hub at {hub.url} cannot be reached: "
    )
    files = push_to_hub.files_to_push(tmp_path / "model")
    total = sum((tmp_path / "model" / name).stat().st_size for name in files)
    assert re.search(rf"^total +{total:,} bytes  {len(files)} files$", last, re.M)
    assert f"{hub.url} cannot be reached, so it is unknown what a push would delete there: " in last
    assert "nothing was pushed; next:\n  python " in last and last.endswith(f" {tmp_path}/model tester/other\n")


OLD = {"pytorch_model.bin", "adapter_config.json", "preprocessor_config.json"}


@pytest.fixture(scope="module")
def replaced(tmp_path_factory):
    """A Hub to which whole weights were pushed, then a sharded model with another kind of tokenizer, then whole ones
    again, with files of other kinds put there in between. And the logits of each, and the commits."""
    tmp_path = tmp_path_factory.mktemp("replace")
    ids, mask = ragged_batch([9, 4], vocab=26)
    torch.save({"ids": ids, "mask": mask}, tmp_path / "batch.pt")
    expected = []
    for number in range(3):
        folder = tmp_path / f"state{number}"
        model = write_complete_repository(folder, seed=number)
        expected.append(model(ids, mask).logits)
        if number == 1:
            (folder / "model.safetensors").unlink()
            model.save_pretrained(folder, max_shard_size="40KB")
            AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
            (folder / "vocab.txt").unlink()
    with HubServer() as hub:
        output = client(
            hub,
            tmp_path / "pusher",
            f"""
            import pathlib, torch
            import push_to_hub
            from huggingface_hub import HfApi
            from transformers import AutoModelForMaskedLM, AutoTokenizer

            batch, repo = torch.load("{tmp_path}/batch.pt"), "tester/bert"
            commits, logits = [], []
            for number in range(3):
                commits.append(push_to_hub.push(pathlib.Path("{tmp_path}/state%d" % number), repo))
                model = AutoModelForMaskedLM.from_pretrained(repo, trust_remote_code=True)
                logits.append(model(batch["ids"], batch["mask"]).logits.detach())
                assert len(AutoTokenizer.from_pretrained(repo)) == 26
                if number == 1:
                    for name in {OLD | {"notes.txt", "a/model.safetensors"}!r}:
                        HfApi().upload_file(path_or_fileobj=b"{{}}", path_in_repo=name, repo_id=repo)
            torch.save((commits, logits), "{tmp_path}/results.pt")
            """,
        )
        yield hub.repositories["tester/bert"], output, expected, *torch.load(tmp_path / "results.pt")


def test_pushed_weights_are_in_force_whatever_was_there(replaced):
    _, _, expected, _, logits = replaced
    for number in range(3):
        numerics.assert_same(logits[number], expected[number], SAME, f"push {number}")


def test_a_sharded_push_deletes_the_whole_weights_and_the_old_vocabulary(replaced):
    repository, output, _, commits, _ = replaced
    before, after = repository.commits[commits[0]].files, repository.commits[commits[1]].files
    assert repository.commits[commits[1]].parent == commits[0], "one commit"
    assert set(before) - set(after) == {"model.safetensors", "vocab.txt"}
    assert "model.safetensors.index.json" in after and "model-00001-of-00004.safetensors" in after
    assert re.search(r"^delete +model.safetensors$", output, re.M)


def test_a_whole_push_deletes_shards_pickles_and_adapters_but_nothing_else(replaced):
    repository, _, _, commits, _ = replaced
    after = repository.commits[commits[2]]
    before = repository.commits[after.parent].files
    gone = set(before) - set(after.files)
    shards = {name for name in before if name.startswith("model-")} | {"model.safetensors.index.json"}
    assert len(shards) > 2
    assert shards | OLD <= gone
    # The sharded state's tokenizer was saved by transformers, whose releases write different files.
    assert gone - shards - OLD <= set(common.TOKENIZER_FILES)
    assert {"notes.txt", "a/model.safetensors", "model.safetensors", "vocab.txt"} <= set(after.files)


def test_a_push_loses_to_one_that_came_between(tmp_path, monkeypatch):
    """What is deleted was chosen from a state of the repository; the Hub refuses when that is no longer the newest."""
    write_complete_repository(tmp_path / "model")
    program = f"""
        import pathlib
        import push_to_hub
        from huggingface_hub import HfApi

        look = push_to_hub.remote_state
        def look_and_wait(api, repo_id, branch):
            state = look(api, repo_id, branch)
            HfApi().upload_file(path_or_fileobj=b"1", path_in_repo="other.txt", repo_id=repo_id)
            return state
        push_to_hub.remote_state = look_and_wait
        push_to_hub.push(pathlib.Path("{tmp_path}/model"), "tester/bert")
    """
    with HubServer() as hub:
        assert "A commit has happened since" in client(hub, tmp_path / "home", program, fails=True)
        repository = hub.repositories["tester/bert"]
        assert set(repository.commits[repository.branches["main"]].files) == {"other.txt"}


def test_files_are_listed_before_anything_is_sent(folder, monkeypatch, capsys):
    class Api:
        endpoint = "here"

        def create_repo(self, *_, **__):
            listed.append(capsys.readouterr().out)
            raise OSError("refused")

    listed = []
    monkeypatch.setattr(push_to_hub, "connect", lambda *_, **__: Api())
    with pytest.raises(OSError, match="refused"):
        push_to_hub.push(folder, "a/b")
    files = push_to_hub.files_to_push(folder)
    assert re.findall(r"^add .* bytes  (.*)$", listed[0], re.M) == files and "model.safetensors" in files


def test_a_dry_run_lists_files_and_changes_nothing(tmp_path):
    folder = tmp_path / "model"
    write_complete_repository(folder)
    (folder / "special_tokens_map.json").write_text("{}", encoding="utf-8")
    remove = f"pathlib.Path('{folder}/special_tokens_map.json').unlink()"
    programs = (
        push_program(folder, "tester/new", "--dry_run"),
        push_program(folder, "tester/new", "--private", token="hf_tester", then=remove),
        push_program(folder, "tester/new", "--dry_run"),
    )
    with HubServer() as hub:
        first, pushed, last = client(hub, tmp_path / "nobody", "    print(chr(0))".join(programs), token=None).split(
            "\0\n"
        )
    assert hub.repositories["tester/new"].private and len(hub.repositories["tester/new"].commits) == 2
    size = (folder / "model.safetensors").stat().st_size
    assert re.search(rf"^add +{size:,} bytes  model.safetensors$", first, re.M)
    script = os.path.relpath(push_to_hub.__file__, tmp_path / "nobody")
    last_words = f"nothing was pushed; next:\n  python {script} {folder} tester/new\n"
    assert first.endswith(last_words) and "pin it with" in pushed and last.endswith(last_words)
    assert re.search(r"^delete +special_tokens_map.json$", last, re.M)


def test_the_head_of_the_card_is_shown_before_a_push(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\ntags: [a]\n---\n\n# Title\n\n---\n", encoding="utf-8")
    assert push_to_hub.card_head(tmp_path) == "license: mit\ntags: [a]"
    card.write_text("# Title\n\n---\nlicense: mit\n---\n", encoding="utf-8")
    assert push_to_hub.card_head(tmp_path) == "none: the Hub will not know its licence and task"


def test_only_what_belongs_to_the_model_is_pushed_and_images_of_the_card_show(tmp_path):
    """A training folder: checkpoints, tests, optimizer, logs, a key. The card shows images in subfolders."""
    folder = tmp_path / "model"
    write_complete_repository(folder)
    for name in ("checkpoint-10/model.safetensors", "tests/data/x.safetensors", "training_args.bin", "secret.key"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    for name in ("plots/my loss.png", "a b.gif", "map.svg", "other.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    with open(folder / "README.md", "a", encoding="utf-8") as card:
        card.write(
            '![loss](<plots/my%20loss.png> "loss") ![](<a b.gif>) <img width=3 src="./map.svg"> ![x](https://a.b/c.png)\n'
        )
    with HubServer() as hub:
        client(hub, tmp_path / "home", push_program(folder, "tester/new"))
        repository = hub.repositories["tester/new"]
        files = repository.commits[repository.branches["main"]].files
    assert files["plots/my loss.png"].content == b"plots/my loss.png"
    tokenizer = {"vocab.txt", "tokenizer_config.json"}
    images = {"plots/my loss.png", "a b.gif", "map.svg"}
    assert set(files) == {*CODE, *tokenizer, "config.json", "README.md", "model.safetensors", *images}


@pytest.fixture
def folder(tmp_path):
    """A complete repository, for a test to damage."""
    write_complete_repository(tmp_path / "model")
    return tmp_path / "model"


def assert_refused(folder, message):
    """Fail unless the folder is refused with this message."""
    with pytest.raises(ValueError, match=re.escape(message)):
        push_to_hub.files_to_push(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "expected a config.json"),
        ("bert_padding.py", "missing bert_padding.py"),
        ("README.md", "missing README.md; README.md is the model's card: write it, or let convert_checkpoint.py make"),
        ("model.safetensors", "expected model.safetensors, or the index"),
    ],
)
def test_a_folder_that_lacks_a_file_is_not_pushed(folder, name, message):
    (folder / name).unlink()
    assert_refused(folder, message)


def test_an_adapter_is_left_to_peft(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert_refused(tmp_path, f"folder: {tmp_path} holds an adapter; push it with the push_to_hub of its PEFT model")


ELSEWHERE = "leads to code or files outside of the repository: "
WITHOUT_MODEL = {name: reference for name, reference in AUTO_MAP.items() if name != "AutoModel"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"auto_map": WITHOUT_MODEL}, "auto_map in config.json lacks AutoModel"),
        ({"auto_map": [None]}, "auto_map in config.json lacks AutoConfig"),
        ({"auto_map": {**AUTO_MAP, "AutoModel": "a/b--m.C"}}, f"config.json {ELSEWHERE}auto_map.AutoModel: 'a/b--m.C'"),
        ({"auto_map": {**AUTO_MAP, "AutoTokenizer": [None, "a/b--m.C"]}}, ELSEWHERE + "auto_map.AutoTokenizer: 'a/b--"),
        ({"auto_map": {**AUTO_MAP, "AutoTokenizer": "tokens.C"}}, ELSEWHERE + "auto_map.AutoTokenizer: 'tokens.C'"),
        ({"custom_pipelines": {"x": {"impl": "a/b--pipe.Pipe"}}}, ELSEWHERE + "custom_pipelines: "),
        ({"attn_implementation": "a/kernel"}, "attn_implementation: 'a/kernel'"),
        ({"_attn_implementation": {"": "a/kernel"}}, "_attn_implementation: "),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config: "),
        (
            {"parts": [{"text": {"auto_map": {"AutoModel": "a/b--m.C"}}}]},
            "parts[0].text.auto_map.AutoModel: 'a/b--m.C'",
        ),
        ({"anything": ["a/b--module.Class"]}, "anything[0]: 'a/b--module.Class'"),
        ({"num_hidden_layers": 3}, "but layer 2 is missing from the weights"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_is_incomplete_or_leads_elsewhere_is_not_pushed(folder, fields, message):
    set_fields(folder / "config.json", **fields)
    assert_refused(folder, message)


def test_a_tokenizer_config_that_leads_elsewhere_is_not_pushed(folder):
    path = folder / "tokenizer_config.json"
    set_fields(path, auto_map={"AutoTokenizer": ["a/b--tokens.Slow", None]})
    assert_refused(folder, f"tokenizer_config.json {ELSEWHERE}auto_map.AutoTokenizer: 'a/b--tokens.Slow'")
    set_fields(path, auto_map={"AutoTokenizer": ["bert_layers.Slow", None]})  # there is no tokenizer in our own code
    assert_refused(folder, f"tokenizer_config.json {ELSEWHERE}auto_map.AutoTokenizer: 'bert_layers.Slow'")
    set_fields(path, auto_map={}, vocab_file="/etc/passwd")
    assert_refused(folder, "vocab_file: '/etc/passwd'")
    path.write_text("[]")
    assert_refused(folder, "expected a JSON object, got '[]'")


@pytest.mark.parametrize(
    "changes",
    [
        {"AutoModel": "bert_layers.__builtins__"},
        {"AutoModel": "bert_layers.BertForMaskedLM"},
        {"AutoModelForImageClassification": "bert_layers.BertModel"},
        {"AutoConfig": "bert_layers.BertModel"},
    ],
)
def test_a_class_that_this_code_has_not_is_not_pushed(folder, changes):
    set_fields(folder / "config.json", auto_map={**AUTO_MAP, **changes})
    ((name, value),) = changes.items()
    assert_refused(folder, f"auto_map in config.json names {name} '{value}', which this code does not define")


@pytest.mark.parametrize("name", ["vocab.txt", "merges.txt", "LICENSE"])
@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("gone")], ids=["pipe", "dir", "link"]
)
def test_what_is_no_file_is_not_pushed_over(folder, name, make):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert_refused(folder, f"expected {name} to be a file")


NORM = "bert.embeddings.LayerNorm.weight"
EMBEDDINGS = ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: {**weights, NORM: weights[NORM] * float("nan")}, f"{NORM} holds values that are not finite"),
        (
            lambda weights: {name: tensor for name, tensor in weights.items() if name not in EMBEDDINGS},
            "the weights do not fit BertForMaskedLM; missing: bert.embeddings.word_embeddings.weight",
        ),
        (lambda weights: {**weights, NORM: weights[NORM][:5]}, f"of another shape: {NORM} [5] for ["),
        (lambda weights: {**weights, "bert.more": weights[NORM].clone()}, "unknown: bert.more"),
    ],
)
def test_weights_that_do_not_fit_are_not_pushed(folder, change, message):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    assert_refused(folder, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 1}, "unknown: bert.encoder.layer.1."),
        ({"intermediate_size": 7}, "of another shape: bert.encoder.layer.0.mlp.gated_layers.weight"),
        ({"vocab_size": 9}, "of another shape: bert.embeddings.word_embeddings.weight"),
        ({"hidden_size": 12 * 10**9}, "of another shape|describes no"),
        ({"type_vocab_size": "two"}, "type_vocab_size must be a positive integer"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_not_pushed(folder, fields, message):
    set_fields(folder / "config.json", **fields)
    with pytest.raises(ValueError, match=message):
        push_to_hub.files_to_push(folder)


def test_a_tokenizer_that_does_not_fit_the_model_is_not_pushed(folder):
    with open(folder / "vocab.txt", "a", encoding="utf-8") as file:
        file.writelines(f"word{number}\n" for number in range(500))
    assert_refused(folder, "rows of the model's vocabulary")
    (folder / "vocab.txt").unlink()
    assert_refused(folder, "expected tokenizer.json or vocab.txt or")


PARTS = ["![", "![[", "![a](<", "<img ", "![](", "![a [b", "\\![", "![x] ", "[](<", "[](x", "[", "[[]"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("pattern", [push_to_hub.IMAGE, push_to_hub.LINK], ids=["images", "links"])
def test_a_card_is_searched_in_linear_time(pattern, part):
    """A card of 120 kB once took 35 s; at a quadratic cost this one would take hours."""
    assert len(pattern.findall(part * (2**20 // len(part)))) <= 1


@pytest.mark.parametrize(
    ("text", "links"),
    [
        ("![a](x.png) ![](<y z.png>)", ["x.png", "y z.png"]),
        ("[![a [b] c](x.png)](https://a.b)", ["x.png"]),
        (r'![a \[ b](x.png) <img alt="a" src="y.png">', ["x.png", "y.png"]),
        ("![a\nb]( x.png 'title') <IMG SRC=y.png>", ["x.png", "y.png"]),
        ("![a] (x.png) [b](y.png) `![`", []),
    ],
)
def test_images_of_a_card_are_found(text, links):
    assert [next(filter(None, match.groups())) for match in push_to_hub.IMAGE.finditer(text)] == links


def test_a_card_without_end_is_not_pushed(folder):
    (folder / "README.md").write_text("a" * (2**20 + 1))
    assert_refused(folder, "README.md: expected at most 1,048,576 bytes")


@pytest.mark.parametrize("name", ["vocab.txt", "model.safetensors"])
def test_a_link_that_leads_out_of_the_folder_is_not_pushed(folder, name):
    (folder / name).rename(folder.parent / "outside")
    (folder / name).symlink_to(folder.parent / "outside")
    assert_refused(folder, "leads out of the folder")


def test_weights_that_are_damaged_or_incomplete_are_not_pushed(folder):
    model = BertForMaskedLM.from_pretrained(folder)
    path, bias = folder / "model.safetensors", "cls.predictions.decoder.bias"
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(folder, "model.safetensors is damaged")
    path.unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    index = folder / "model.safetensors.index.json"
    shard_of = json.loads(index.read_text())["weight_map"]
    set_fields(index, weight_map={name: shard for name, shard in shard_of.items() if name != bias})
    assert_refused(folder, f"disagree about {bias}")
    set_fields(index, weight_map={**shard_of, bias: "model-9.safetensors"})
    assert_refused(folder, "names shards that are not there: model-9.safetensors")
    set_fields(index, weight_map={**shard_of, bias: "../m.safetensors"})
    assert_refused(folder, "expected plain names of .safetensors files, got '../m.safetensors'")


@pytest.mark.parametrize(
    ("image", "link"),
    [("![](no.png)", "no.png"), ("<img src='../key.png'>", "../key.png"), ("![](key.bin)", "key.bin")],
)
def test_a_card_that_shows_what_is_no_image_in_the_folder_is_not_pushed(folder, image, link):
    for path in (folder / "key.bin", folder.parent / "key.png"):
        path.write_bytes(b"secret")
    (folder / "README.md").write_text(image, encoding="utf-8")
    assert_refused(folder, f"README.md shows {link}, which is not an image in the folder")


def test_scores_that_the_card_links_to_are_pushed(folder):
    (folder / "metrics.json").write_text("{}", encoding="utf-8")
    links = "[all](metrics.json) [code](tests/x.py) [web](https://a.b/c.json) ![](<data:,x.json>)"
    (folder / "README.md").write_text(links, encoding="utf-8")
    assert "metrics.json" in push_to_hub.files_to_push(folder)
    for link in ("gone.json", "../key.json"):
        (folder.parent / "key.json").write_text("{}", encoding="utf-8")
        (folder / "README.md").write_text(f"[all]({link})", encoding="utf-8")
        assert_refused(folder, f"README.md links to {link}, which is not a file in the folder")


def test_a_card_that_is_not_utf8_is_not_pushed(folder):
    (folder / "README.md").write_bytes(b"\xff")
    assert_refused(folder, "README.md: expected UTF-8")


def test_this_repository_can_be_pushed():
    """Its card's images go along, its tests and scripts do not."""
    files = push_to_hub.files_to_push(ROOT)
    assert {"model.safetensors", "README.md", *CODE} <= set(files)
    assert not [name for name in files if name.startswith(("tests/", "scripts/")) or name.endswith(".csv")]


def test_a_snapshot_of_the_hub_can_be_pushed(tmp_path):
    """Its files are symbolic links to the cache's blobs."""
    write_complete_repository(tmp_path / "model")
    (commit,) = repositories.cache_repository(tmp_path / "cache", "a/b", [tmp_path / "model"])
    folder = tmp_path / "cache" / "models--a--b" / "snapshots" / commit
    assert (folder / "vocab.txt").is_symlink()
    assert "model.safetensors" in push_to_hub.files_to_push(folder)
