"""Each head: what it returns, and its loss against the formula written out."""

import numerics
import pytest
import torch
import torch.nn.functional as F
from heads import HEADS, assert_equal_outputs, call_of, head, name_of, outputs
from models import holed_batch, ragged_batch, tiny_model
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from mosaicbert.bert_layers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    EncoderOutput,
)

SAME = numerics.SAME[torch.float32]


def trains(model, loss):
    """Whether a loss reaches the first layer."""
    loss.backward()
    return model.bert.encoder.layer[0].attention.self.Wqkv.weight.grad.abs().sum() > 0


def test_encoder_returns_standard_output_with_and_without_pooler():
    ids, mask = ragged_batch([7, 4])
    output = tiny_model(BertModel)(ids, mask)
    assert isinstance(output, BaseModelOutputWithPooling)
    assert output.last_hidden_state.shape == (2, 7, 48) and output.pooler_output.shape == (2, 48)
    bare = BertModel(tiny_model(BertModel).config, add_pooling_layer=False).eval()
    assert bare(ids, mask).pooler_output is None


@pytest.mark.parametrize("model_class", HEADS[1:], ids=name_of)
def test_a_hook_on_the_encoder_of_a_head_gets_the_type_that_the_encoder_returns(model_class):
    model, seen = head(model_class), []
    model.bert.register_forward_hook(lambda module, arguments, output: seen.append(output))
    call = call_of(model_class)
    expected = outputs(model, **call)
    model.config.return_dict = False
    assert_equal_outputs(model(**call), expected, 0.0)
    packed, again = seen
    ids, mask = ragged_batch([7, 4])
    padded = model.bert(ids, mask, return_dict=True)
    assert type(packed) is type(again) is type(padded) is EncoderOutput
    if model_class is not BertForMultipleChoice:
        numerics.assert_same(packed.packed.unpack(packed.last_hidden_state), padded.last_hidden_state, 0.0)
    assert padded.packed is None and len(model.bert(ids, mask)) == (1 if model.bert.pooler is None else 2)


def test_sequence_classification_losses_follow_the_problem_type():
    ids, mask = ragged_batch([7, 4, 9])
    cases = [
        ("single_label_classification", 3, torch.tensor([2, 0, 1]), F.cross_entropy),
        ("multi_label_classification", 3, torch.rand(3, 3).round(), F.binary_cross_entropy_with_logits),
        ("regression", 3, torch.randn(3, 3), F.mse_loss),
        ("regression", 1, torch.randn(3), lambda logits, labels: F.mse_loss(logits[:, 0], labels)),
    ]
    for problem, count, labels, formula in cases:
        for declared in (problem, None):
            model = tiny_model(BertForSequenceClassification, num_labels=count)
            model.config.problem_type = declared
            if declared is None and problem == "regression" and count > 1:
                continue  # floats for several labels mean multi label unless the config says otherwise
            output = model(ids, mask, labels=labels)
            assert isinstance(output, SequenceClassifierOutput) and output.logits.shape == (3, count)
            numerics.assert_same(output.loss, formula(output.logits, labels), SAME, problem)
            assert model.config.problem_type == problem
            assert trains(model, output.loss)


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_of_one_keeps_its_dimension(count):
    model = tiny_model(BertForSequenceClassification, num_labels=count)
    ids, _ = ragged_batch([5])
    labels = torch.tensor([0.5]) if count == 1 else torch.tensor([1])
    output = model(ids, labels=labels)
    assert output.logits.shape == (1, count) and torch.isfinite(output.loss)


def test_classifier_dropout_null_means_hidden_dropout_prob():
    assert tiny_model(BertForSequenceClassification, hidden_dropout_prob=0.3).dropout.p == 0.3
    assert tiny_model(BertForSequenceClassification, classifier_dropout=0.0).dropout.p == 0.0


def test_token_classification_counts_labelled_tokens_only():
    model = tiny_model(BertForTokenClassification, num_labels=5)
    ids, mask = holed_batch()
    labels = torch.randint(0, 5, ids.shape, generator=torch.Generator().manual_seed(0))
    labels[:, ::3] = -100
    output = model(ids, mask, labels=labels)
    assert isinstance(output, TokenClassifierOutput) and output.logits.shape == (*ids.shape, 5)
    counted = mask.bool() & (labels != -100)
    numerics.assert_same(output.loss, F.cross_entropy(output.logits[counted], labels[counted]), SAME)
    assert output.logits[~mask.bool()].abs().sum() == 0
    assert trains(model, output.loss)


