"""The contenders (our model, the published MosaicBERT, and the alternatives of users) and the check of their numbers.

A contender is a function without arguments that does the work once. Letters as in `bert_layers.py`.
"""

import copy
import functools
import importlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
import transformers
from loading import ROOT, load_checkout, load_file
from published import PublishedModel, SelfAttention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

# Largest score of the attention cases: it decides which keys are negligible, and with it the time.
LARGEST_SCORE = 5.0

# Share of predicted tokens in the MLM step, and hidden dropout of the pretraining step, as MosaicBERT was trained.
MASKED_SHARE = 0.3
HIDDEN_DROPOUT = 0.1

# Sequences that the check of a pretraining step compares.
GATED_SEQUENCES = 64

# Measured where the package flash-attn-4 is installed.
FLASH_ATTENTION_4 = "FlashAttention 4, no bias"

GPU_ONLY = {"ours, skipping off", "ours, CUDA graph", "ours, reduce-overhead", "SDPA cuDNN, no bias", FLASH_ATTENTION_4}

# A contender of this name and a path is our model by the code of another checkout.
CHECKOUT = "checkout "

# The check covers all layers up to this many tokens, and only the first layer beyond; its cost is quadratic.
JUDGE_ALL_LAYERS = 4096


@dataclass(frozen=True)
class Sizes:
    """Sizes of the models: E, L, H, F, V, and the position table of models that have one."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30_528
    max_position_embeddings: int = 16_384


BASE = Sizes()
TINY = Sizes(hidden_size=48, num_hidden_layers=2, intermediate_size=64, vocab_size=100)


def shipped_sizes() -> Sizes:
    """The sizes of the checkpoint at the root."""
    config = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    return Sizes(**{name: config[name] for name in names})


SIZES = {"base": BASE, "shipped": shipped_sizes()}

numerics = load_file("tests/support/numerics.py")
count_flops = load_file("scripts/lib/recipe.py").count_flops
layers = load_checkout(ROOT)
attention = importlib.import_module(f"{layers.__package__}.bert_attention")
padding = importlib.import_module(f"{layers.__package__}.bert_padding")


def chunked_formula(query, key, value, lengths, slopes, scale, chunk=512):
    """ALiBi attention by matmul and softmax, `chunk` queries at a time, so that memory is linear in the length.

    Args:
        query, key, value: floating [T, H, D].
        lengths: tokens of each sequence.
        slopes: float32 [H].
        scale: factor of the scores.
        chunk: queries at a time.

    Returns:
        [T, H, D] in the dtype of `query`; softmax in float32.
    """
    contexts = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value))):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [H, n, D]
        positions = torch.arange(k.shape[1], device=k.device)
        for rows, chunk_positions in zip(q.split(chunk, dim=1), positions.split(chunk)):
            # Recomputed in backward: the weights of all layers would take hundreds of GiB at 8,192 tokens.
            arguments = (rows, k, v, chunk_positions, positions, slopes, scale)
            contexts.append(checkpoint(attend_chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(contexts)


def attend_chunk(q, k, v, query_positions, key_positions, slopes, scale):
    """A chunk of `chunked_formula`: [H, chunk, D] queries and [H, n, D] keys and values to [chunk, H, D]."""
    distance = (query_positions[:, None] - key_positions[None, :]).abs()
    scores = q @ k.transpose(1, 2) * scale - slopes[:, None, None] * distance
    return (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(0, 1)


class ChunkedSelfAttention(SelfAttention):
    """The published attention by `chunked_formula`; `bias` is the slopes."""

    def forward(self, hidden, attention_mask, indices, bias):
        qkv = self.Wqkv(hidden).unflatten(-1, (3, self.heads, -1))
        lengths = attention_mask.sum(1).tolist()
        return chunked_formula(*qkv.unbind(1), lengths, bias, qkv.shape[-1] ** -0.5).flatten(1)


class Judge(PublishedModel):
    """The published MosaicBERT with `chunked_formula` in place of its padded attention."""

    attention = ChunkedSelfAttention

    def bias(self, attention_mask):
        return self.slopes


def check(got, plain, truth, factor, what):
    """Compare one result by the rules of tests/support/numerics.py.

    Args:
        got: our result.
        plain: the judge's in the same dtype.
        truth: the judge's in float32; None: `plain` is.
        factor: how many times the error of `plain` is allowed, where there is a `truth`.
        what: for the message.

    Raises:
        AssertionError: the error is too large; a benchmark of wrong numbers is worthless.
    """
    if truth is None:
        numerics.assert_same(got, plain, numerics.SAME[torch.float32], what)
    else:
        numerics.assert_no_worse(got, plain, truth, factor, what)


class Attention:
    """Contenders for attention alone over q, k, v [T, 12, 64].

    Args:
        case: a `Case`.
        sizes: heads and head size come from here.
    """

    def __init__(self, case, sizes: Sizes):
        self.case = case
        device, heads = case.device, sizes.num_attention_heads
        head_dim = sizes.hidden_size // heads
        self.lengths, self.tokens = list(case.lengths), sum(case.lengths)
        generator = torch.Generator().manual_seed(0)
        self.scale = head_dim**-0.5
        qkv, self.grad = (
            torch.randn(self.tokens, *shape, generator=generator) for shape in ((3, heads, head_dim), (heads, head_dim))
        )
        norms = qkv[:, :2].norm(dim=-1).flatten(2).amax(dim=(0, 2))  # the largest |q| and |k|
        qkv[:, :2] *= (LARGEST_SCORE / (self.scale * norms.prod())) ** 0.5
        self.slopes = torch.tensor(attention.alibi_slopes(heads), device=device)
        dtype = getattr(torch, case.dtype)
        self.qkv = qkv.to(device, dtype).requires_grad_(case.mode != "forward")
        self.grad = self.grad.to(device, dtype)
        bounds = torch.tensor([0, *self.lengths]).cumsum(0).to(device, torch.int32)
        self.packed = padding.pack_flattened(bounds, max(self.lengths), (1, self.tokens))

    def contender(self, name: str):
        """The function to time, and its tokens per call."""
        attend = self.attend(name)
        if self.case.mode == "forward":
            return torch.no_grad()(lambda: attend(self.qkv)), self.tokens
        if self.case.mode == "step":
            return lambda: torch.autograd.grad(attend(self.qkv), self.qkv, self.grad)[0], self.tokens
        context = attend(self.qkv)
        return lambda: torch.autograd.grad(context, self.qkv, self.grad, retain_graph=True)[0], self.tokens

    def attend(self, name: str):
        """`name`'s attention: [T, 3, H, D] to [T, H, D]."""
        if name == "ours":
            chosen = layers.choose_attention(layers.AUTOMATIC, self.qkv, self.packed, 0.0)
            return lambda qkv: chosen(qkv, self.packed, self.slopes, self.scale, 0.0)
        if name == "eager":
            return lambda qkv: layers.eager_attention(qkv, self.packed, self.slopes, self.scale, 0.0)
        if name == "ours, skipping off":
            return self.attend_unskipped
        if name == "Flex":
            return self.flex()
        if name == FLASH_ATTENTION_4:
            from flash_attn.cute import flash_attn_func

            def attend_rows(qkv):
                rows = qkv.unflatten(0, (len(self.lengths), -1)).unbind(2)  # [B, S, H, D] each
                result = flash_attn_func(*rows, softmax_scale=self.scale)
                return (result[0] if isinstance(result, tuple) else result).flatten(0, 1)

            return attend_rows
        backends = {
            "SDPA flash, no bias": SDPBackend.FLASH_ATTENTION,
            "SDPA cuDNN, no bias": SDPBackend.CUDNN_ATTENTION,
        }
        bias = None
        if name == "SDPA, dense bias":
            positions = torch.arange(self.lengths[0], device=self.case.device)
            bias = -self.slopes[:, None, None] * (positions[:, None] - positions).abs()
            bias = bias.to(self.qkv.dtype)[None]

        def attend(qkv):
            rows = qkv.unflatten(0, (len(self.lengths), -1)).permute(2, 0, 3, 1, 4)  # [3, B, H, S, D]
            context = F.scaled_dot_product_attention(*rows, attn_mask=bias, scale=self.scale)
            return context.transpose(1, 2).flatten(0, 1)

        if name not in backends:
            return attend

        def attend_by_backend(qkv):
            with sdpa_kernel(backends[name]):
                return attend(qkv)

        return attend_by_backend

    def attend_unskipped(self, qkv):
        """Our Triton attention without skipping."""
        leaf = sys.modules[layers.triton_attention.__module__]
        limit, leaf.LONGEST_UNSKIPPED = leaf.LONGEST_UNSKIPPED, self.packed.max_seqlen
        try:
            return leaf.triton_attention(qkv, self.packed, self.slopes, self.scale, 0.0)
        finally:
            leaf.LONGEST_UNSKIPPED = limit

    def flex(self):
        """FlexAttention, compiled, with ALiBi and a mask that keeps sequences apart."""
        counts = torch.tensor(self.lengths, device=self.case.device)
        document = torch.arange(len(counts), device=self.case.device).repeat_interleave(counts)
        slopes = self.slopes

        def alibi(score, batch, head, query, key):
            return score - slopes[head] * (query - key).abs()

        def same_document(batch, head, query, key):
            return document[query] == document[key]

        mask = create_block_mask(same_document, None, None, self.tokens, self.tokens, device=self.case.device)
        compiled = torch.compile(flex_attention)

        def attend(qkv):
            rows = (x.transpose(0, 1)[None] for x in qkv.unbind(1))  # [1, H, T, D]
            return compiled(*rows, score_mod=alibi, block_mask=mask, scale=self.scale)[0].transpose(0, 1)

        return attend

    def gate(self):
        """Compare our result, and its gradient unless the mode is forward, with the judge's."""

        def results(attend, qkv):
            qkv = qkv.detach().requires_grad_(self.case.mode != "forward")
            context = attend(qkv)
            if self.case.mode == "forward":
                return [context]
            return [context, torch.autograd.grad(context, qkv, self.grad.to(qkv.dtype))[0]]

        def judge(qkv):
            return chunked_formula(*qkv.unbind(1), self.lengths, self.slopes, self.scale)

        got, plain = results(self.attend(self.case.ours), self.qkv), results(judge, self.qkv)
        truth = (None, None) if self.qkv.dtype == torch.float32 else results(judge, self.qkv.float())
        names = (("context", numerics.FORWARD), ("gradient", numerics.GRADIENT))
        for mine, theirs, exact, (what, factor) in zip(got, plain, truth, names):
            check(mine, theirs, exact, factor, what)


