"""The shipped checkpoint in other engines: OpenVINO, and what `make engines` installs (llama.cpp, transformers.js)."""

import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import export as script
import numerics
import pytest
import torch
from conftest import ROOT
from folders import write_tokenizer
from models import tiny_model
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

from mosaicbert.bert_layers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

MODULES = ROOT / ".venv" / "engines" / "node_modules"
SENTENCES = ["Yesterday she [MASK] a letter to her brother.", "He opened the [MASK] and went in."]
TEXTS = [
    "Café déjà vu, Ångström, naïve",
    "我喜欢猫 and 東京",
    "I 😀 cats 👍🏽!",
    "x" * 100 + " is read whole",
    "tabs\tand\nlines  too, ﬁne print ½ ™ Ⅷ",
    "\u200bzero width\u00ad, İstanbul, ẞtraße",
    "the cat sat on the mat " * 170,
]
TEXT = "the big cat sat on a mat and then the dog ran over it"
LONG_WORD = "a" * 150 + " end"
TYPES = {".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
# Tells the server when the page has answers or says that it cannot have any, and loads a picture until then.
WATCH = b"""<script>
const done = () => document.querySelector("#answers tr, #status").textContent.match(/\\d|cannot/);
const tell = () => done() && fetch("/found", { method: "POST" });
new MutationObserver(tell).observe(document.body, { childList: true, subtree: true });
</script><img src="/wait.png" hidden>"""
CDN = b"https://cdn.jsdelivr.net/npm/"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)


@pytest.fixture
def engines():
    if not MODULES.is_dir() or shutil.which("node") is None:
        pytest.skip("the engines are not installed; run make engines")


@pytest.fixture
def ask_node(engines):
    """Asks a script beside this file, which reads JSON and writes its answer as JSON on its last line."""

    def ask(name, **question):
        command = ["node", Path(__file__).with_name(name)]
        question = json.dumps({"modules": str(MODULES), **question})
        done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return ask


