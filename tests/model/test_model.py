"""The model as a whole: layouts that must agree, dtypes, outputs, training, compiling."""

import copy

import numerics
import pytest
import torch
from models import VOCAB, holed_batch, ragged_batch, tiny_model

from mosaicbert import bert_linear_cpu
from mosaicbert.bert_layers import (
    ATTENTION_BACKENDS,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    choose_attention,
)
from mosaicbert.bert_padding import pack_batch, pack_padded

SAME = numerics.SAME[torch.float32]
CPU_BACKENDS = ["eager", "sdpa", "auto"]


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    return request.param


def random_labels(ids, share=0.5, seed=5):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, VOCAB, ids.shape, generator=generator)
    labels[torch.rand(ids.shape, generator=generator) > share] = -100
    return labels


def test_padded_packed_and_single_agree(backend):
    model = tiny_model(attn_implementation=backend)
    lengths = [11, 1, 30, 7]
    ids, mask = ragged_batch(lengths, length=34)
    padded = model(ids, mask).logits
    flat = torch.cat([row[:n] for row, n in zip(ids, lengths)])[None]
    bounds = torch.tensor([0, 11, 12, 42, 49], dtype=torch.int32)
    packed = model(flat, cu_seq_lens_q=bounds, max_length_q=30).logits[0]
    start = 0
    for row, length in enumerate(lengths):
        single = model(ids[row : row + 1, :length]).logits[0]
        numerics.assert_same(padded[row, :length], single, SAME, f"row {row} padded")
        numerics.assert_same(packed[start : start + length], single, SAME, f"row {row} packed")
        assert padded[row, length:].abs().sum() == 0
        start += length


def test_batch_permutation_permutes_the_result(backend):
    model = tiny_model(BertModel, attn_implementation=backend)
    ids, mask = holed_batch()
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    numerics.assert_same(
        model(ids[order], mask[order]).last_hidden_state, model(ids, mask).last_hidden_state[order], SAME
    )


def test_left_padding_equals_right_padding(backend):
    model = tiny_model(BertModel, attn_implementation=backend)
    ids, mask = ragged_batch([9, 14], length=20)
    right = model(ids, mask).last_hidden_state
    left_ids = torch.stack([row.roll(20 - n) for row, n in zip(ids, [9, 14])])
    left_mask = torch.stack([row.roll(20 - n) for row, n in zip(mask, [9, 14])])
    left = model(left_ids, left_mask).last_hidden_state
    for row, length in enumerate([9, 14]):
        numerics.assert_same(left[row, 20 - length :], right[row, :length], SAME)


def test_a_hole_keeps_its_distance(backend):
    model = tiny_model(BertModel, attn_implementation=backend)
    ids, _ = ragged_batch([12])
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 5] = 0
    with_hole = model(ids, mask).last_hidden_state
    numerics.assert_same(with_hole, model(ids.index_fill(1, torch.tensor([5]), 3), mask).last_hidden_state, 0.0)
    closed = torch.cat((ids[:, :5], ids[:, 6:]), dim=1)
    difference = numerics.relative_error(with_hole[:, mask[0].bool()], model(closed).last_hidden_state)
    assert difference > 1e-3, "closing the hole must change distances, hence numbers"


def test_a_row_without_tokens_and_a_batch_without_any_are_zero(backend):
    model = tiny_model(BertModel, attn_implementation=backend)
    ids, mask = ragged_batch([0, 5], length=8)
    output = model(ids, mask)
    assert output.last_hidden_state[0].abs().sum() == 0
    assert torch.isfinite(output.pooler_output).all()
    numerics.assert_same(output.last_hidden_state[1, :5], model(ids[1:, :5]).last_hidden_state[0], SAME)
    nothing = model(ids, torch.zeros_like(mask))
    assert nothing.last_hidden_state.abs().sum() == 0 and nothing.last_hidden_state.shape == (2, 8, 48)


def test_length_far_over_alibi_starting_size_and_max_position_embeddings(backend):
    model = tiny_model(alibi_starting_size=4, max_position_embeddings=8, attn_implementation=backend)
    ids, _ = ragged_batch([700])
    long = model(ids).logits
    other = tiny_model(alibi_starting_size=2048, attn_implementation=backend)
    numerics.assert_same(long, other(ids).logits, 0.0)
    assert torch.isfinite(long).all()


