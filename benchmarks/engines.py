"""Contenders that serve an encoder: ONNX Runtime and OpenVINO with exports, and sentence-transformers."""

import functools
import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from contenders import BASE, Encoder, Sizes, build, check, numerics
from loading import ROOT, load_file
from transformers import AutoTokenizer

onnx_export = load_file("scripts/lib/onnx_export.py")
FOLDER = tempfile.TemporaryDirectory(prefix="mosaicbert-engines-")
# Names of contenders to the model that they serve and the engine.
ENGINES = {
    "ours, ONNX Runtime": ("ours", "onnxruntime"),
    "ours, OpenVINO": ("ours", "openvino"),
    "BERT, ONNX Runtime": ("BERT", "onnxruntime"),
    "BERT, OpenVINO": ("BERT", "openvino"),
}


@functools.cache
def exported(kind: str, sizes: Sizes) -> Path:
    """The encoder of a kind, see `build`, as a float32 ONNX file; made once a process."""
    encoder = build(kind, sizes, torch.float32, "cpu").eval().base_model
    path = Path(FOLDER.name) / f"{kind}-{sizes.hidden_size}.onnx"
    onnx.save((onnx_export.to_onnx if kind == "ours" else onnx_export.trace)(encoder), path)
    return path


class Serving(Encoder):
    """Contenders for the encoder's forward in the engines that people serve with; arguments as for `Encoder`."""

    def contender(self, name: str):
        if name not in ENGINES:
            return super().contender(name)
        kind, engine = ENGINES[name]
        answer = getattr(self, engine)(exported(kind, self.sizes))
        expected = super().contender(kind)[0]()
        real, truth = self.mask.bool(), None
        if self.dtype != torch.float32:
            plain = build(kind, self.sizes, torch.float32, "cpu").eval().base_model
            with torch.no_grad():
                truth = plain(self.ids, attention_mask=self.mask).last_hidden_state[real]
        got = torch.from_numpy(answer()).to(self.dtype)
        check(got[real], expected[real], truth, numerics.MODEL, name)
        return answer, self.tokens

    @property
    def inputs(self) -> dict:
        """The batch by the names of the file's inputs."""
        tensors = (self.ids, self.mask, torch.zeros_like(self.ids))
        return {name: tensor.numpy() for name, tensor in zip(onnx_export.INPUTS, tensors)}

    def onnxruntime(self, path: Path):
        """The forward in ONNX Runtime with torch's number of threads.

        Raises:
            ValueError: the case is not in float32.
        """
        import onnxruntime

        if self.dtype != torch.float32:
            raise ValueError("its CPU kernels compute in float32")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session, inputs = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"]), self.inputs
        return lambda: session.run(None, inputs)[0]

    def openvino(self, path: Path):
        """The forward in OpenVINO in the dtype of the case, with torch's number of threads."""
        import openvino

        precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[self.dtype]
        threads = min(torch.get_num_threads(), os.cpu_count())
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        compiled, inputs = openvino.Core().compile_model(path, "CPU", settings), self.inputs
        return lambda: compiled(inputs)[0]


class SortedTexts(Encoder):
    """Contenders for `SentenceTransformer.encode`, which sorts texts by length; arguments as for `Encoder`.

    A contender is a model, a comma, and where its texts are cut: `whole`, or `cut at` a number of tokens.
    """

    def __init__(self, case, sizes: Sizes):
        super().__init__(case, replace(sizes, vocab_size=BASE.vocab_size))
        self.tokenizer = AutoTokenizer.from_pretrained(ROOT)
        words = sorted(word for word in self.tokenizer.get_vocab() if word.isascii() and word.isalpha())
        draw = random.Random(0)
        self.texts = [" ".join(draw.choices(words, k=max(1, length - 2))) for length in case.lengths]  # [CLS], [SEP]

    def contender(self, name: str):
        from sentence_transformers import SentenceTransformer

        kind, cut = name.split(", ")
        encoder = build(kind, self.sizes, self.dtype, "cpu").eval().base_model
        with tempfile.TemporaryDirectory() as folder:
            encoder.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            settings = {"add_pooling_layer": False}
            model = SentenceTransformer(folder, device="cpu", trust_remote_code=True, model_kwargs=settings)
        model.max_seq_length = max(self.case.lengths) if cut == "whole" else int(cut.split()[-1])
        rows = self.tokenizer(self.texts, truncation=True, max_length=model.max_seq_length)["input_ids"]
        with torch.no_grad():
            expected = torch.stack([encoder(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in rows])
        check(model.encode(self.texts, convert_to_tensor=True), expected, None, None, name)
        return lambda: model.encode(self.texts), self.tokens

    def gate(self):
        """Nothing more: each contender compares its embeddings with plain means over its encoder's hidden states."""