def test_question_answering_never_points_at_padding():
    model = tiny_model(BertForQuestionAnswering)
    ids, mask = ragged_batch([9, 5, 12])
    start, end = torch.tensor([1, 2, 3]), torch.tensor([8, 40, -1])
    output = model(ids, mask, start_positions=start, end_positions=end)
    assert isinstance(output, QuestionAnsweringModelOutput)
    assert output.start_logits.shape == output.end_logits.shape == (3, 12)
    assert (output.start_logits[~mask.bool()] == -50).all() and (output.end_logits[~mask.bool()] == -50).all()
    assert output.start_logits[mask.bool()].abs().max() < 10
    # Ends 40 and -1 lie outside the 12 positions: cut off, not counted.
    expected = (F.cross_entropy(output.start_logits, start) + F.cross_entropy(output.end_logits[:1], end[:1])) / 2
    numerics.assert_same(output.loss, expected, SAME)
    assert trains(model, output.loss)
    half = model.bfloat16()(ids, mask)
    assert torch.isfinite(half.start_logits).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_of_answers_can_be_averaged_scaled_squared_and_smoothed(dtype):
    """With the lowest number of their dtype at padding these were infinite or NaN."""
    ids, mask = ragged_batch([9, 5, 12])
    one, other = (tiny_model(BertForQuestionAnswering, seed=seed).to(dtype)(ids, mask).start_logits for seed in (0, 1))
    mean = (one + other) / 2
    assert ((mean.float().softmax(-1) < 1e-20) == ~mask.bool()).all()
    assert (one * other).isfinite().all() and F.mse_loss(one, other).isfinite()

    def distance(student, teacher):
        return F.kl_div((student / 0.5).log_softmax(-1), (teacher / 0.5).softmax(-1), reduction="sum")

    one, other = one.float().detach().requires_grad_(), other.float()
    distilled = distance(one, other)
    rows = [distance(one[row, :length], other[row, :length]) for row, length in enumerate((9, 5, 12))]
    numerics.assert_same(distilled, sum(rows), SAME)
    entropy = -(one.softmax(-1) * one.softmax(-1).log()).sum()
    total = distilled + entropy + F.cross_entropy(one, torch.tensor([1, 2, 3]), label_smoothing=0.1)
    total.backward()
    assert total.isfinite() and one.grad.isfinite().all()


def test_multiple_choice_scores_each_choice_alone():
    model = tiny_model(BertForMultipleChoice)
    ids, mask = ragged_batch([9, 5, 12, 3, 8, 1])
    output = model(ids.view(2, 3, -1), mask.view(2, 3, -1), labels=torch.tensor([2, 0]))
    assert isinstance(output, MultipleChoiceModelOutput) and output.logits.shape == (2, 3)
    numerics.assert_same(output.loss, F.cross_entropy(output.logits, torch.tensor([2, 0])), SAME)
    one_by_one = model(ids[:, None], mask[:, None]).logits
    numerics.assert_same(output.logits.view(6, 1), one_by_one, SAME)
    embeds = model.get_input_embeddings()(ids).view(2, 3, -1, 48)
    numerics.assert_same(model(inputs_embeds=embeds, attention_mask=mask.view(2, 3, -1)).logits, output.logits, SAME)
    assert trains(model, output.loss)


@pytest.mark.parametrize("model_class", HEADS[2:], ids=name_of)
def test_every_head_serves_tuples_extra_outputs_and_num_items(model_class):
    model, call = head(model_class), call_of(model_class)
    full = model(**call, output_hidden_states=True, output_attentions=True)
    assert len(full.hidden_states) == 3 and len(full.attentions) == 2
    assert model(**call, return_dict=False)[0].item() == pytest.approx(full.loss.item(), rel=1e-5)
    count = 11 if model_class is BertForTokenClassification else 2
    divided = model(**call, num_items_in_batch=4).loss.item()
    assert divided == pytest.approx(full.loss.item() * count / 4, rel=1e-5)


def test_a_classifier_may_read_the_mean_over_tokens_instead_of_a_pooler():
    ids, mask = holed_batch()
    model = tiny_model(BertForSequenceClassification, num_labels=3, classifier_pooling="mean")
    assert model.bert.pooler is None
    hidden = model.bert(ids, mask).last_hidden_state
    mean = hidden.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    numerics.assert_same(model(ids, mask).logits, model.classifier(mean), SAME)


@pytest.mark.parametrize("traced", [False, True])
def test_an_answer_at_a_padded_position_does_not_count(traced):
    torch._dynamo.reset()
    model = tiny_model(BertForQuestionAnswering)
    ids, mask = ragged_batch([9, 5, 12])
    start, end = torch.tensor([1, 7, 3]), torch.tensor([8, 2, 11])  # 7 is padding of the second row
    ask = torch.compile(model, backend="eager") if traced else model
    output = ask(ids, mask, start_positions=start, end_positions=end)
    first = F.cross_entropy(output.start_logits[[0, 2]], start[[0, 2]])
    numerics.assert_same(output.loss, (first + F.cross_entropy(output.end_logits, end)) / 2, SAME)
    output = ask(ids, mask, start_positions=start * 0 + 20, end_positions=end * 0 - 1)
    assert output.loss.item() == 0.0
    half = tiny_model(BertForQuestionAnswering).bfloat16()(ids, mask, start_positions=start, end_positions=end)
    assert torch.isfinite(half.loss) and half.loss < 10


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (0, 0)], ids=str)
@pytest.mark.parametrize("model_class", HEADS[1:], ids=name_of)
def test_an_empty_batch_is_answered_alike_with_and_without_padding(model_class, shape):
    ids, rows = torch.ones(shape, dtype=torch.long), torch.zeros(shape[0], dtype=torch.long)
    per_token = model_class in (BertForMaskedLM, BertForTokenClassification)
    answers = ("start_positions", "end_positions") if model_class is BertForQuestionAnswering else ("labels",)
    labels = dict.fromkeys(answers, ids if per_token else rows)
    ids = ids[:, None].expand(-1, 3, -1) if model_class is BertForMultipleChoice else ids
    packed, padded = (
        outputs(head(model_class, unpad_inputs=unpad), input_ids=ids, attention_mask=torch.ones_like(ids), **labels)
        for unpad in (True, False)
    )
    for one, other in zip(packed, padded, strict=True):
        assert one.shape == other.shape and torch.allclose(one, other)
    is_labelled = len(rows) and not per_token and model_class is not BertForQuestionAnswering
    assert (packed[0].item() > 0) if is_labelled else (packed[0].item() == 0.0)
    packed[0].backward()
    padded[0].backward()
