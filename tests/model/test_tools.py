"""Tools that take a model apart: offloading, several devices, torch.export, torch.func, hooks that attribute."""

import numerics
import pytest
import torch
import transformers
from devices import SecondDevice, place_on_second_device
from heads import BACKENDS, HEADS, SAME, assert_equal_outputs, call_of, head, name_of, outputs
from models import holed_batch, ragged_batch
from packaging.version import Version
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from mosaicbert.bert_layers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

# Offloaded weights


def gradless(model):
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "dispatch_to_disk"])
@pytest.mark.parametrize("model_class", HEADS, ids=name_of)
def test_offloaded_weights_come_back_for_each_layer(tmp_path, model_class, way):
    accelerate = pytest.importorskip("accelerate")
    call = call_of(model_class)
    expected = outputs(gradless(head(model_class)), **call)
    model = gradless(head(model_class))
    if way == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif way == "disk_offload":
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    else:
        base = "" if model_class is BertModel else "bert."
        places = {name: "cpu" for name, _ in model.named_children() if name != "bert"}
        places |= {f"{base}embeddings": "disk", f"{base}encoder.layer.0": "disk", f"{base}encoder.layer.1": "cpu"}
        if (model if model_class is BertModel else model.bert).pooler is not None:
            places |= {f"{base}pooler": "disk"}
        if model_class is BertModel:
            del places["encoder"]
            places |= {"embeddings": "disk", "pooler": "disk"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert any(p.is_meta for p in model.parameters())
    assert_equal_outputs(outputs(model, **call), expected, 0.0)


@pytest.mark.parametrize(
    "places",
    [{"bert": "disk", "cls": "disk"}, {"bert.embeddings": "cpu", "bert.encoder": "disk", "cls": "cpu"}],
    ids=["all", "encoder"],
)
def test_a_device_map_to_disk_loads_and_answers(tmp_path, places):
    """The tied pair, embedding and decoder, stays together, as accelerate wants it of every model."""
    pytest.importorskip("accelerate")
    if places["cls"] == "disk" and Version(transformers.__version__) < Version("5.17"):
        pytest.skip("transformers up to 5.0 cannot serve a tied pair from disk, that of stock BERT included")
    model = head(BertForMaskedLM)
    model.save_pretrained(tmp_path / "model")
    options = {"device_map": places, "offload_folder": tmp_path / "offload"}
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "model", **options).eval()
    call = call_of(BertForMaskedLM, labels=False)
    with torch.no_grad():
        numerics.assert_same(loaded(**call).logits, model(**call).logits, 0.0)


# Several devices


