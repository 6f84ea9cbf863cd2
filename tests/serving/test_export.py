"""Export: files that answer as their source does, refusals with their reason, and targets whole or not at all."""

import json

import export as script
import gguf
import numerics
import numpy
import onnx
import pytest
import torch
from folders import WORDS, write_complete_repository, write_tokenizer
from heads import name_of
from lib import exporting, gguf_export, onnx_export
from models import ragged_batch, tiny_model
from transformers import AutoTokenizer

from mosaicbert.bert_layers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

# Heads of 8 channels, and rows that fill the blocks of 32 of Q8_0.
SIZES = {"hidden_size": 96, "intermediate_size": 64}
LENGTHS = ([5], [30, 1, 12])


@pytest.fixture(autouse=True)
def short_checks(monkeypatch):
    """The export's own comparison on batches that take no time."""
    monkeypatch.setattr(exporting, "CHECKED_BATCHES", ((1,), (9, 1, 40)))


def write_source(folder, model_class=BertForMaskedLM, **fields):
    """A tiny repository of a class; returns its model."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(model_class, **{"vocab_size": write_tokenizer(folder), **SIZES, **fields})
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A repository of a masked language model, its model, and its float32 export."""
    folder = tmp_path_factory.mktemp("source")
    model = write_source(folder)
    return folder, model, onnx_export.to_onnx(model)


def openvino_answer(path):
    """A function from a batch to the outputs that OpenVINO computes in float32."""
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def answer(*batch):
        outputs = compiled(dict(zip(onnx_export.INPUTS, (tensor.numpy() for tensor in batch))))
        return [output.copy() for output in outputs.values()]

    return answer


def batch_of(lengths, vocab):
    """input_ids, attention_mask and token_type_ids of ragged texts, with both token types."""
    ids, mask = ragged_batch(lengths, vocab=vocab)
    return ids, mask, (torch.arange(ids.shape[1]) > 2).long().expand_as(ids) * mask


def assert_answers(answer, model, tolerance):
    """Fail unless a function of a batch gives the outputs of a model."""
    count = len(onnx_export.OUTPUTS[type(model).__name__])
    for lengths in LENGTHS:
        batch = batch_of(lengths, model.config.vocab_size)
        with torch.no_grad():
            expected = model(*batch, return_dict=False)[:count]
        outputs = answer(*batch)
        assert len(outputs) == len(expected)
        for output, truth in zip(outputs, expected):
            numerics.assert_same(torch.as_tensor(output), truth, tolerance, f"lengths {lengths}")


@pytest.mark.parametrize(
    "model_class", [BertForSequenceClassification, BertForTokenClassification, BertForQuestionAnswering], ids=name_of
)
def test_onnx_runtime_and_openvino_answer_as_the_source_for_every_task(tmp_path, run_script, model_class):
    labels = {} if model_class is BertForQuestionAnswering else {"num_labels": 3}
    model = write_source(tmp_path / "source", model_class, num_hidden_layers=1, **labels)
    run_script(script, tmp_path / "source", tmp_path / "out", "--format", "onnx", "--types", "float32")
    path = tmp_path / "out" / "onnx" / "model.onnx"
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx"]
    assert_answers(onnx_export.onnx_session(path), model, numerics.SAME[torch.float32])
    assert_answers(openvino_answer(path), model, numerics.SAME[torch.float32])
    outputs = onnx.load(path, load_external_data=False).graph.output
    assert [output.name for output in outputs] == list(onnx_export.OUTPUTS[model_class.__name__])


