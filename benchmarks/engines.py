"""Contenders that serve an exported encoder: ONNX Runtime and OpenVINO, ours and BERT's."""

import functools
import os
import tempfile
from pathlib import Path

import onnx
import torch
from contenders import Encoder, Sizes, build, check, numerics
from loading import load_file

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