def contender_declines(name: str, device: str) -> Optional[str]:
    """Why a contender cannot be measured on a device, or None when it can."""
    if device != "cuda" and name in GPU_ONLY:
        return "it needs a GPU"
    if name == FLASH_ATTENTION_4:
        try:
            importlib.import_module("flash_attn.cute")
        except ImportError as error:
            return f"flash-attn-4 cannot be imported: {error}"
    return None


@functools.cache
def build(kind: str, sizes: Sizes, dtype: torch.dtype, device: str, dropout: float = 0.0):
    """A randomly initialised model with an MLM head.

    Args:
        kind: `ours`; `ours, SDPA`, the same with SDPA as its attention; `BERT` or `ModernBERT`, those of transformers
            with SDPA; or `CHECKOUT` and the path of another checkout, whose model gets the weights of ours.
        sizes: of ours and BERT; ModernBERT has its base size unless they are `TINY`.
        dtype: of the weights.
        device: where they are.
        dropout: of hidden states; attention has none.

    Returns:
        The model.
    """
    torch.manual_seed(0)
    fields = {**vars(sizes), "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0}
    package = layers
    if kind.startswith(CHECKOUT):
        package = load_checkout(Path(kind.removeprefix(CHECKOUT)))
    if kind == "BERT":
        config, model_class = transformers.BertConfig(**fields), transformers.BertForMaskedLM
    elif kind == "ModernBERT":
        tiny = {**vars(sizes), **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}}
        positions = {"max_position_embeddings": sizes.max_position_embeddings}
        config = transformers.ModernBertConfig(**(tiny if sizes == TINY else positions))
        model_class = transformers.ModernBertForMaskedLM
    else:
        config, model_class = package.BertConfig(**fields, sparse_prediction=True), package.BertForMaskedLM
    implementation = {"attn_implementation": "sdpa"} if kind in ("BERT", "ModernBERT", "ours, SDPA") else {}
    with torch.device(device):  # drawing the weights of a model on a CPU takes longer than measuring it on a GPU
        model = model_class._from_config(config, **implementation).to(dtype)
    if package is not layers:
        model.load_state_dict(build("ours", sizes, dtype, device).state_dict())
    return model


