"""Converting checkpoints: from older repositories and from Composer to a complete repository."""

import json
import types

import convert_checkpoint
import numerics
import push_to_hub
import pytest
import torch
from folders import stock_bert, write_complete_repository
from lib import checkpoint_conversion, common
from lib.references import foreign_references
from models import ragged_batch, tiny_config, tiny_model
from repositories import assert_loads, composer_file, published_weights, write_repository
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from mosaicbert.bert_layers import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel

SAME = numerics.SAME[torch.float32]
CODE = set(common.CODE_FILES)


def published_folder(folder):
    """A repository of a tiny MLM with pickled weights and without code; returns the weights."""
    write_repository(folder, code=False)
    return published_weights()


FOREIGN = "evil/repo--code.Class"


def test_no_reference_to_foreign_code_survives_in_any_file(tmp_path):
    """Every field that loaders follow to code or files elsewhere, in every form that transformers reads."""
    source, target = tmp_path / "old", tmp_path / "new"
    model = write_complete_repository(source, vocab_size=27)
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModel": FOREIGN, "AutoTokenizer": [None, FOREIGN], "AutoModelForCausalLM": FOREIGN}
    config |= {
        "custom_pipelines": {"fill-mask": {"impl": FOREIGN, "pt": ["AutoModelForMaskedLM"]}},
        "attn_implementation": "evil/kernel",
        "_attn_implementation": {"": "evil/kernel"},
        "quantization_config": {"quant_method": "evil/kernel"},
        "transformers_weights": "evil.safetensors",
        "text_config": {"auto_map": {"AutoModel": FOREIGN}},
        "tokenizer_class": FOREIGN,
        "unheard_of": [FOREIGN],
    }
    (source / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    references = {"auto_map": {"AutoTokenizer": [FOREIGN, None]}, "vocab_file": "/evil/vocab", "unheard_of": [FOREIGN]}
    references |= {"processor": {"auto_map": {"AutoProcessor": FOREIGN}}, "fast_tokenizer_files": ["evil.json"]}
    (source / "tokenizer_config.json").write_text(json.dumps({**tokenizer, **references}))
    special = {"mask_token": "[MASK]", "auto_map": [None, FOREIGN]}
    (source / "special_tokens_map.json").write_text(json.dumps(special))
    (source / "added_tokens.json").write_text(json.dumps({"auto_map": 26}))  # a token may be called like that
    (source / "code.py").write_text("raise SystemExit('foreign code ran')")

    checkpoint_conversion.convert(str(source), target, pad_vocab=64)
    for path in target.iterdir():
        assert "evil" not in path.read_text(encoding="utf-8", errors="replace"), path.name
        if path.suffix == ".json":
            own = {"bert_layers", "configuration_bert"} if path.name == "config.json" else ()
            assert list(foreign_references(json.loads(path.read_text()), own)) == [] or path.name == "added_tokens.json"
    assert {path.name for path in target.glob("*.py")} == CODE
    assert "model.safetensors" in push_to_hub.files_to_push(target)
    loaded = AutoModelForMaskedLM.from_pretrained(target, trust_remote_code=True)
    ids, mask = ragged_batch([9, 4], vocab=27)
    numerics.assert_same(loaded(ids, mask).logits[..., :27], model(ids, mask).logits, SAME)
    assert AutoTokenizer.from_pretrained(target, trust_remote_code=True).mask_token == "[MASK]"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_keep_their_dtype_and_load_in_float32(tmp_path, dtype):
    """transformers 5 loads in the dtype that a config names, older releases in float32 whatever it names."""
    source, target = tmp_path / "old", tmp_path / "new"
    write_repository(source, model=tiny_model().to(dtype), code=False)
    (line,) = [line for line in checkpoint_conversion.convert(str(source), target, check=True) if "differ" in line]
    assert line.endswith(" of the largest") and numerics.printed_difference(line) <= SAME
    stored = load_file(target / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    model = AutoModelForMaskedLM.from_pretrained(target, trust_remote_code=True)
    assert model.dtype == torch.float32
    original = torch.load(source / "pytorch_model.bin")
    assert all(torch.equal(tensor, original[name]) for name, tensor in stored.items())


def test_a_sharded_source_and_a_sharded_target(tmp_path):
    source, middle, target = tmp_path / "old", tmp_path / "middle", tmp_path / "new"
    write_repository(source, code=False)
    checkpoint_conversion.convert(str(source), middle, max_shard_size="40KB")
    assert len(list(middle.glob("model-*.safetensors"))) > 1
    checkpoint_conversion.convert(str(middle), target)
    assert (target / "model.safetensors").is_file()
    assert_loads(target)


def test_missing_unknown_and_misshapen_weights_are_named(tmp_path):
    weights = published_folder(tmp_path / "old")
    del weights["bert.encoder.layer.1.mlp.wo.bias"]
    weights["bert.encoder.layer.7.odd"] = torch.zeros(1)
    weights["bert.embeddings.LayerNorm.weight"] = torch.zeros(3)
    torch.save(weights, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        checkpoint_conversion.convert(str(tmp_path / "old"), tmp_path)
    assert "missing: bert.encoder.layer.1.mlp.wo.bias" in str(error.value)
    assert "unknown: bert.encoder.layer.7.odd" in str(error.value)
    assert "of another shape: bert.embeddings.LayerNorm.weight [3] for [48]" in str(error.value)


def test_stock_bert_is_sent_to_the_other_script(tmp_path):
    stock_bert(tmp_path / "bert")
    with pytest.raises(ValueError, match="convert_bert.py makes a warm start"):
        checkpoint_conversion.convert(str(tmp_path / "bert"), tmp_path / "new")


def test_a_pooler_beside_an_mlm_head_is_kept(tmp_path):
    source, target = tmp_path / "old", tmp_path / "new"
    weights = published_folder(source)
    pooler = {"bert.pooler.dense.weight": torch.randn(48, 48), "bert.pooler.dense.bias": torch.randn(48)}
    torch.save({**weights, **pooler}, source / "pytorch_model.bin")
    checkpoint_conversion.convert(str(source), target)
    assert_loads(target)
    encoder = AutoModel.from_pretrained(target, trust_remote_code=True)
    assert torch.equal(encoder.pooler.dense.weight, pooler["bert.pooler.dense.weight"])


def test_a_decoder_that_lost_its_tie_keeps_its_own_weight(tmp_path):
    source, target = tmp_path / "old", tmp_path / "new"
    weights = published_folder(source)
    weights["cls.predictions.decoder.weight"] += 0.1
    torch.save(weights, source / "pytorch_model.bin")
    lines = checkpoint_conversion.convert(str(source), target)
    assert "decoder and embeddings differ in the source: both are kept, untied" in lines
    model = AutoModelForMaskedLM.from_pretrained(target, trust_remote_code=True)
    assert torch.equal(model.cls.predictions.decoder.weight, weights["cls.predictions.decoder.weight"])
    assert torch.equal(model.get_input_embeddings().weight, weights["bert.embeddings.word_embeddings.weight"])


def test_an_embedding_that_is_only_stored_as_the_decoder_is_found(tmp_path):
    write_repository(tmp_path / "old", code=False, without=["bert.embeddings.word_embeddings.weight"])
    checkpoint_conversion.convert(str(tmp_path / "old"), tmp_path / "new")
    assert_loads(tmp_path / "new")


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
    model = tiny_model(model_class)
    save_file(model.state_dict(), source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps({**model.config.to_dict(), "architectures": names}))
    lines = checkpoint_conversion.convert(str(source), target, check=True)
    assert lines[0].startswith(model_class.__name__)
    ids, mask = ragged_batch([9, 4])
    reloaded = model_class.from_pretrained(target)
    numerics.assert_same(reloaded(ids, mask)[0], model(ids, mask)[0], SAME)


def test_rows_that_padding_adds_are_improbable(tmp_path, text, run_script, capsys):
    source, target = tmp_path / "old", tmp_path / "new"
    write_complete_repository(source)
    arguments = (source, target, "--pad_vocab", 64, "--verify", "--data", text)
    run_script(convert_checkpoint, *arguments)
    output = capsys.readouterr().out
    assert "38 rows of the vocabulary have no token; a low bias makes them improbable" in output
    assert "masked-token loss on the text" in output
    model = AutoModelForMaskedLM.from_pretrained(target, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert model.config.vocab_size == 64
    logits = model(**tokenizer("the cat [MASK]", return_tensors="pt")).logits
    assert (model.cls.predictions.decoder.bias[len(tokenizer) :] == -30).all()
    assert (logits.softmax(-1)[..., len(tokenizer) :] < 1e-12).all()


def test_the_masked_loss_predicts_words_only():
    seen = {}

    def model(ids, attention_mask, labels):
        seen.update(ids=ids, labels=labels)
        return types.SimpleNamespace(loss=torch.tensor(0.0))

    ids, mask = ragged_batch([400, 200])
    ids[:, ::2] = 1  # special tokens
    tokenizer = types.SimpleNamespace(all_special_ids=[1], mask_token_id=0)
    checkpoint_conversion.masked_loss(model, tokenizer, ids, mask)
    chosen = seen["labels"] != -100
    assert 20 < chosen.sum() < 70 and not (chosen & ((ids == 1) | (mask == 0))).any()
    assert torch.equal(seen["ids"], ids.masked_fill(chosen, 0)) and (seen["labels"][chosen] == ids[chosen]).all()


def test_verify_notices_a_repository_with_other_numbers(tmp_path):
    write_complete_repository(tmp_path / "old")
    model = BertForMaskedLM.from_pretrained(tmp_path / "old")
    ids, mask = ragged_batch([9, 4], vocab=26)
    before = checkpoint_conversion.sample_outputs(model, ids, mask)
    with torch.no_grad():
        model.bert.encoder.layer[1].mlp.wo.bias[0] += 0.1
    model.save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="outputs before and after differ"):
        checkpoint_conversion.verify(before, tmp_path / "new", "BertForMaskedLM", ids, mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max_shard_size", "0GB"), "argument --max_shard_size: expected a size such as 500MB or 5GB, got '0GB'"),
        (("--tokenizer", "EMPTY"), "tokenizer: expected tokenizer.json, vocab.txt or vocab.json in "),
        (("--data", "EMPTY/no.txt"), "data: no file matches"),
        (("--data", "EMPTY/void.txt"), "data: there is no text in "),
        (("--revision", "main"), "revision: only a Hub id has revisions"),
    ],
)
def test_a_mistake_on_the_command_line_of_convert_checkpoint_is_named(tmp_path, run_script, capsys, options, message):
    write_complete_repository(tmp_path / "old")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "void.txt").write_text("\n")
    options = [str(option).replace("EMPTY", str(tmp_path / "empty")) for option in options]
    with pytest.raises(SystemExit) as stop:
        run_script(convert_checkpoint, tmp_path / "old", tmp_path / "new", *options)
    assert message in (capsys.readouterr().err if stop.value.code == 2 else stop.value.code)
    assert not (tmp_path / "new").exists()


def test_no_reference_to_foreign_code_survives_from_a_composer_checkpoint(tmp_path):
    path, target = tmp_path / "last.pt", tmp_path / "new"
    composer_file(path)
    content = torch.load(path, weights_only=False)
    stored = content["state"]["integrations"]["huggingface"]
    reference = {"auto_map": {"AutoTokenizer": [FOREIGN, None], "AutoModel": FOREIGN}, "vocab_file": "/evil"}
    stored["tokenizer"]["tokenizer_config"]["content"].update(reference)
    stored["model"]["config"]["content"].update(reference, custom_pipelines={"x": {"impl": FOREIGN}})
    torch.save(content, path)
    checkpoint_conversion.convert(str(path), target)
    for path in target.iterdir():
        assert "evil" not in path.read_text(encoding="utf-8", errors="replace"), path.name


def test_a_composer_checkpoint_without_config_takes_one_from_beside_it(tmp_path):
    path, target = tmp_path / "last.pt", tmp_path / "new"
    weights = {f"module.model.{name}": tensor for name, tensor in published_weights().items()}
    torch.save({"state": {"model": weights}}, path)
    with pytest.raises(ValueError, match="expected a config.json in .*; pass --config FILE"):
        checkpoint_conversion.convert(str(path), target)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    checkpoint_conversion.convert(str(path), target)
    assert_loads(target)


def test_a_pickle_that_runs_code_is_not_opened(tmp_path):
    class Surprise:
        def __reduce__(self):
            return print, ("code ran",)

    composer_file(tmp_path / "bad.pt", callbacks=Surprise())
    message = "bad.pt is not opened, it holds (builtins.)?print, which is not a tensor"
    with pytest.raises(ValueError, match=message):
        checkpoint_conversion.convert(str(tmp_path / "bad.pt"), tmp_path / "new")


def test_a_file_that_is_no_composer_checkpoint_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt has no state/model"):
        checkpoint_conversion.convert(str(tmp_path / "other.pt"), tmp_path / "new")