def test_backends_agree():
    ids, mask = holed_batch()
    eager, sdpa, auto = (tiny_model(attn_implementation=name)(ids, mask).logits for name in CPU_BACKENDS)
    numerics.assert_same(sdpa, eager, SAME)
    numerics.assert_same(auto, eager, SAME)
    ids, mask = ragged_batch([9, 14])
    eager, cpu = (tiny_model(attn_implementation=name)(ids, mask).logits for name in ("eager", "cpu"))
    numerics.assert_same(cpu, eager, SAME)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_weights_err_no_more_than_the_plain_formula(backend, dtype):
    ids, mask = holed_batch()
    truth = tiny_model(BertModel).double()(ids, mask).last_hidden_state
    plain = tiny_model(BertModel, attn_implementation="eager").to(dtype)(ids, mask).last_hidden_state
    model = tiny_model(BertModel, attn_implementation=backend).to(dtype)
    output = model(ids, mask).last_hidden_state
    assert output.dtype == dtype
    numerics.assert_no_worse(output, plain, truth, numerics.MODEL)
    loss = tiny_model(attn_implementation=backend).to(dtype)(ids, mask, labels=random_labels(ids)).loss
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


@pytest.mark.parametrize("low_precision_layernorm", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains_in_every_backend(backend, dtype, low_precision_layernorm):
    ids, mask = holed_batch()
    model = tiny_model(attn_implementation=backend, low_precision_layernorm=low_precision_layernorm)
    exact = model(ids, mask, labels=random_labels(ids)).loss
    with torch.autocast("cpu", dtype=dtype):
        loss = model(ids, mask, labels=random_labels(ids)).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name
    # Rounding of the dtype, through two layers, on a loss of about log(101): 4 ulp of it.
    assert abs(loss.item() - exact.item()) < 4 * torch.finfo(dtype).eps * exact.item()


def test_low_precision_layernorm_computes_in_the_autocast_dtype():
    for low, expected in ((True, torch.bfloat16), (False, torch.float32)):
        model = tiny_model(BertModel, low_precision_layernorm=low)
        seen = []
        model.embeddings.LayerNorm.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.ones(1, 4, dtype=torch.long))
        assert [output.dtype for output in seen] == [expected]


def test_extra_outputs_come_on_request_only(backend):
    model = tiny_model(BertModel, attn_implementation=backend)
    ids, mask = holed_batch()
    plain = model(ids, mask)
    assert plain.hidden_states is None and plain.attentions is None
    full = model(ids, mask, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in full.hidden_states] == [(6, 24, 48)] * 3
    assert [tuple(weights.shape) for weights in full.attentions] == [(6, 12, 24, 24)] * 2
    numerics.assert_same(full.hidden_states[-1], plain.last_hidden_state, SAME)
    for weights in full.attentions:
        sums = weights.sum(-1)
        attended = mask.bool()[:, None, :].expand_as(sums)
        numerics.assert_same(sums[attended], torch.ones_like(sums[attended]), 1e-6)
        assert sums[~attended].abs().sum() == 0
        assert weights.transpose(-1, -2)[~attended].abs().sum() == 0
    for state in full.hidden_states:
        assert state[~mask.bool()].abs().sum() == 0
    model.config.output_hidden_states = True
    assert len(model(ids, mask).hidden_states) == 3


def test_return_dict_false_returns_what_is_there_as_a_tuple():
    model = tiny_model()
    ids, mask = ragged_batch([5, 3])
    (logits,) = model(ids, mask, return_dict=False)
    loss, again = model(ids, mask, labels=ids, return_dict=False)
    assert logits.shape == again.shape == (2, 5, VOCAB) and loss.dim() == 0
    model.config.return_dict = False
    assert isinstance(model(ids, mask), tuple)


def test_inputs_embeds_equal_input_ids_and_token_types_are_optional(backend):
    model = tiny_model(attn_implementation=backend)
    ids, mask = holed_batch()
    expected = model(ids, mask).logits
    numerics.assert_same(
        model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits, expected, 0.0
    )
    numerics.assert_same(model(ids, mask, token_type_ids=torch.zeros_like(ids)).logits, expected, 0.0)
    assert numerics.relative_error(model(ids, mask, token_type_ids=torch.ones_like(ids)).logits, expected) > 1e-3