@pytest.mark.parametrize("placed", [["layer.1"], ["layer.0", "layer.1"], ["layer.0.mlp.wo"]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_on_a_second_device_give_the_same_numbers(backend, placed):
    pytest.importorskip("accelerate")
    model = gradless(head(BertModel, attn_implementation=backend))
    ids, mask = holed_batch()
    mask[3, 0] = 1  # the emulation does not reach into torch's formula for no query at all
    expected = model(ids, mask, output_hidden_states=True).hidden_states
    for name in placed:
        place_on_second_device(model.encoder.get_submodule(name))
    with torch.no_grad(), SecondDevice():
        got = model(ids, mask, output_hidden_states=True).hidden_states
    assert_equal_outputs(got, expected)


# torch.export


@pytest.mark.parametrize("dims, strict", [("dynamic", False), ("dynamic", True), ("named", False)])
@pytest.mark.parametrize("model_class", HEADS, ids=name_of)
def test_exported_programs_take_other_batch_sizes_and_lengths(model_class, dims, strict):
    model = gradless(head(model_class, num_hidden_layers=1))
    call = call_of(model_class, labels=False)
    rank = call["input_ids"].dim()
    if dims == "dynamic":
        free = {0: torch.export.Dim.DYNAMIC, rank - 1: torch.export.Dim.DYNAMIC}
    else:
        free = {0: torch.export.Dim("batch", max=64), rank - 1: torch.export.Dim("length", max=4096)}
    shapes = {name: free for name in call}
    program = torch.export.export(model, (), call, dynamic_shapes=shapes, strict=strict)
    for lengths in ((7, 4), (3, 20, 11), (90, 1, 17, 60)):
        call = call_of(model_class, lengths, labels=False)
        expected = model(**call)
        got = program.module()(**call)
        assert set(got) == set(expected)
        for name in expected:
            numerics.assert_same(got[name], expected[name], SAME, name)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_exported_programs_answer_holes_and_empty_rows(backend, strict):
    model = gradless(head(BertModel, num_hidden_layers=1, attn_implementation=backend))
    ids, mask = ragged_batch([7, 4])
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {"input_ids": free, "attention_mask": free}
    example = {"input_ids": ids, "attention_mask": mask}
    program = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=strict)
    ids, mask = holed_batch()
    got = program.module()(input_ids=ids, attention_mask=mask).last_hidden_state
    numerics.assert_same(got, model(ids, mask).last_hidden_state, SAME)


# torch.func


def flat(gradients):
    """All gradients as one vector, as some are zero by symmetry and have rounding errors only."""
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def loss_of(model, **extra):
    """The loss of a call as a function of the parameters."""

    def loss(parameters, call):
        return functional_call(model, parameters, (), {**call, **extra}).loss

    return loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_class", HEADS[1:], ids=name_of)
def test_torch_func_grad_equals_backward(model_class, backend):
    call = call_of(model_class, lengths=(90, 70))
    model = head(model_class, attn_implementation=backend)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = grad(loss_of(model))(parameters, call)
    model(**call).loss.backward()
    numerics.assert_same(*(flat(g) for g in (gradients, {n: p.grad for n, p in model.named_parameters()})), SAME)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_call_uses_the_parameters_given(backend):
    model, other = (head(BertForMaskedLM, seed=seed, attn_implementation=backend) for seed in (0, 1))
    call = call_of(BertForMaskedLM)
    got = functional_call(model, dict(other.named_parameters()), (), call)
    numerics.assert_same(got.loss, other(**call).loss, 0.0)


@pytest.mark.parametrize("mask", [False, True], ids=["no_mask", "mask"])
@pytest.mark.parametrize("model_class", [BertForSequenceClassification, BertForMaskedLM], ids=name_of)
def test_vmap_of_grad_gives_per_sample_gradients(model_class, mask):
    lengths = (7, 4, 5) if mask else (7, 7, 7)
    call = call_of(model_class, lengths)
    if not mask:
        del call["attention_mask"]
    model = head(model_class, attn_implementation="eager")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    rows = {name: tensor[:, None] for name, tensor in call.items()}
    gradients = vmap(grad(loss_of(model)), in_dims=(None, 0))(parameters, rows)
    for sample in range(3):
        model.zero_grad()
        model(**{name: tensor[sample] for name, tensor in rows.items()}).loss.backward()
        one = {name: gradient[sample] for name, gradient in gradients.items()}
        numerics.assert_same(flat(one), flat({n: p.grad for n, p in model.named_parameters()}), SAME)


def test_jvp_of_the_logits_equals_the_product_with_the_gradient():
    model = head(BertForSequenceClassification, attn_implementation="eager")
    call = call_of(BertForSequenceClassification, labels=False)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tangents = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}

    def logits(parameters):
        return functional_call(model, parameters, (), call).logits

    _, direction = jvp(logits, (parameters,), (tangents,))
    gradients = grad(lambda p: logits(p).sum())(parameters)
    expected = sum((gradients[name] * tangents[name]).sum() for name in parameters)
    numerics.assert_same(direction.sum(), expected, 1e-4)


# Hooks that attribute


def test_a_hook_on_a_layer_finds_the_padded_states_through_the_batch_in_its_arguments():
    """Inner layers see packed tokens [T, E]; the batch that travels with them puts them back."""
    model = head(BertModel)
    seen = []

    def hook(module, arguments, output):
        packed = next(x for x in arguments if hasattr(x, "unpack"))
        seen.append(packed.unpack(output[0]))

    for layer in model.encoder.layer:
        layer.register_forward_hook(hook)
    ids, mask = ragged_batch([7, 4])
    states = model(ids, mask, output_hidden_states=True).hidden_states
    assert_equal_outputs(seen, list(states[1:]), 0.0)


def test_integrated_gradients_over_inputs_embeds_sum_to_the_difference():
    """As Captum computes them: a batch of steps between a baseline and the input, which keeps its [B, S, E] shape."""
    model = gradless(head(BertForSequenceClassification)).double()
    ids, mask = ragged_batch([7, 4])
    words = model.get_input_embeddings()
    end, start = words(ids), words(torch.zeros_like(ids))
    steps = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    total = torch.zeros_like(end)
    for step in steps.split(50):
        point = (start + step[:, None, None, None] * (end - start)).flatten(0, 1).requires_grad_()
        score = model(inputs_embeds=point, attention_mask=mask.repeat(len(step), 1)).logits[:, 1].sum()
        total += torch.autograd.grad(score, point)[0].view(len(step), *end.shape).sum(0)
    attributions = ((end - start) * total / 400).sum((1, 2))
    difference = [model(inputs_embeds=x, attention_mask=mask).logits[:, 1] for x in (end, start)]
    numerics.assert_same(attributions, difference[0] - difference[1], 1e-4)