def unfused(function):
    """`function` with torch's own operators in place of our fused layers."""

    def call():
        rows = dict(layers.FUSED_LAYERS)
        layers.FUSED_LAYERS.update({name: replace(row, function=None) for name, row in rows.items()})
        try:
            return function()
        finally:
            layers.FUSED_LAYERS.update(rows)

    return call


class Encoder:
    """Contenders for the encoder's forward over a padded batch [B, S].

    Args:
        case: a `Case`.
        sizes: of the models.
    """

    def __init__(self, case, sizes: Sizes):
        self.case, self.sizes, self.dtype = case, sizes, getattr(torch, case.dtype)
        self.tokens = sum(case.lengths)
        self.ids, self.mask = self.batch(case.lengths)
        self.model = build(self.kind(case.ours), sizes, self.dtype, case.device).eval()

    @staticmethod
    def kind(name: str) -> str:
        """The model of a contender."""
        return "ours" if name.startswith("ours") and name != "ours, SDPA" else name

    def batch(self, lengths):
        """int64 [B, S] random ids and mask; rows are filled from the left, padding is 0."""
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(1, self.sizes.vocab_size, mask.shape, generator=torch.Generator().manual_seed(0))
        return (ids * mask).to(self.case.device), mask.to(self.case.device)

    def published(self, dtype=None, kind=PublishedModel):
        """The published MosaicBERT, or the judge, over the weights of our model; `dtype` converts them."""
        state = dict(self.model.named_parameters())
        if dtype is not None and dtype != self.dtype:
            state = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in state.items()}
        return kind(state, attention.alibi_slopes(self.sizes.num_attention_heads))

    def contender(self, name: str):
        """The function to time, and its tokens per call."""
        if name == "its matrix products":
            return torch.no_grad()(self.matrix_products()), self.tokens
        ids, mask, tokens = self.ids, self.mask, self.tokens
        if name == "published":
            model = self.published()
            return torch.no_grad()(lambda: model.last_hidden_state(ids, mask)), tokens
        if name == "ours, full rows":
            ids, mask = self.batch((max(self.case.lengths),) * len(self.case.lengths))
            tokens = mask.numel()
        encoder = build(self.kind(name), self.sizes, self.dtype, self.case.device).eval().base_model
        if name == "ours, CUDA graph":
            return self.captured(encoder), tokens
        if name in ("ours, no mask", "ours, reduce-overhead"):
            mask = None
        if name == "ours, compiled":
            encoder = torch.compile(encoder)
        if name == "ours, reduce-overhead":
            encoder = torch.compile(encoder, mode="reduce-overhead")
        return torch.no_grad()(lambda: encoder(ids, attention_mask=mask).last_hidden_state), tokens

    @torch.no_grad()
    def captured(self, encoder):
        """The encoder over rows without padding as a CUDA graph; each call copies its ids in and replays it.

        Raises:
            AssertionError: the graph gives other numbers than a plain call.
        """
        ids = self.ids.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, tunes, and allocates what is kept
                encoder(ids)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = encoder(ids).last_hidden_state

        def replay():
            ids.copy_(self.ids)
            graph.replay()
            return hidden

        ids.fill_(1)
        check(replay(), encoder(self.ids).last_hidden_state, None, None, "hidden states of the CUDA graph")
        return replay

    def difference(self, name: str) -> float:
        """Largest difference between our result and that of contender `name`, over the largest value."""
        return numerics.relative_error(self.contender(name)[0](), self.contender("ours")[0]())

    def matrix_products(self):
        """Only the matrix products of the encoder, for sequences of equal length."""
        count, length = self.mask.shape
        heads = self.sizes.num_attention_heads
        hidden = torch.randn(self.tokens, self.sizes.hidden_size, dtype=self.dtype, device=self.case.device)
        wide = hidden.new_ones(self.tokens, self.sizes.intermediate_size)
        query = hidden.view(count, length, heads, -1).transpose(1, 2).contiguous()  # [B, H, S, D]
        weights = query.new_ones(count, heads, length, length)

        def multiply():
            for layer in self.model.bert.encoder.layer:
                F.linear(hidden, layer.attention.self.Wqkv.weight)
                query @ query.transpose(-1, -2)
                weights @ query
                F.linear(hidden, layer.attention.output.dense.weight)
                F.linear(hidden, layer.mlp.gated_layers.weight)
                F.linear(wide, layer.mlp.wo.weight)

        return multiply

    @torch.no_grad()
    def gate(self):
        """Compare our hidden states of real tokens with the judge's."""
        short = max(self.case.lengths) <= JUDGE_ALL_LAYERS

        def judge(dtype):
            model = self.published(dtype, Judge)
            model.num_layers = model.num_layers if short else 1
            return model.encode(self.ids, self.mask)[0]

        states = self.model.base_model(self.ids, self.mask, output_hidden_states=True).hidden_states
        got = states[-1 if short else 1][self.mask.bool()]
        truth = None if self.dtype == torch.float32 else judge(torch.float32)
        check(got, judge(self.dtype), truth, numerics.MODEL, "hidden states")