def test_flattening_collator_input_gives_the_padded_numbers(backend):
    """transformers' DataCollatorWithFlattening, with position ids alone and with its boundaries."""
    from transformers import DataCollatorWithFlattening

    model = tiny_model(attn_implementation=backend)
    ids, mask = ragged_batch([5, 1, 8])
    expected = model(ids, mask).logits[mask.bool()]
    features = [{"input_ids": row[:n].tolist()} for row, n in zip(ids, [5, 1, 8])]
    for boundaries in (False, True):
        batch = DataCollatorWithFlattening(
            return_tensors="pt", return_position_ids=not boundaries, return_flash_attn_kwargs=boundaries
        )(features)
        batch.pop("labels")
        numerics.assert_same(model(**batch).logits[0], expected, SAME)
    # Ordinary position ids are no boundaries.
    plain = model(ids, mask, position_ids=torch.arange(8)[None]).logits
    numerics.assert_same(plain[mask.bool()], expected, 0.0)


def test_flattened_sequences_are_pooled_one_by_one(backend):
    model = tiny_model(BertForSequenceClassification, num_labels=3, attn_implementation=backend)
    ids, mask = ragged_batch([5, 2, 8])
    expected = model(ids, mask).logits
    flat = ids[mask.bool()][None]
    numerics.assert_same(model(flat, cu_seq_lens_q=torch.tensor([0, 5, 7, 15])).logits, expected, SAME)