def test_an_onnx_folder_holds_what_its_engines_read_and_says_what_was_measured(
    tmp_path, run_script, monkeypatch, capsys, exported
):
    source, model, whole = exported
    monkeypatch.setattr(onnx_export, "to_onnx", lambda *_: whole)
    run_script(script, source, tmp_path / "out", "--format", "onnx")
    printed = capsys.readouterr().out
    folder = tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "bert" and config["vocab_size"] == model.config.vocab_size
    assert not {"auto_map", "architectures", "_name_or_path", "dtype", "torch_dtype"} & set(config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    assert tokenizer.model_max_length == config["max_position_embeddings"] == 8192
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card and "- onnx" in card and "8,192 tokens" in card
    for name in ("model.onnx", "model_fp16.onnx", "model_quantized.onnx"):
        line = next(line for line in printed.splitlines() if line.startswith(f"onnx/{name}: "))
        found = line.rpartition("MB, ")[2]
        assert found.startswith("outputs differ by ") and f"`onnx/{name}`" in card and found in card
    assert sorted(file.name for file in (folder / "onnx").iterdir()) == sorted(onnx_export.FILES.values())
    assert b"site-packages" not in (folder / "onnx" / "model.onnx").read_bytes()


def test_all_types_stay_near_the_source(tmp_path, exported):
    _, model, whole = exported
    largest_of = {
        "float32": numerics.SAME[torch.float32],
        "float16": numerics.EXPORTED_FLOAT16,
        "int8": numerics.QUANTIZED,
    }
    for kind, largest in largest_of.items():
        path = tmp_path / f"{kind}.onnx"
        onnx.save(onnx_export.CONVERTED[kind](whole), path)
        assert_answers(onnx_export.onnx_session(path), model, largest)
        assert_answers(openvino_answer(path), model, largest)
    types = {tensor.data_type for tensor in onnx.load(tmp_path / "float16.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT not in types
    assert model.config._attn_implementation == "auto", "the export changed the model"


def test_int8_stores_large_matrices_in_8_bits_with_a_scale_for_each_output(monkeypatch, exported):
    monkeypatch.setattr(onnx_export, "FEWEST_QUANTIZED", 1000)
    _, model, whole = exported
    rounded = {t.name: onnx.numpy_helper.to_array(t) for t in onnx_export.to_int8(whole).graph.initializer}
    originals = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in whole.graph.initializer}
    matrices = {name: array for name, array in originals.items() if array.ndim == 2 and array.size >= 1000}
    # The table of words, the decoder (of a table this small the exporter transposes a copy), four matrices a layer, and
    # the head's.
    assert len(matrices) == 2 + 4 * model.config.num_hidden_layers + 1
    for name, matrix in matrices.items():
        assert name not in rounded and rounded[f"{name}_int8"].dtype == numpy.int8
        scale = rounded[f"{name}_scale"]
        columns = any(name in node.input and node.op_type == "MatMul" for node in whole.graph.node)
        assert scale.shape == ((1, matrix.shape[1]) if columns else (matrix.shape[0], 1)), name
        assert (numpy.abs(matrix - rounded[f"{name}_int8"] * scale) <= scale * 0.5001).all(), name
    assert originals.keys() - matrices.keys() <= rounded.keys()


def test_int8_takes_a_row_of_zeros():
    weight = onnx.numpy_helper.from_array(numpy.zeros((200, 100), numpy.float32), "weight")
    node = onnx.helper.make_node("Gather", ["weight", "ids"], ["rows"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "rows", [], [], [weight]))
    scale = {tensor.name: tensor for tensor in onnx_export.to_int8(model).graph.initializer}["weight_scale"]
    assert (onnx.numpy_helper.to_array(scale) == 1).all()


def test_chunked_attention_gives_the_same_answers_without_a_tensor_of_all_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "CHUNK_SCORES", 300)  # 5 tokens in one chunk, 30 in chunks of one query
    model = tiny_model(BertModel, num_hidden_layers=1, **SIZES)
    path = tmp_path / "model.onnx"
    onnx.save(onnx_export.to_onnx(model, chunked=True), path)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("Loop") == model.config.num_hidden_layers and "Softmax" not in operators
    assert_answers(onnx_export.onnx_session(path), model, numerics.SAME[torch.float32])
    assert_answers(openvino_answer(path), model, numerics.SAME[torch.float32])
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        batch = batch_of([30, 12], model.config.vocab_size)
        numerics.assert_same(model(*batch)[0], onnx_export.onnx_session(path)(*batch)[0], numerics.SAME[torch.float32])


def test_a_torch_that_would_fix_the_length_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    with pytest.raises(ValueError, match=r"ONNX export needs torch 2\.7 or newer, got 2\.6\.0\+cu124"):
        onnx_export.to_onnx(tiny_model())


def test_chunked_attention_needs_a_torch_that_can_export_it(monkeypatch):
    monkeypatch.delattr(torch.onnx, "ops")
    with pytest.raises(ValueError, match=r"chunked: torch 2\.8 or newer is needed, got \d"):
        onnx_export.to_onnx(tiny_model(), chunked=True)


def test_gguf_holds_the_encoder_its_vocabulary_and_what_llama_cpp_needs_to_know(tmp_path, run_script, capsys):
    model = write_source(tmp_path / "source")
    run_script(script, tmp_path / "source", tmp_path / "my model", "--format", "gguf")
    names = sorted(file.name for file in (tmp_path / "my model").iterdir())
    assert names == ["README.md", "my_model-F16.gguf", "my_model-F32.gguf", "my_model-Q8_0.gguf"]
    printed, card = capsys.readouterr().out, (tmp_path / "my model" / "README.md").read_text()
    assert "the MLM head is left out" in printed and "texts of up to 8,192 tokens" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("my_model-F32.gguf: float32")]
    assert numerics.printed_difference(line) <= numerics.SAME[torch.float32]
    assert "FROM ./my_model-F32.gguf" in card and "pipeline_tag: feature-extraction" in card
    for name, tolerance in (("F32", 0.0), ("F16", 2**-11), ("Q8_0", 1 / 250)):
        weights = gguf_export.read_gguf(tmp_path / "my model" / f"my_model-{name}.gguf")
        expected = {key: value for key, value in model.bert.state_dict().items() if not key.startswith("pooler.")}
        assert weights.keys() == expected.keys()
        for key, weight in weights.items():
            numerics.assert_same(weight, expected[key], tolerance, key)
    fields = gguf.GGUFReader(tmp_path / "my model" / "my_model-F32.gguf").fields
    values = {name: field.contents() for name, field in fields.items()}
    assert values["general.architecture"] == "jina-bert-v2"
    assert values["jina-bert-v2.context_length"] == 8192
    assert values["jina-bert-v2.attention.causal"] is False
    assert values["jina-bert-v2.pooling_type"] == gguf.PoolingType.MEAN
    assert values["jina-bert-v2.attention.head_count"] == 12
    assert values["tokenizer.ggml.model"] == "bert"
    assert values["tokenizer.ggml.tokens"] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"▁{w}" for w in WORDS)]
    ids = {name: values[f"tokenizer.ggml.{name}_token_id"] for name in ("padding", "unknown", "bos", "mask")}
    assert ids == {"padding": 0, "unknown": 1, "bos": 2, "mask": 4}