@pytest.mark.parametrize("inner", ["embeddings.word_embeddings", "encoder.layer.1.mlp.wo"])
def test_hooks_that_replace_an_output_reach_the_answer(inner):
    model = head(BertModel)
    call = call_of(BertModel)
    before = model(**call).last_hidden_state
    seen = []
    handle = model.get_submodule(inner).register_forward_hook(lambda m, a, out: seen.append(out) or out * 2)
    after = model(**call).last_hidden_state
    # Input embeddings are seen in the caller's layout, inner layers packed.
    assert seen[0].shape == ((2, 7, 48) if "embeddings" in inner else (11, 48))
    assert numerics.relative_error(after, before) > 1e-3
    handle.remove()
    numerics.assert_same(model(**call).last_hidden_state, before, 0.0)


@pytest.mark.parametrize("model_class", HEADS, ids=name_of)
def test_inner_modules_return_tensors_only(model_class):
    """Captum clones every output of the layer that it attributes to."""
    model = head(model_class)
    seen = []
    for name, module in model.named_modules():
        if name.split(".")[-1] not in ("", "bert", "encoder"):
            module.register_forward_hook(lambda m, a, out: seen.extend(out if isinstance(out, tuple) else (out,)))
    for weights in (False, True):
        model(**call_of(model_class), output_attentions=weights)
    assert seen and all(torch.is_tensor(x) for x in seen)


@pytest.mark.parametrize("model_class", HEADS[1:], ids=name_of)
def test_hooks_on_the_encoder_of_a_head_run_once_a_call(model_class):
    model = head(model_class)
    seen = []
    model.bert.register_forward_pre_hook(lambda m, a: seen.append("before"))
    model.bert.register_forward_hook(lambda m, a, out: seen.append(out[0].shape[-1]))
    model(**call_of(model_class))
    assert seen == ["before", 48]


@pytest.mark.parametrize("model_class", HEADS[1:], ids=name_of)
def test_an_encoder_compiled_inside_its_head_is_what_the_head_runs(model_class):
    torch._dynamo.reset()
    graphs = []
    model, call = head(model_class, num_hidden_layers=1), call_of(model_class)
    expected = outputs(model, **call)
    model.bert = torch.compile(model.bert, backend=lambda graph, inputs: graphs.append(graph) or graph)
    assert_equal_outputs(outputs(model, **call), expected)
    assert graphs


def test_noise_on_the_input_embeddings_counts_on_their_padded_shape():
    """As NEFTune adds it: a hook whose scale is the square root of S * E."""
    model = head(BertModel)
    ids, mask = ragged_batch([7, 4])
    noise = torch.linspace(-1, 1, 7 * 48).view(7, 48)
    words = model.get_input_embeddings()
    expected = model(inputs_embeds=words(ids) + noise / (7 * 48) ** 0.5, attention_mask=mask).last_hidden_state
    words.register_forward_hook(lambda m, a, out: out + noise / (out.size(1) * out.size(2)) ** 0.5)
    numerics.assert_same(model(ids, mask).last_hidden_state, expected, 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_keep_the_batch_dimension_where_padding_is_kept(backend):
    """What Opacus and Captum need: `unpad_inputs=False` shows every layer [B, S, ...], and padding adds no gradient."""
    fields = {"attn_implementation": backend, "unpad_inputs": False}
    model = head(BertForSequenceClassification, **fields)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("bert.encoder")}
    inputs, grads = {}, {}
    for name, module in layers.items():
        module.register_forward_hook(lambda m, arguments, output, name=name: inputs.update({name: arguments[0]}))
        module.register_full_backward_hook(lambda m, grad_in, grad_out, name=name: grads.update({name: grad_out[0]}))
    call = call_of(BertForSequenceClassification)
    model(**call, num_items_in_batch=1).loss.backward()
    for sample in range(2):
        single = head(BertForSequenceClassification, **fields)
        single(**{name: tensor[sample : sample + 1] for name, tensor in call.items()}).loss.backward()
        expected = dict(single.named_parameters())
        for name in layers:
            assert inputs[name].shape[:2] == grads[name].shape[:2] == (2, 7)
            got = torch.einsum("so,si->oi", grads[name][sample], inputs[name][sample])
            numerics.assert_same(got, expected[f"{name}.weight"].grad, SAME, name)
