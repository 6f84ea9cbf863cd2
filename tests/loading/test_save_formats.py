"""What `save_pretrained` writes loads again."""

import json

import numerics
import pytest
import torch
from folders import write_complete_repository
from lib import common
from models import ragged_batch, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments

SAME = numerics.SAME[torch.float32]


def logits_of(folder):
    """Logits of the model in a folder, loaded as a user does."""
    return AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()(*ragged_batch([9, 4])).logits


@pytest.fixture
def expected():
    return tiny_model()(*ragged_batch([9, 4])).logits


def test_safetensors_by_default_with_the_tied_weight_once(tmp_path, expected):
    tiny_model().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "bert.embeddings.word_embeddings.weight" in names
    assert "cls.predictions.decoder.weight" not in names
    numerics.assert_same(logits_of(tmp_path), expected, 0.0)


def test_shards_over_max_shard_size_load(tmp_path, expected):
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    numerics.assert_same(logits_of(tmp_path), expected, 0.0)


def sentence(seed):
    """A row with its own tokens as labels."""
    ids, mask = ragged_batch([7], seed=seed, vocab=26)
    return {"input_ids": ids[0], "attention_mask": mask[0], "labels": ids[0]}


def train(folder, output, **arguments):
    """Train the model of a folder for four steps, saving at the second; returns it and its last loss."""
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    steps = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4}
    fixed = {"learning_rate": 1e-2, "report_to": [], "use_cpu": True, "seed": 0, "disable_tqdm": True}
    options = TrainingArguments(output_dir=str(output), **steps, **fixed)
    trainer = Trainer(model=model, args=options, train_dataset=[sentence(seed) for seed in range(16)])
    trainer.train(**arguments)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_trainer_checkpoint_of_a_local_base_model_holds_code_and_resumes(tmp_path):
    write_complete_repository(tmp_path / "base")
    model, losses = train(tmp_path / "base", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert set(common.CODE_FILES) <= {path.name for path in checkpoint.iterdir()}
    # transformers 5.0 saved LayerNorm.gamma here, and resumed with LayerNorms as they were before training.
    assert set(load_file(checkpoint / "model.safetensors")) <= set(model.state_dict())
    resumed, again = train(tmp_path / "base", tmp_path / "run", resume_from_checkpoint=str(checkpoint))
    assert again == losses
    for (name, expected), actual in zip(model.named_parameters(), resumed.parameters()):
        numerics.assert_same(actual, expected, SAME, name)
    ids, mask = ragged_batch([9, 4], vocab=26)
    last = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "checkpoint-4", trust_remote_code=True)
    numerics.assert_same(last(ids, mask).logits, model.eval()(ids, mask).logits, 0.0)
    assert last.cls.predictions.decoder.weight is last.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("tied", [True, False])
def test_equal_copies_of_decoder_and_embedding_are_written_once_only_where_they_are_tied(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decoder = "cls.predictions.decoder.weight"
    gathered[decoder] = gathered["bert.embeddings.word_embeddings.weight"].clone()
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert (decoder in load_file(tmp_path / "model.safetensors")) == (not tied)