def test_rows_without_a_token_get_names_of_their_own(tmp_path):
    write_tokenizer(tmp_path, words=["run", "##ner"])
    tokens, types = gguf_export.vocabulary(AutoTokenizer.from_pretrained(tmp_path), 9)
    assert tokens[4:] == ["[MASK]", "▁run", "ner", "[PAD7]", "[PAD8]"]
    kinds = gguf.TokenType
    assert types[4:] == [kinds.CONTROL, kinds.NORMAL, kinds.NORMAL, kinds.UNUSED, kinds.UNUSED]


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError("2304 requested and 404 written")

    model = write_complete_repository(tmp_path)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="^a.gguf cannot be written, 2304 requested and 404 written"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        gguf_export.to_gguf(model.base_model, tokenizer, tmp_path / "a.gguf", "float32", "a")


def test_a_file_that_answers_otherwise_never_appears(tmp_path, run_script, monkeypatch, exported):
    source, _, whole = exported
    monkeypatch.setattr(onnx_export, "to_onnx", lambda *_: whole)

    def mirrored(model):
        result = onnx_export.to_int8(model)
        for tensor in result.graph.initializer:
            if tensor.name.endswith("_int8"):
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)[::-1], tensor.name))
        return result

    monkeypatch.setattr(onnx_export, "FEWEST_QUANTIZED", 1000)
    monkeypatch.setitem(onnx_export.CONVERTED, "int8", mirrored)
    with pytest.raises(SystemExit, match="types: int8 changes the outputs by .* leave it out"):
        run_script(script, source, tmp_path / "out", "--format", "onnx", "--types", "float32", "int8")
    assert not (tmp_path / "out").exists()


def test_weights_that_a_gguf_lacks_are_noticed(tmp_path, run_script, monkeypatch):
    write_source(tmp_path / "source")
    read = gguf_export.read_gguf
    lacking = "encoder.layer.1.mlp.wo.bias"
    monkeypatch.setattr(gguf_export, "read_gguf", lambda path: {k: v for k, v in read(path).items() if k != lacking})
    with pytest.raises(SystemExit, match="float32 changes the outputs by nan"):
        run_script(script, tmp_path / "source", tmp_path / "out", "--format", "gguf", "--types", "float32")