def expected_answers():
    """The three best answers to each of `SENTENCES`: pairs of a token and its probability."""
    model = AutoModelForMaskedLM.from_pretrained(ROOT, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(ROOT)
    answers = []
    for sentence in SENTENCES:
        batch = tokenizer(sentence, return_tensors="pt")
        with torch.no_grad():
            scores = model(**batch).logits[batch["input_ids"] == tokenizer.mask_token_id].softmax(-1)[0]
        best = scores.topk(3)
        answers.append([(tokenizer.decode([i]), p) for i, p in zip(best.indices.tolist(), best.values.tolist())])
    return answers


def best_span(model, tokenizer, question, context):
    """The most probable answer in the context and its probability, among those and no answer."""
    batch = tokenizer(question, context, return_tensors="pt")
    with torch.no_grad():
        output = model(**batch)
    allowed = torch.tensor([i == 1 for i in batch.sequence_ids()])
    allowed[0] = True
    start, end = (
        scores[0].masked_fill(~allowed, -torch.inf).softmax(-1) for scores in (output.start_logits, output.end_logits)
    )
    scores = (start[:, None] * end).triu()
    scores[0] = 0  # no answer
    first, last = divmod(scores.argmax().item(), len(end))
    return tokenizer.decode(batch["input_ids"][0, first : last + 1]), scores.max().item()


def test_openvino_answers_from_all_files_as_the_checkpoint_does(export_demo, tokenizer):
    openvino = pytest.importorskip("openvino")
    expected = expected_answers()
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="np"))
    masks = (batch["input_ids"] == tokenizer.mask_token_id).argmax(1)
    # With AMX each Core sets a stack for signal handlers. A Core that ends before a later one leaves it unmapped memory
    # to restore, and the next signal that has a handler kills the process.
    core = openvino.Core()
    # Where weights have 8 bits, OpenVINO rounds what they are multiplied by as well.
    for name, near in (("model", 1e-4), ("model_fp16", 2e-3), ("model_quantized", 0.1)):
        compiled = core.compile_model(
            export_demo("onnx") / "onnx" / f"{name}.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        logits = torch.from_numpy(compiled(batch)[0])
        for row, position, answers in zip(logits, masks, expected):
            best = row[int(position)].softmax(-1).topk(1)
            assert tokenizer.decode(best.indices.tolist()) == answers[0][0], name
            assert best.values.item() == pytest.approx(answers[0][1], abs=near), name


def test_transformers_js_cuts_texts_and_fills_masks_as_transformers_does(ask_node, export_demo, tokenizer):
    texts = [*TEXTS, LONG_WORD, "", "It's [MASK]."]
    near = {"fp32": 1e-4, "fp16": 2e-3, "q8": 0.05}
    calls = [
        {"task": "fill-mask", "dtype": dtype, "inputs": [sentence, {"top_k": 3}]}
        for dtype in near
        for sentence in SENTENCES
    ]
    got = ask_node("transformers_js.mjs", folder=str(export_demo("onnx")), texts=texts, calls=calls)
    assert got["tokens"] == [tokenizer(text)["input_ids"] for text in texts]
    for call, answers, expected in zip(calls, got["answers"], expected_answers() * len(near), strict=True):
        assert answers[0]["token_str"] == expected[0][0], call
        scores = [score for _, score in expected]
        assert [a["score"] for a in answers] == pytest.approx(scores, abs=near[call["dtype"]]), call


def test_the_block_for_node_fills_a_mask(engines, export_demo, tmp_path):
    [block] = re.findall(r"^```js\n(.*?)^```", (ROOT / "docs" / "serving.md").read_text("utf-8"), flags=re.S | re.M)
    (tmp_path / "block.mjs").write_text(block, encoding="utf-8")
    (tmp_path / "node_modules").symlink_to(MODULES)
    (tmp_path / "my-onnx").symlink_to(export_demo("onnx"))
    done = subprocess.run(["node", "block.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search("token_str: '(.*?)'", done.stdout)[1] == "wrote"


@pytest.mark.parametrize(
    ("model_class", "task", "inputs"),
    [
        (BertModel, "feature-extraction", [TEXT, {"pooling": "mean"}]),
        (BertForSequenceClassification, "text-classification", [TEXT, {"top_k": None}]),
        (BertForTokenClassification, "token-classification", [TEXT, {"ignore_labels": []}]),
        (BertForQuestionAnswering, "question-answering", ["the cat", TEXT]),
    ],
)
def test_transformers_js_serves_every_task_as_transformers_does(
    ask_node, tmp_path, run_script, model_class, task, inputs
):
    source, folder = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    labels = {"id2label": dict(enumerate("ABC"))} if task.endswith("classification") else {}
    model = tiny_model(model_class, vocab_size=write_tokenizer(source), initializer_range=0.3, **labels)
    model.save_pretrained(source)
    options = ["--features"] if model_class is BertModel else []
    run_script(script, source, folder, "--format", "onnx", "--types", "float32", *options)
    calls = [{"task": task, "dtype": "fp32", "inputs": inputs}]
    [got] = ask_node("transformers_js.mjs", folder=str(folder), texts=[], calls=calls)["answers"]
    tokenizer = AutoTokenizer.from_pretrained(source)
    if task == "feature-extraction":
        with torch.no_grad():
            expected = model(**tokenizer(TEXT, return_tensors="pt")).last_hidden_state.mean(1)
        numerics.assert_same(torch.tensor(got), expected, numerics.SAME[torch.float32])
    elif task == "question-answering":  # transformers 5 has no such pipeline
        answer, score = best_span(model, tokenizer, *inputs)
        assert got["answer"] == answer and got["score"] == pytest.approx(score, abs=1e-4)
    else:
        expected = pipeline(task, model=model, tokenizer=tokenizer)(TEXT, **inputs[1])
        name = "label" if task == "text-classification" else "entity"
        assert [answer[name] for answer in got] == [answer[name] for answer in expected]
        scores = [answer["score"] for answer in expected]
        assert [answer["score"] for answer in got] == pytest.approx(scores, abs=1e-4)


def test_llama_cpp_cuts_texts_and_embeds_them_as_transformers_does(ask_node, export_demo, tokenizer):
    files = {name: str(export_demo("gguf") / f"demo-{name}.gguf") for name in ("F32", "F16", "Q8_0")}
    got = ask_node("llama_cpp.mjs", files=list(files.values()), texts=[*TEXTS, LONG_WORD, ""])
    *tokens, long_word, nothing = got["tokens"]
    assert tokens == [tokenizer(text)["input_ids"][1:-1] for text in TEXTS] and nothing == []
    # The one difference, which the card of a GGUF names: transformers has one [UNK] for such a word.
    assert len(long_word) > len(tokenizer(LONG_WORD)["input_ids"]) == 4
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True).eval()
    for name, least in (("F32", 0.999999), ("F16", 0.999999), ("Q8_0", 0.98)):
        for text, embedding in zip(TEXTS, got["embeddings"][files[name]]):
            with torch.no_grad():
                hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            cosine = torch.cosine_similarity(hidden.mean(0).double(), torch.tensor(embedding).double(), dim=0)
            assert cosine >= least, (name, text[:30])


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_sentence_transformers_embeds_in_other_engines_where_optimum_has_them(tmp_path, run_script, backend):
    pytest.importorskip("optimum.onnxruntime" if backend == "onnx" else "optimum.intel")
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "encoder"
    run_script(script, ROOT, folder, "--format", "onnx", "--types", "float32", "--features")
    options = {"file_name": "onnx/model.onnx", "provider": "CPUExecutionProvider"}
    if backend == "openvino":
        import openvino

        model = openvino.convert_model(folder / "onnx" / "model.onnx")
        openvino.save_model(model, folder / "openvino" / "openvino_model.xml", compress_to_fp16=False)
        options = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    exported = SentenceTransformer(str(folder), backend=backend, model_kwargs=options)
    source = SentenceTransformer(str(ROOT), trust_remote_code=True, device="cpu")
    assert exported.max_seq_length == 8192
    got, expected = (model.encode(TEXTS, convert_to_tensor=True).cpu() for model in (exported, source))
    numerics.assert_same(got, expected, numerics.SAME[torch.float32])


class Site(http.server.BaseHTTPRequestHandler):
    """The page, the folder `model` beside it, and the packages that it takes from a CDN, which are here.

    The page loads until it has answers: it gets a picture that arrives only then.
    """

    model, found = None, None

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/wait.png":
            self.found.wait(100)
        package = re.fullmatch(r"/npm/((?:@[\w-]+/)?[\w.-]+)@[^/]+/(.*)", path)
        file = ROOT / "examples" / "browser" / "index.html" if path == "/" else Path(path)
        if package:
            file = MODULES / package[1] / package[2]
        elif path.startswith("/model/"):
            file = self.model / path.removeprefix("/model/")
        elif path != "/":
            return self.send_error(404)
        if not file.is_file():
            return self.send_error(404)
        kind = TYPES.get(file.suffix, "application/octet-stream")
        content = file.read_bytes()
        if kind.startswith("text/"):
            content = content.replace(CDN, b"http://%s/npm/" % self.headers["Host"].encode())
        if path == "/":
            content += WATCH
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self):
        self.found.set()
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_page_fills_a_mask_in_chromium(engines, export_demo, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("Chromium is not installed")
    handler = type("Handler", (Site,), {"model": export_demo("onnx"), "found": threading.Event()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
        url = f"http://127.0.0.1:{server.server_port}/"
        done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=200)
        handler.found.set()
        server.shutdown()
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"<tr>.*?<span>(.*?)</span>.*?<span>(.*?)</span></td></tr>", done.stdout)
    assert len(rows) == 5, re.findall(r'id="status">(.*?)<', done.stdout)
    (token, score), *_ = rows
    assert token == expected_answers()[0][0][0]
    assert float(score) == pytest.approx(expected_answers()[0][0][1], abs=0.05)


def test_the_page_asks_for_the_release_of_transformers_js_that_is_tested():
    page = (ROOT / "examples" / "browser" / "index.html").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    asked = re.findall(r"@huggingface/transformers@([\d.]+)", page + makefile)
    assert len(asked) == 2 and len(set(asked)) == 1
