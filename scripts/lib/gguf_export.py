"""Write a MosaicBERT as a GGUF file for llama.cpp and Ollama: an encoder that gives mean embeddings."""

import json
from pathlib import Path

import gguf
import numpy
import torch
from gguf.quants import dequantize, quantize

from .cli import one_line

# llama.cpp's name for this architecture: symmetric ALiBi, separate gate and value, post-LayerNorm.
ARCHITECTURE = "jina-bert-v2"
# The format's name of each type for matrices, and for the metadata of the file. Vectors stay float32.
TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "int8": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# The name of each type in file names, by which Ollama and the Hub choose a file.
LABELS = {kind: matrix_type.name for kind, (matrix_type, _) in TYPES.items()}
EMBEDDINGS = {
    "token_embd.weight": "embeddings.word_embeddings.weight",
    "token_types.weight": "embeddings.token_type_embeddings.weight",
    "token_embd_norm.weight": "embeddings.LayerNorm.weight",
    "token_embd_norm.bias": "embeddings.LayerNorm.bias",
}
# Tensors of a layer in the file, and our weight that holds their rows in this order.
LAYER = {
    "attn_q.weight attn_k.weight attn_v.weight": "attention.self.Wqkv.weight",
    "attn_q.bias attn_k.bias attn_v.bias": "attention.self.Wqkv.bias",
    "attn_output.weight": "attention.output.dense.weight",
    "attn_output.bias": "attention.output.dense.bias",
    "attn_output_norm.weight": "attention.output.LayerNorm.weight",
    "attn_output_norm.bias": "attention.output.LayerNorm.bias",
    "ffn_gate.weight ffn_up.weight": "mlp.gated_layers.weight",
    "ffn_down.weight": "mlp.wo.weight",
    "ffn_down.bias": "mlp.wo.bias",
    "layer_output_norm.weight": "mlp.layernorm.weight",
    "layer_output_norm.bias": "mlp.layernorm.bias",
}


def tensor_names(num_layers: int) -> dict[str, list[str]]:
    """Map each weight of the encoder to the tensors of the file that hold its rows, in order."""
    names = {ours: [theirs] for theirs, ours in EMBEDDINGS.items()}
    for layer in range(num_layers):
        for theirs, ours in LAYER.items():
            names[f"encoder.layer.{layer}.{ours}"] = [f"blk.{layer}.{name}" for name in theirs.split()]
    return names


def check_tokenizer(tokenizer) -> None:
    """Raise ValueError unless llama.cpp splits text as the tokenizer does, into uncased WordPiece tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    fields = json.loads(backend.to_str()) if backend is not None else {}
    model, normalizer = fields.get("model") or {}, fields.get("normalizer") or {}
    if model.get("type") != "WordPiece" or model.get("continuing_subword_prefix") != "##":
        raise ValueError(
            f"source: its tokenizer is {model.get('type', 'unknown')}, and a GGUF of this architecture holds an "
            "uncased WordPiece vocabulary; --format onnx takes any tokenizer"
        )
    plain = normalizer.get("lowercase") and normalizer.get("strip_accents") is not False
    if normalizer.get("type") != "BertNormalizer" or not plain or not normalizer.get("handle_chinese_chars"):
        raise ValueError(
            "source: its tokenizer keeps case, accents or Chinese words, which llama.cpp's WordPiece tokenizer does "
            "not; --format onnx takes any tokenizer"
        )


def vocabulary(tokenizer, size: int) -> tuple[list[str], list[int]]:
    """Spell a vocabulary of `size` rows as llama.cpp does.

    Returns:
        Tokens, with `▁` at the start of a word and nothing within it, and the type of each.

    Raises:
        ValueError: two tokens get one spelling, so that llama.cpp would refuse the file.
    """
    special = set(tokenizer.all_special_ids)
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, index in tokenizer.get_vocab().items():
        if index in special:
            tokens[index], types[index] = token, gguf.TokenType.CONTROL
        else:
            tokens[index] = token[2:] if token.startswith("##") else f"▁{token}"
            types[index] = gguf.TokenType.NORMAL
    if len(set(tokens)) < size:
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise ValueError(f"source: its vocabulary holds {twice!r} twice once llama.cpp's word starts are written")
    return tokens, [int(kind) for kind in types]


def to_gguf(encoder: torch.nn.Module, tokenizer, path: Path, kind: str, name: str) -> None:
    """Write an encoder and its vocabulary.

    Args:
        encoder: a `BertModel`; the format has no pooler, so its pooler is left out.
        tokenizer: of the model.
        path: of the new file.
        kind: a key of `TYPES`.
        name: of the model, for the metadata.

    Raises:
        ValueError: the format or llama.cpp does not support the model.
        OSError: the file cannot be written.
    """
    check_tokenizer(tokenizer)
    config, (matrix_type, file_type) = encoder.config, TYPES[kind]
    block = gguf.GGML_QUANT_SIZES[matrix_type][0]
    for field in ("hidden_size", "intermediate_size"):
        if getattr(config, field) % block:
            raise ValueError(
                f"types: in GGUF {kind} needs a {field} that is a multiple of {block}, got {getattr(config, field)}"
            )
    tokens, types = vocabulary(tokenizer, config.vocab_size)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_type_count(config.type_vocab_size)
    ids = {"bos": "cls", "eos": "sep", "sep": "sep", "unk": "unk", "pad": "pad", "mask": "mask"}
    for theirs, ours in ids.items():
        index = getattr(tokenizer, f"{ours}_token_id")
        if index is not None:
            getattr(writer, f"add_{theirs}_token_id")(index)
    weights = encoder.state_dict()
    for ours, theirs in tensor_names(config.num_hidden_layers).items():
        parts = weights[ours].float().numpy()
        for part, tensor in zip(numpy.split(parts, len(theirs)), theirs):
            # llama.cpp reads token types and vectors in float32, whatever the file's type.
            plain = part.ndim == 1 or tensor == "token_types.weight"
            part_type = gguf.GGMLQuantizationType.F32 if plain else matrix_type
            writer.add_tensor(tensor, quantize(part, part_type), raw_dtype=part_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:  # on a full disk NumPy only reports how much it has written
        raise OSError(f"{path.name} cannot be written, {one_line(error)}") from error
    finally:
        writer.close()


def read_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights of an encoder back in float32, under the names of `BertModel` and without a pooler."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    num_layers = sum(name.endswith("attn_q.weight") for name in tensors)
    weights = {}
    for ours, theirs in tensor_names(num_layers).items():
        parts = [dequantize(tensors[name].data, tensors[name].tensor_type) for name in theirs]
        weights[ours] = torch.from_numpy(numpy.concatenate(parts).astype(numpy.float32))
    return weights