@pytest.mark.parametrize(
    ("model_class", "format", "message"),
    [
        (BertForMultipleChoice, "onnx", "ONNX does not support the head of a BertForMultipleChoice"),
        (BertForSequenceClassification, "gguf", "GGUF does not support the head of a BertForSequenceClassification"),
    ],
)
def test_an_unsupported_head_is_refused_with_a_way_out(tmp_path, run_script, model_class, format, message):
    write_source(tmp_path / "source", model_class)
    arguments = (tmp_path / "source", tmp_path / "out", "--types", "float32", "--format")
    with pytest.raises(SystemExit, match=message):
        run_script(script, *arguments, format)
    assert not (tmp_path / "out").exists()
    run_script(script, *arguments, "gguf", "--features")


def test_overwrite_replaces_an_export_and_spares_other_folders(tmp_path, run_script):
    write_source(tmp_path / "source", BertModel)
    arguments = (tmp_path / "source", tmp_path / "out", "--format", "gguf", "--types", "float16")
    run_script(script, *arguments)
    with pytest.raises(SystemExit, match="pass --overwrite to replace it"):
        run_script(script, *arguments)
    (tmp_path / "out" / "onnx").mkdir()
    run_script(script, *arguments, "--overwrite")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["README.md", "out-F16.gguf"]
    (tmp_path / "out" / "notes").mkdir()
    with pytest.raises(SystemExit, match="holds the folder notes"):
        run_script(script, *arguments, "--overwrite")


def test_mistakes_are_reported_in_one_line(tmp_path, run_script):
    write_source(tmp_path / "narrow", hidden_size=48)
    gguf_of = (tmp_path / "out", "--format", "gguf")
    with pytest.raises(SystemExit, match="in GGUF int8 needs a hidden_size that is a multiple of 32, got 48"):
        run_script(script, tmp_path / "narrow", *gguf_of, "--types", "int8")
    settings = tmp_path / "narrow" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"do_lower_case": true', '"do_lower_case": false'))
    with pytest.raises(SystemExit, match="its tokenizer keeps case, accents or Chinese words"):
        run_script(script, tmp_path / "narrow", *gguf_of, "--types", "float32")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / "narrow" / name).unlink()
    with pytest.raises(SystemExit, match="source: it holds no tokenizer; pass --tokenizer"):
        run_script(script, tmp_path / "narrow", *gguf_of)
    assert not (tmp_path / "out").exists()


def test_rows_without_a_token_are_improbable_in_a_file(tmp_path, run_script, monkeypatch):
    model = write_source(tmp_path / "source", vocab_size=40)

    def seen(exported, chunked):
        assert (exported.cls.predictions.decoder.bias[len(WORDS) + 5 :] <= -30).all()
        raise ValueError("seen")

    assert model.cls.predictions.decoder.bias.min() > -30
    monkeypatch.setattr(onnx_export, "to_onnx", seen)
    with pytest.raises(SystemExit, match="seen"):
        run_script(script, tmp_path / "source", tmp_path / "out", "--format", "onnx")


def test_chunked_is_for_onnx(tmp_path, run_script, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(script, tmp_path, tmp_path / "out", "--format", "gguf", "--chunked")
    assert ended.value.code == 2 and "--chunked is for --format onnx" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"type": "BPE"}}, "its tokenizer is BPE, and a GGUF of this architecture holds an uncased"),
        ({}, "its tokenizer is unknown"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(fields, message):
    class Tokenizer:
        class backend_tokenizer:
            to_str = staticmethod(lambda: json.dumps(fields))

    with pytest.raises(ValueError, match=message):
        gguf_export.check_tokenizer(Tokenizer)


def test_a_vocabulary_that_llama_cpp_would_refuse_is_named(tmp_path):
    write_tokenizer(tmp_path, words=["▁run", "##▁▁run", "run"])
    with pytest.raises(ValueError, match="its vocabulary holds '▁▁run' twice"):
        gguf_export.vocabulary(AutoTokenizer.from_pretrained(tmp_path), 8)


def test_the_card_of_an_export_states_the_licence_of_its_source(tmp_path, run_script):
    write_complete_repository(tmp_path / "source")
    run_script(script, tmp_path / "source", tmp_path / "out", "--format", "gguf", "--types", "float16")
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