class Training(Encoder):
    """Contenders for an MLM training step, forward and backward, over a padded batch; arguments as for `Encoder`."""

    autocast = False

    def __init__(self, case, sizes: Sizes):
        super().__init__(case, sizes)
        drawn = torch.rand(self.ids.shape, generator=torch.Generator().manual_seed(1)).to(case.device) < MASKED_SHARE
        self.labels = self.ids.masked_fill(~drawn | (self.mask == 0), -100)

    def contender(self, name: str):
        model = build("ours" if name == "published" else name, self.sizes, self.dtype, self.case.device).train()
        baseline = self.published() if name == "published" else None

        def step():
            model.zero_grad()
            if baseline is None:
                loss = model(self.ids, attention_mask=self.mask, labels=self.labels).loss
            else:
                loss, _ = baseline.masked_lm(self.ids, self.mask, self.labels)
            loss.backward()

        return step, self.tokens

    def difference(self, name: str) -> float:
        """The same for all gradients together."""
        gradients = []
        for contender in (name, "ours"):
            self.contender(contender)[0]()
            model = build(contender, self.sizes, self.dtype, self.case.device)
            parameters = sorted(model.named_parameters(), key=lambda named: named[0])
            gradients.append(torch.cat([parameter.grad.flatten() for _, parameter in parameters]))
        return numerics.relative_error(*gradients)

    def loss(self, model):
        """Our loss over the batch."""
        return model(self.ids, self.mask, labels=self.labels).loss

    def gate(self):
        """Compare our loss and the gradient of each weight with the judge's."""
        self.model.zero_grad()
        self.loss(self.model).backward()
        got = {name: parameter.grad for name, parameter in self.model.named_parameters()}

        def judge(dtype, autocast):
            self.model.zero_grad()
            model = self.published(dtype, Judge)
            with torch.autocast(self.case.device, torch.bfloat16, enabled=autocast):
                loss, _ = model.masked_lm(self.ids, self.mask, self.labels)
            loss.backward()
            return {name: model.get_parameter(name.removeprefix("bert.")).grad for name in got}

        plain = judge(self.dtype, self.autocast)
        exact = self.dtype == torch.float32 and not self.autocast
        truth = None if exact else judge(torch.float32, False)
        for name, gradient in got.items():
            check(gradient, plain[name], truth and truth[name], numerics.MODEL, name)


