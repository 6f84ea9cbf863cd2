"""Damaged or malicious sources end in one line that names the fault, leave nothing behind and cause no prompt."""

import json
import os
import re
import shutil

import convert_bert
import convert_checkpoint
import pytest
import repositories
import torch
from folders import set_fields, stock_bert, write_complete_repository
from lib import checkpoint_conversion, common
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

NORM = "bert.embeddings.LayerNorm.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of this family and one of stock BERT."""
    home = tmp_path_factory.mktemp("sources")
    write_complete_repository(home / "mosaic")
    stock_bert(home / "bert")
    return home


class Source:
    """A source that a test may damage, and the call that converts it.

    Attributes:
        folder: of the source.
        weights: its tensors by name.
    """

    def __init__(self, folder, target, call):
        self.folder, self.target, self.call = folder, target, call
        self.weights = load_file(folder / "model.safetensors")

    def write(self, name, content):
        """Write a file: bytes, or anything else as JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (self.folder / name).write_bytes(data)

    def fields(self, name, **fields):
        """Set fields of a JSON file."""
        set_fields(self.folder / name, **fields)

    def pickle(self, content):
        """Put a pickle in the place of the weights."""
        (self.folder / "model.safetensors").unlink()
        torch.save(content, self.folder / "pytorch_model.bin")

    def index(self, content):
        """Put an index in the place of the weights, which become `w.safetensors`."""
        (self.folder / "model.safetensors").rename(self.folder / "w.safetensors")
        self.write("model.safetensors.index.json", content)

    def fails(self, message, *options):
        """The conversion ends in one line that matches, and leaves nothing."""
        with pytest.raises(SystemExit) as stop:
            self.call(*options)
        assert re.search(message, str(stop.value.code)), stop.value.code
        assert "\n" not in stop.value.code and "Traceback" not in stop.value.code
        assert {path.name for path in self.target.parent.iterdir()} <= {"src", "text.jsonl"}


@pytest.fixture(params=["mosaic", "bert"])
def source(request, sources, tmp_path, text, run_script, monkeypatch):
    """Both kinds of source, each with the script that converts it; a question on standard input fails the test."""

    def asked(*_):
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    code = shutil.ignore_patterns("*.py")
    folder = shutil.copytree(sources / request.param, tmp_path / "src", ignore=code)
    target = tmp_path / "new"
    scripts = {"mosaic": (convert_checkpoint, ()), "bert": (convert_bert, ("--data", text, "--tokens", 300))}
    script, more = scripts[request.param]
    return Source(folder, target, lambda *options: run_script(script, folder, target, *more, *options))


NO_OBJECT = {
    "empty": b"",
    "cut": b'{"a": 1',
    "list": b"[]",
    "null": b"null",
    "number": b"3",
    "text": b'"x"',
    "no UTF-8": b"\xff\xfe\x00",
    "byte order mark": b"\xef\xbb\xbf{}",
    "deep": b"[" * 100_000,
    "deeper": b'{"a":' * 100_000,
    "deep and whole": b'{"a":[' * 300 + b"]}" * 300,
    "long number": b'{"a": ' + b"9" * 5_000 + b"}",
}


@pytest.mark.parametrize("content", NO_OBJECT.values(), ids=NO_OBJECT)
def test_a_json_file_that_holds_no_object_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.json: expected (JSON|a JSON object), "):
        common.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json"])
def test_every_json_file_of_a_source_must_hold_an_object(source, name):
    source.write(name, b"[]")
    source.fails(rf"{name}: expected a JSON object")


def test_a_json_file_with_a_lone_surrogate_is_named(source):
    source.write("tokenizer_config.json", b'{"tokenizer_class": "BertTokenizer", "mask_token": "\\ud800"}')
    source.fails("tokenizer_config.json: expected valid Unicode")


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"weight_map": None},
        {"weight_map": ["w.safetensors"]},
        {"weight_map": {NORM: 3}},
        {"weight_map": {NORM: "../src/w.safetensors"}},
        {"weight_map": {NORM: "/etc/passwd"}},
        {"weight_map": {NORM: ".."}},
        {"weight_map": {NORM: ""}},
        {"weight_map": {NORM: "w.bin"}},
        {"weight_map": {NORM: "sub/w.safetensors"}},
        {"weight_map": {NORM: "sub\\w.safetensors"}},
        {"weight_map": {NORM: "w\0.safetensors"}},
    ],
)
def test_an_index_may_only_name_files_beside_it(source, content):
    source.index(content)
    source.fails("model.safetensors.index.json: expected (a JSON object|a weight_map|plain names of .saf)")


@pytest.mark.parametrize("size", [0, 7, 5_000])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_cut_off_are_named(source, name, size):
    if name.endswith(".bin"):
        source.pickle(source.weights)
    path = source.folder / name
    path.write_bytes(path.read_bytes()[:size])
    source.fails(f"{name}: cannot be read")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda weights: [1, 2], r"expected tensors by name, got list '\[1, 2\]'"),
        (lambda weights: None, "expected tensors by name, got NoneType"),
        (lambda weights: {}, "expected tensors by name, got dict '{}'"),
        (lambda weights: torch.zeros(3), "expected tensors by name, got Tensor"),
        (lambda weights: {"model": weights}, "expected tensors by name, got (Ordered)?[dD]ict under 'model'"),
        (lambda weights: dict(enumerate(weights.values())), "expected tensors by name, got Tensor under '0'"),
        (lambda weights: {**weights, NORM: 1.5}, f"expected tensors by name, got float under '{NORM}'"),
        (lambda weights: {**weights, NORM: [1.0] * 48}, f"expected tensors by name, got list under '{NORM}'"),
        (lambda weights: {**weights, NORM: torch.ones(10, dtype=torch.int8)}, f"{NORM} must be float16, .*torch.int8"),
        (lambda weights: {**weights, NORM: torch.ones(9).to(torch.float8_e4m3fn)}, f"{NORM} must be .*float8_e4m3fn"),
        (lambda weights: {**weights, NORM: torch.ones(9).to_sparse()}, f"{NORM} is not a dense tensor"),
        (lambda weights: {NORM: torch.nested.nested_tensor([torch.ones(2)])}, f"{NORM} is not a dense tensor"),
        (lambda weights: {**weights, NORM: torch.ones(9, device="meta")}, f"{NORM} is not a dense tensor"),
        (lambda weights: {**weights, NORM: torch.ones(1).expand(10**12)}, f"{NORM} is not a dense tensor"),
        (lambda weights: {**weights, NORM: torch.tensor([1.0, float("nan")])}, f"{NORM} holds values that are not"),
        (lambda weights: {**weights, NORM: torch.tensor([1.0, -float("inf")])}, f"{NORM} holds values that are not"),
        (lambda weights: {**weights, "x": os.system}, "it holds .*system, which is not a tensor"),
    ],
)
def test_a_pickle_that_is_no_state_dict_is_named(sources, tmp_path, make, message):
    torch.save(make(load_file(sources / "mosaic" / "model.safetensors")), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"pytorch_model.bin: .*{message}"):
        common.load_weights(tmp_path)


def test_weights_of_another_dtype_are_named_in_both_formats(source):
    save_file({**source.weights, NORM: torch.ones(48).bool()}, source.folder / "model.safetensors")
    source.fails(f"{NORM} must be float16, bfloat16, float32 or float64, got torch.bool")
    source.pickle({**source.weights, NORM: torch.ones(48).bool()})
    source.fails(f"{NORM} must be float16, bfloat16, float32 or float64, got torch.bool")


@pytest.mark.parametrize("shape", [(), (0,), (3, 2), (1, 1, 48)])
def test_a_weight_of_another_shape_is_named_with_both_shapes(source, shape):
    save_file({**source.weights, NORM: torch.ones(shape)}, source.folder / "model.safetensors")
    shown = re.escape(str(list(shape)))
    source.fails(rf"embeddings.LayerNorm.weight ({shown} for \[48\]|must have shape \[32\], got {shown})")


TWICE = {
    "module.": lambda name: f"module.{name}",
    "bert.": lambda name: name.removeprefix("bert."),
    "gamma": lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma"),
}


@pytest.mark.parametrize("rename", TWICE.values(), ids=TWICE)
def test_two_different_tensors_for_one_weight_are_named(source, rename):
    other = rename(NORM)
    assert other != NORM
    save_file({**source.weights, other: source.weights[NORM] + 1}, source.folder / "model.safetensors")
    names = f"({re.escape(NORM)} and {re.escape(other)}|{re.escape(other)} and {re.escape(NORM)})"
    source.fails(f"source: {names} are two different tensors for one weight")
    save_file({**source.weights, other: source.weights[NORM].clone()}, source.folder / "model.safetensors")
    source.call()


def test_a_stale_copy_in_another_shard_is_named(source):
    """The index says which of the two is meant; a file beside it was once taken if it came later."""
    names = {name: "w.safetensors" for name in source.weights}
    other = next(name for name in names if name != NORM)
    source.index({"weight_map": {**names, other: "x.safetensors"}})
    rest = {name: tensor for name, tensor in source.weights.items() if name != other}
    save_file(rest, source.folder / "w.safetensors")
    save_file({other: source.weights[other], NORM: source.weights[NORM] + 1}, source.folder / "x.safetensors")
    source.fails(f"x.safetensors: holds {re.escape(NORM)}, which the index places in w.safetensors")


def test_a_weight_that_an_index_names_and_no_shard_holds_is_named(source):
    names = {name: "w.safetensors" for name in source.weights}
    source.index({"weight_map": {**names, "bert.embeddings.more.weight": "w.safetensors"}})
    source.fails("w.safetensors: lacks bert.embeddings.more.weight, which the index places there")


@pytest.mark.parametrize("layers", [10**9, 10**30])
def test_a_config_with_more_layers_than_the_weights_names_the_missing_ones(source, layers):
    there = json.loads((source.folder / "config.json").read_text())["num_hidden_layers"]
    source.fields("config.json", num_hidden_layers=layers)
    missing = f"layers {there} to {layers - 1} are missing from the weights, which hold {there} layers"
    source.fails(f"num_hidden_layers {layers}, but {missing}|num_hidden_layers")


def test_a_layer_that_is_missing_in_between_is_named(source):
    left = {name: tensor for name, tensor in source.weights.items() if ".layer.0." not in name}
    save_file(left, source.folder / "model.safetensors")
    source.fails("but layer 0 is missing from the weights")


SIZES = ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size"]
NUMBERS = ["layer_norm_eps", "hidden_dropout_prob", "initializer_range"]


@pytest.mark.parametrize(
    ("field", "value"),
    [(name, x) for name in SIZES[:2] for x in (None, True, -1, 0, 1.5, "12", [], {})]
    + [(name, 10**30) for name in SIZES],
)
def test_an_invalid_size_is_named(source, field, value):
    source.fields("config.json", **{field: value})
    source.fails(rf"{field}|config.json describes no|of another shape|must have shape")


@pytest.mark.parametrize(
    ("field", "value"),
    [("layer_norm_eps", x) for x in (float("nan"), float("inf"), 10**400, "0.1", [0.1], {"a": 1})]
    + [(name, True) for name in NUMBERS],
)
def test_an_invalid_number_is_named(source, field, value):
    source.fields("config.json", **{field: value})
    source.fails(f"config.json: {field} must be a ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id2label", ["a", "b"]),
        ("id2label", "ab"),
        ("id2label", {"x": "a"}),
        ("id2label", {"0": 1}),
        ("id2label", {"0": "a", "2": "b"}),
        ("label2id", {"a": "0"}),
        ("label2id", [1]),
        ("problem_type", "regress"),
        ("problem_type", ["regression"]),
        ("sep_token_id", "3"),
        ("eos_token_id", True),
    ],
)
def test_a_label_field_of_another_type_is_named(sources, tmp_path, field, value):
    """The push once refused what the conversion had passed."""
    folder = shutil.copytree(sources / "mosaic", tmp_path / "src")
    set_fields(folder / "config.json", **{field: value})
    with pytest.raises(ValueError, match=f"^config.json: {field} must be "):
        checkpoint_conversion.convert(str(folder), tmp_path / "new")
    with pytest.raises(ValueError, match=f"^model: {field} must be "):
        common.load_model("ForSequenceClassification", str(folder))


def test_no_code_is_fetched_and_nothing_asked_for_a_tokenizer_with_code(source):
    """transformers asks on standard input whether code may run, and takes silence for a no after 15 seconds."""
    reference = {"AutoTokenizer": ["evil/repo--code.Slow", None], "AutoConfig": "evil/repo--code.Config"}
    source.fields("tokenizer_config.json", auto_map=reference, tokenizer_class="EvilTokenizer")
    source.fields("config.json", auto_map=reference, tokenizer_class="EvilTokenizer", model_type="evil")
    try:
        source.call()
    except SystemExit as stop:  # releases of transformers differ in whether an unknown class falls back to another
        assert "its tokenizer cannot be used" in str(stop.code)
    else:
        texts = [path.read_text(errors="replace") for path in source.target.iterdir() if path.suffix != ".safetensors"]
        assert not any("evil/" in text for text in texts)


# Makes 2^60 letters of one, with all memory that there is.
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
DOUBLING = {"type": "Sequence", "normalizers": [DOUBLE] * 60}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.4.0.0.json"])
def test_a_tokenizer_that_asks_for_all_memory_is_refused_before_it_is_loaded(sources, tmp_path, name):
    """Its own words go through it when it is loaded; every script loads tokenizers in one of two ways."""
    AutoTokenizer.from_pretrained(sources / "mosaic").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    token = {"id": 40, "content": "aaa", "normalized": True, "special": False}
    token |= {"single_word": False, "lstrip": False, "rstrip": False}
    fields |= {"normalizer": DOUBLING, "added_tokens": [*fields["added_tokens"], token]}
    (tmp_path / name).write_text(json.dumps(fields))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "fast_tokenizer_files": [name]}))
    with pytest.raises(ValueError, match="^model: .* cannot be loaded, its normalizer makes texts more than 16 times"):
        common.load_words(str(tmp_path))
    with pytest.raises(ValueError, match="^source: its tokenizer cannot be used, its normalizer makes texts more than"):
        common.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer_config.json", {"mask_token": 3}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer.json", {"model": {"type": "WordPiece", "vocab": {}}}),
        ("tokenizer.json", {"normalizer": {"type": "Evil"}}),
        ("tokenizer.json", {"added_tokens": "x"}),
        ("tokenizer.json", {"normalizer": DOUBLING}),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_named(source, name, change):
    AutoTokenizer.from_pretrained(source.folder).save_pretrained(source.folder)
    source.fields(name, **change)
    source.fails("source: its tokenizer cannot be used, ")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(source):
    with open(source.folder / "vocab.txt", "a", encoding="utf-8") as vocabulary:
        vocabulary.write("one\ntwo\n")
    source.fails("source: its tokenizer has 28 entries, more than the 26 rows of the model's vocabulary")


def test_a_tokenizer_of_the_command_line_that_does_not_fit_is_blamed_by_name(sources, tmp_path):
    words = tmp_path / "words"
    words.mkdir()
    (words / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(40))]))
    (words / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(ValueError, match="^tokenizer: its tokenizer has 45 entries, more than the 26 rows"):
        checkpoint_conversion.convert(str(sources / "mosaic"), tmp_path / "new", tokenizer=str(words))
    with pytest.raises(ValueError, match="^tokenizer: there is no folder './nowhere'"):
        checkpoint_conversion.convert(str(sources / "mosaic"), tmp_path / "new", tokenizer="./nowhere")
    with pytest.raises(ValueError, match="^tokenizer: 'bert-base-uncased' is not a local folder, and the Hub "):
        checkpoint_conversion.convert(str(sources / "mosaic"), tmp_path / "new", tokenizer="bert-base-uncased")


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "tokenizer_config.json", "model.safetensors"])
def test_a_link_that_leads_out_of_the_source_is_refused(source, tmp_path_factory, name):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "key"
    shutil.move(source.folder / name, elsewhere)
    (source.folder / name).symlink_to(elsewhere)
    source.fails(f"{name}: leads out of the folder, to {elsewhere}")


def test_the_links_of_a_hub_snapshot_and_links_inside_the_source_are_followed(sources, tmp_path):
    inside = shutil.copytree(sources / "mosaic", tmp_path / "inside")
    (inside / "vocab.txt").rename(inside / "words")
    (inside / "vocab.txt").symlink_to("words")
    checkpoint_conversion.convert(str(inside), tmp_path / "new1")
    (commit,) = repositories.cache_repository(tmp_path / "cache", "a/b", [sources / "mosaic"])
    checkpoint_conversion.convert(str(tmp_path / "cache" / "models--a--b" / "snapshots" / commit), tmp_path / "new2")
    for name in ("new1", "new2"):
        assert not (tmp_path / name / "vocab.txt").is_symlink()
        assert (tmp_path / name / "vocab.txt").read_bytes() == (sources / "mosaic" / "vocab.txt").read_bytes()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path)], ids=["pipe", "dir", "loop"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipes_folders_and_loops_count_as_missing_files(source, name, make):
    (source.folder / name).unlink()
    make(source.folder / name)
    source.fails(f"expected a {name}|expected {name} or ")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "dir"])
def test_a_pipe_or_folder_is_not_read_as_a_tokenizer_file(sources, tmp_path, make):
    folder = shutil.copytree(sources / "mosaic", tmp_path / "src")
    make(folder / "tokenizer.json")
    assert common.load_words(str(folder)).mask_token == "[MASK]"


def test_a_full_disk_ends_in_one_line(source):
    """A limit on the size of files makes every write beyond it fail, as on a full disk."""
    resource = pytest.importorskip("resource", reason="limits of a process are Unix's")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        source.fails("File too large|os error 27")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
