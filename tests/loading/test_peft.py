"""LoRA with peft on the documented target modules."""

import copy

import numerics
import pytest
import torch
from models import ragged_batch, tiny_model

from mosaicbert.bert_layers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

peft = pytest.importorskip("peft")
SAME = numerics.SAME[torch.float32]
TARGETS = ["Wqkv", "gated_layers", "wo"]


def adapted(model, **options):
    """The model with a LoRA adapter on `TARGETS`; its B matrices are zero, so its function is unchanged at first."""
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, **options))


def train(model, steps=5, **labels):
    """A few steps of AdamW; returns the losses."""
    ids, mask = ragged_batch([9, 4])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=mask, **labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_lora_trains_saves_only_the_adapter_reloads_and_merges(tmp_path):
    base = tiny_model()
    ids, mask = ragged_batch([9, 4])
    model = adapted(copy.deepcopy(base))
    numerics.assert_same(model(input_ids=ids, attention_mask=mask).logits, base(ids, mask).logits, 0.0)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, labels=ids)
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert {name.split(".lora_")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_" in name} == {
        *TARGETS
    }

    model.eval().save_pretrained(tmp_path)
    saved = {path.name for path in tmp_path.iterdir()}
    assert saved <= {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    expected = model(input_ids=ids, attention_mask=mask).logits
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    numerics.assert_same(reloaded(input_ids=ids, attention_mask=mask).logits, expected, 0.0)

    merged = reloaded.merge_and_unload()
    assert isinstance(merged, BertForMaskedLM)
    assert merged.cls.predictions.decoder.weight is merged.bert.embeddings.word_embeddings.weight
    numerics.assert_same(merged(ids, mask).logits, expected, SAME)
    merged.save_pretrained(tmp_path / "merged")
    numerics.assert_same(BertForMaskedLM.from_pretrained(tmp_path / "merged")(ids, mask).logits, expected, SAME)


@pytest.mark.parametrize("pooling, new", [("cls", ["classifier", "pooler"]), ("mean", None)])
def test_lora_for_classification_answers_alike_on_a_freshly_loaded_base(tmp_path, pooling, new):
    """The base has no classifier and no pooler, so each load draws new ones."""
    tiny_model().save_pretrained(tmp_path / "base")

    def load(seed):
        torch.manual_seed(seed)
        fields = {"num_labels": 3, "classifier_pooling": pooling}
        return BertForSequenceClassification.from_pretrained(tmp_path / "base", **fields)

    ids, mask = ragged_batch([9, 4])
    model = adapted(load(0), task_type="SEQ_CLS", modules_to_save=new)
    losses = train(model, labels=torch.tensor([2, 0]))
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(load(1), tmp_path / "adapter").eval()
    expected = model(input_ids=ids, attention_mask=mask).logits
    numerics.assert_same(reloaded(input_ids=ids, attention_mask=mask).logits, expected, 0.0)


def test_adapters_mixed_in_one_batch_need_kept_padding_and_are_refused_without_it():
    ids, _ = ragged_batch([6, 6, 6])
    for unpad in (False, True):
        model = tiny_model(BertForSequenceClassification, unpad_inputs=unpad)
        base = model(ids).logits
        config = peft.LoraConfig(target_modules=["Wqkv"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        model.add_adapter("other", config)
        expected = [base[0]]
        for row, name in ((1, "default"), (2, "other")):
            model.set_adapter(name)
            expected.append(model.eval()(input_ids=ids).logits[row])
        if unpad:
            with pytest.raises(ValueError, match="adapter_names"):
                model(input_ids=ids, adapter_names=["__base__", "default", "other"])
        else:
            mixed = model(input_ids=ids, adapter_names=["__base__", "default", "other"]).logits
            numerics.assert_same(mixed, torch.stack(expected), SAME)


@pytest.mark.parametrize("unpad", [True, False])
def test_a_tuned_prompt_is_read_as_embeddings_before_the_text(unpad):
    model = tiny_model(BertForSequenceClassification, num_labels=3, classifier_pooling="mean", unpad_inputs=unpad)
    ids, mask = ragged_batch([9, 4])
    words = model.get_input_embeddings()(ids).detach()
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    tuned = peft.get_peft_model(model, config).eval()
    prompt = tuned.get_prompt(2).detach()
    embeds, real = torch.cat((prompt, words), dim=1), torch.cat((torch.ones(2, 3).long(), mask), dim=1)
    found = tuned(input_ids=ids, attention_mask=mask, labels=torch.tensor([2, 0]))
    numerics.assert_same(found.logits, model(inputs_embeds=embeds, attention_mask=real).logits, SAME)
    found.loss.backward()
    assert all(p.grad.abs().max() > 0 for name, p in tuned.named_parameters() if "prompt_encoder" in name)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_prefix_tuning_is_refused(task):
    classes = {"SEQ_CLS": BertForSequenceClassification, "TOKEN_CLS": BertForTokenClassification}
    model_class = {**classes, "QUESTION_ANS": BertForQuestionAnswering}.get(task, BertModel)
    ids, mask = ragged_batch([9, 4])
    with pytest.raises(ValueError, match="past.key.values"):
        config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3)
        peft.get_peft_model(tiny_model(model_class), config)(input_ids=ids, attention_mask=mask)


def test_lora_under_gradient_checkpointing_gives_the_same_gradients():
    ids, mask = ragged_batch([9, 4])
    gradients = []
    for checkpointing in (False, True):
        model = adapted(tiny_model(hidden_dropout_prob=0.0)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if "lora_B" in name})
    assert gradients[0]
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        numerics.assert_same(gradients[1][name], gradient, SAME, name)