def test_eval_ignores_dropout_rates_and_train_obeys_them(backend):
    """The fault of several encoder packages: attention dropout that stays on in eval, or never turns on."""
    ids, mask = holed_batch()
    rates = [{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": p} for p in (0.0, 0.5)]
    rates.append({"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.0})
    models = [tiny_model(attn_implementation=backend, **fields) for fields in rates]
    expected = models[0](ids, mask).logits
    for model in models:
        numerics.assert_same(model(ids, mask).logits, expected, 0.0)
        model.train()
    numerics.assert_same(models[0](ids, mask).logits, expected, 0.0)
    for model in models[1:]:
        assert numerics.relative_error(model(ids, mask).logits, expected) > 1e-2
        torch.manual_seed(3)
        first = model(ids, mask).logits
        torch.manual_seed(3)
        numerics.assert_same(model(ids, mask).logits, first, 0.0)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("rows", [False, True], ids=["packed", "holes"])
def test_attention_dropout_keeps_the_expectation(backend, rows):
    """Dropout works in every backend: the mean over many draws is the result without it."""
    torch.manual_seed(0)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 9:] = 0
    if rows:
        mask[1, 4] = 0
    packed = pack_padded(mask, (2, 12), mask.device)
    total = int(mask.sum())
    qkv = torch.randn(total, 3, 2, 8)
    slopes = torch.tensor([0.5, 0.1])
    attend = ATTENTION_BACKENDS[backend].function
    exact = attend(qkv, packed, slopes, 0.3, 0.0)
    draws = torch.stack([attend(qkv, packed, slopes, 0.3, 0.4) for _ in range(1500)])
    spread = draws.std(0) / 1500**0.5
    # Over 300 comparisons of a mean: five standard errors happen by chance once in two thousand runs.
    assert ((draws.mean(0) - exact).abs() < 5 * spread + 1e-6).all()
    assert (draws.std(0) > 0).all()


def test_two_runs_are_bitwise_equal(backend):
    ids, mask = holed_batch()
    results = []
    for _ in range(2):
        model = tiny_model(attn_implementation=backend)
        output = model(ids, mask, labels=random_labels(ids))
        output.loss.backward()
        results.append([output.logits] + [p.grad for p in model.parameters()])
    for first, second in zip(*results):
        assert torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(backend, reentrant):
    ids, mask = holed_batch()
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(attn_implementation=backend, attention_probs_dropout_prob=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        torch.manual_seed(1)
        model(ids, mask, labels=random_labels(ids)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        numerics.assert_same(gradients[1][name], gradient, SAME, name)


def test_num_items_in_batch_divides_the_summed_loss():
    model = tiny_model()
    ids, mask = ragged_batch([6, 9])
    labels = random_labels(ids)
    count = int(((labels != -100) & mask.bool()).sum())
    mean = model(ids, mask, labels=labels).loss
    for items in (2 * count, torch.tensor(2 * count)):
        assert model(ids, mask, labels=labels, num_items_in_batch=items).loss.item() == pytest.approx(mean.item() / 2)


def test_labels_anywhere_have_a_defined_loss(backend):
    model = tiny_model(attn_implementation=backend)
    ids, mask = ragged_batch([6, 9])
    logits = model(ids, mask).logits
    labels = random_labels(ids)
    labels[0, 2] = 0  # id 0 counts like any other
    counted = (labels != -100) & mask.bool()
    assert (labels[~mask.bool()] != -100).any(), "labels on padding are part of this test"
    expected = torch.nn.functional.cross_entropy(logits[counted], labels[counted])
    output = model(ids, mask, labels=labels)
    numerics.assert_same(output.loss, expected, SAME)
    numerics.assert_same(output.logits[counted], logits[counted], SAME)
    assert output.logits.shape == logits.shape and output.logits[~counted].abs().sum() == 0

    nothing = model(ids, mask, labels=torch.full_like(ids, -100)).loss
    assert nothing.item() == 0.0
    nothing.backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())
    assert model.get_input_embeddings().weight.grad is not None


def test_sparse_prediction_returns_the_labelled_rows():
    ids, mask = ragged_batch([6, 9])
    labels = random_labels(ids)
    counted = (labels != -100) & mask.bool()
    dense = tiny_model()(ids, mask, labels=labels)
    sparse = tiny_model(sparse_prediction=True)(ids, mask, labels=labels)
    assert sparse.loss.item() == dense.loss.item()
    numerics.assert_same(sparse.logits, dense.logits[counted], 0.0)


def test_known_places_of_labels_give_the_same_loss_and_logits():
    model = tiny_model()
    ids, _ = ragged_batch([9, 9])
    labels = random_labels(ids)
    expected = model(ids, labels=labels)
    places = (labels != -100).flatten().nonzero().flatten()
    output = model(ids, labels=labels, masked_lm_positions=places)
    assert output.loss.item() == expected.loss.item()
    numerics.assert_same(output.logits, expected.logits, 0.0)
    with pytest.raises(ValueError, match="masked_lm_positions needs a batch without padding, got an attention_mask"):
        model(ids, torch.ones_like(ids), labels=labels, masked_lm_positions=places)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_tensor_and_not_an_import_chooses_the_backend(dtype):
    """Triton is importable here, and may find a GPU; tensors on the CPU are served without it all the same."""
    pytest.importorskip("triton", reason="without Triton the reason is another one: tests/loading/test_loading.py")
    qkv = torch.randn(5, 3, 2, 16, dtype=dtype)
    packed = pack_batch(torch.ones(1, 5, dtype=torch.long))
    assert choose_attention("auto", qkv, packed, 0.0) is ATTENTION_BACKENDS["cpu"].function
    assert choose_attention("auto", qkv, packed, 0.1) is ATTENTION_BACKENDS["sdpa"].function
    ids, mask = ragged_batch([9, 4])
    model = tiny_model().to(dtype)
    assert model.config._attn_implementation == "auto"
    model(ids, mask, labels=random_labels(ids)).loss.backward()
    assert torch.isfinite(model.bert.encoder.layer[0].attention.self.Wqkv.weight.grad).all()


def test_tie_holds_by_identity_after_resize():
    model = tiny_model()
    ids, mask = ragged_batch([6, 9])
    before = model(ids, mask).logits
    model.resize_token_embeddings(VOCAB + 11)
    decoder = model.cls.predictions.decoder
    assert decoder.weight is model.get_input_embeddings().weight
    assert decoder.weight.shape[0] == decoder.bias.shape[0] == model.config.vocab_size == VOCAB + 11
    numerics.assert_same(model(ids, mask).logits[..., :VOCAB], before, SAME)


def test_layer_norm_eps_is_that_of_every_layernorm_but_the_mlm_heads():
    model = tiny_model(layer_norm_eps=1e-5)
    norms = {name: module.eps for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    assert norms.pop("cls.predictions.transform.LayerNorm") == 1e-12
    assert len(norms) == 5 and set(norms.values()) == {1e-5}


def test_initialisation_follows_the_published_rule():
    torch.manual_seed(0)
    model = BertForMaskedLM._from_config(tiny_model().config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().sum() == 0, name
        elif "norm" in name.lower():
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.1, rel=0.2), name
            # Five standard errors of a mean of N(0, 0.1).
            assert abs(parameter.mean().item()) < 5 * 0.1 / parameter.numel() ** 0.5, name
    assert model.get_input_embeddings().weight[0].abs().sum() == 0


def test_nothing_is_stored_but_parameters():
    """State built in __init__ is garbage after a load on the meta device."""
    model = tiny_model()
    assert list(model.buffers()) == []
    with torch.device("meta"):
        BertForMaskedLM(copy.deepcopy(model.config))


@pytest.mark.parametrize("backend, dynamic", [("auto", None), *((backend, True) for backend in CPU_BACKENDS)])
def test_compiled_without_a_graph_break_agrees(backend, dynamic):
    torch._dynamo.reset()
    ids, mask = holed_batch()
    mask[4, 0] = 1
    labels = random_labels(ids)
    model = tiny_model(attn_implementation=backend, num_hidden_layers=1)
    expected = model(ids, mask, labels=labels)
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    plain = model(ids[:5]).logits
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    output = compiled(ids, mask, labels=labels)
    numerics.assert_same(output.logits, expected.logits, SAME)
    numerics.assert_same(output.loss, expected.loss, SAME)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        numerics.assert_same(parameter.grad, gradients[name], SAME, name)
    numerics.assert_same(compiled(ids[:5]).logits, plain, SAME)


def test_layers_compiled_one_by_one_agree():
    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=1)
    ids, mask = ragged_batch([9, 24, 3])
    expected = model(ids, mask, labels=random_labels(ids))
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for layer in model.bert.encoder.layer:
        layer.compile(backend="aot_eager")
    output = model(ids, mask, labels=random_labels(ids))
    numerics.assert_same(output.logits, expected.logits, SAME)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        numerics.assert_same(parameter.grad, gradients[name], SAME, name)


def test_compiled_by_inductor_agrees():
    torch._dynamo.reset()
    ids, mask = ragged_batch([9, 24])
    model = tiny_model(num_hidden_layers=1)
    expected = model(ids, mask).logits
    numerics.assert_same(torch.compile(model)(ids, mask).logits, expected, SAME)


def test_feed_forward_in_parts_equals_the_whole_and_leaves_what_hooks_see(monkeypatch):
    layer = tiny_model().bert.encoder.layer[0].mlp
    hidden = torch.randn(37, 48, generator=torch.Generator().manual_seed(0))
    whole = layer(hidden)
    seen = []
    layer.gated_layers.register_forward_hook(lambda module, arguments, output: seen.append((output, output.clone())))
    monkeypatch.setattr(bert_linear_cpu, "PART_BYTES", 10 * 80 * 4)
    with torch.no_grad():
        numerics.assert_same(layer(hidden), whole, numerics.SAME[torch.float32])
    assert [len(output) for output, _ in seen] == [10, 10, 10, 7]
    assert all(torch.equal(output, copy) for output, copy in seen)


@pytest.mark.parametrize("size", [1e10, 1e16, 1e18], ids=str)
def test_scores_of_any_finite_size_are_attended_to(size):
    """Bounds of distances in tokens must not overflow an integer; 1e18 squared is still finite in float32."""
    qkv = torch.randn(1100, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    qkv[:, :2] *= size
    packed = pack_padded(None, (1, 1100), torch.device("cpu"))
    slopes = torch.tensor([0.5, 0.004])
    results = [ATTENTION_BACKENDS[name].function(qkv, packed, slopes, 0.3, 0.0) for name in ("eager", "sdpa", "cpu")]
    for result in results[1:]:
        numerics.assert_same(result, results[0], SAME)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_layernorm_in_float64_stays_in_float64_under_autocast(dtype):
    """Autocast leaves float64 alone, and so does the LayerNorm."""
    ids, mask = holed_batch()
    model = tiny_model(low_precision_layernorm=True).double()
    expected = model(ids, mask).logits
    with torch.autocast("cpu", dtype=dtype):
        numerics.assert_same(model(ids, mask).logits, expected, 0.0)