class Pretraining(Training):
    """Contenders for a step of scripts/pretrain_mlm.py: sequences of one length, concatenated to one row.

    float32 weights under bfloat16 autocast, hidden dropout, loss over what is masked, AdamW. Data is on the device.
    """

    autocast = True

    def loss(self, model):
        length = self.ids.shape[1]
        starts = torch.arange(0, self.tokens + 1, length, dtype=torch.int32, device=self.ids.device)
        ids, labels = self.ids.view(1, -1), self.labels.view(1, -1)
        with torch.autocast(self.case.device, torch.bfloat16):
            return model(ids, cu_seq_lens_q=starts, max_length_q=length, labels=labels).loss

    def contender(self, name: str):
        if name == "one large product":
            return self.product()
        model = build("ours", self.sizes, self.dtype, self.case.device, HIDDEN_DROPOUT).train()
        if name == "ours, layers compiled":
            model = copy.deepcopy(model)
            for layer in model.bert.encoder.layer:
                layer.compile()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.02, fused=True
        )

        def step():
            self.loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()

        return (unfused(step) if name == "ours, unfused layers" else step), self.tokens

    def product(self):
        """One large bfloat16 matrix product, and the tokens that our step processes with as many FLOPs.

        So its time a token over ours is our model FLOP utilization.
        """
        size = 8192 if self.case.device == "cuda" else 512
        matrix = torch.randn(size, size, dtype=torch.bfloat16, device=self.case.device)
        pairs, predicted = sum(length**2 for length in self.case.lengths), int((self.labels != -100).sum())
        flops = count_flops(self.model.config, self.tokens, pairs, predicted)
        return lambda: matrix @ matrix, 2 * size**3 / flops * self.tokens

    def gate(self):
        """As for `Training`, on the first sequences."""
        few = replace(self.case, lengths=self.case.lengths[:GATED_SEQUENCES])
        super(Pretraining, Pretraining(few, self.sizes)).gate()
