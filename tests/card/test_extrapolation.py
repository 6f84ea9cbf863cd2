"""The model reads far beyond the lengths it was trained on, and `alibi_starting_size` does what the published card
says: other libraries cut no text below it, and nothing has to be prepared."""

import json

import numerics
import pytest
import reference
import torch
import transformers
from conftest import ROOT
from lib import evaluation
from models import ragged_batch
from repositories import REMOTE, assert_loads, published_config, write_repository
from rows import DEVICE, ROWS
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from mosaicbert.configuration_bert import BertConfig

pytestmark = pytest.mark.card

SAME = numerics.SAME[torch.float32]
# A speech that belongs to this repository, in the public domain; the checkpoint was never trained on it.
SPEECH = ROOT / "examples" / "state_of_the_union_1961.txt"


@pytest.fixture(scope="module")
def shipped():
    """The shipped checkpoint for 8,192 tokens, by the lines of the published card; trained on at most 2,048."""
    config = transformers.BertConfig.from_pretrained(ROOT)
    config.alibi_starting_size = 8192
    return AutoModelForMaskedLM.from_pretrained(ROOT, config=config, **REMOTE).to(DEVICE).eval()


@pytest.fixture(scope="module")
def speech():
    """The tokens of the speech, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT)
    return tokenizer(SPEECH.read_text(), add_special_tokens=False, verbose=False)["input_ids"], tokenizer


@torch.inference_mode()
def hidden_states(model, ids, row="auto", **call):
    """The last hidden states [B, S, E] of rows of tokens, by one row of the attention table."""
    device = ROWS.get(row, DEVICE)
    model.set_attn_implementation(row)
    call = {name: value.to(device) for name, value in call.items()}
    return model.to(device).bert(torch.tensor(ids, device=device), **call).last_hidden_state.cpu()


# Quality


def test_the_loss_does_not_rise_with_the_length(shipped, speech, record_property):
    """The same 1,111 tokens are masked at every length; the expected losses were measured on a CPU in float32."""
    expected = {128: 3.315, 512: 3.237, 2048: 3.239, 7281: 3.254}
    tokens, tokenizer = speech
    assert len(tokens) == 7281
    shipped.set_attn_implementation("auto")
    for length, loss in expected.items():
        measured = evaluation.measure(shipped.to(DEVICE), tokenizer, [tokens], length, 8192)
        assert measured["masked"] == 1111
        assert measured["loss"] == pytest.approx(loss, abs=0.002)
        record_property(f"loss at {length}", measured["loss"])
    assert max(list(expected.values())[1:]) < expected[128]


# Numbers


@pytest.fixture(scope="module")
def formula(shipped, speech):
    """Hidden states of 1,024 tokens by the independent formula in float64."""
    judge = reference.Model(
        {name: tensor.cpu() for name, tensor in shipped.state_dict().items()}, shipped.config.to_dict()
    )
    return judge.hidden_states(torch.tensor([speech[0][:1024]]))[-1]


@pytest.mark.parametrize("row", ROWS)
def test_each_row_of_the_attention_table_follows_the_formula(shipped, speech, formula, row):
    numerics.assert_same(hidden_states(shipped, [speech[0][:1024]], row), formula, SAME)


def test_rows_agree_at_4096_tokens(shipped, speech):
    """All but eager, whose memory grows with the square of the length."""
    expected = hidden_states(shipped, [speech[0][:4096]])
    for row in ROWS.keys() - {"eager"}:
        numerics.assert_same(hidden_states(shipped, [speech[0][:4096]], row), expected, SAME, row)


def test_a_text_alone_and_inside_a_longer_batch_gives_the_same(shipped, speech):
    tokens, tokenizer = speech
    alone = hidden_states(shipped, [tokens[:700]])[0]
    short = tokens[:700] + [tokenizer.pad_token_id] * 2300
    left = [tokenizer.pad_token_id] * 2300 + tokens[:700]
    mask = torch.ones(3, 3000, dtype=torch.long)
    mask[1, 700:] = mask[2, :2300] = 0
    padded = hidden_states(shipped, [tokens[:3000], short, left], attention_mask=mask)
    numerics.assert_same(padded[1, :700], alone, SAME, "padded on the right")
    numerics.assert_same(padded[2, 2300:], alone, SAME, "padded on the left")
    packed = hidden_states(shipped, [tokens[:3000] + tokens[:700]], cu_seq_lens_q=torch.tensor([0, 3000, 3700]))
    numerics.assert_same(packed[0, 3000:], alone, SAME, "packed behind another text")


# The field


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return write_repository(tmp_path_factory.mktemp("hub") / "mosaic-bert-tiny")


def test_the_shipped_checkpoint_answers_as_before_when_the_field_is_raised(shipped, speech):
    untouched = AutoModelForMaskedLM.from_pretrained(ROOT, **REMOTE).to(DEVICE).eval()
    assert (untouched.config.alibi_starting_size, shipped.config.alibi_starting_size) == (512, 8192)
    tokens = [speech[0][:2000]]
    assert torch.equal(hidden_states(shipped, tokens), hidden_states(untouched, tokens))


def test_alibi_starting_size_can_be_raised_the_card_way(tmp_path, repository):
    config = transformers.BertConfig.from_pretrained(repository)
    config.alibi_starting_size = 2048
    model = assert_loads(repository, config=config)
    assert model.config.alibi_starting_size == model.config.max_position_embeddings == 2048
    ids, _ = ragged_batch([600])
    numerics.assert_same(model(ids).logits, assert_loads(repository)(ids).logits, 0.0)
    model.config.alibi_starting_size = 4096
    assert saved_limit(model, tmp_path / "saved") == 4096


def saved_limit(model_or_config, folder):
    """What other libraries read as the longest text in a saved config.json."""
    model_or_config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())["max_position_embeddings"]


def test_other_libraries_read_no_limit_below_alibi_starting_size(tmp_path, repository):
    assert published_config()["max_position_embeddings"] == 512
    built = BertConfig(**published_config(alibi_starting_size=1024))
    assert built.max_position_embeddings == saved_limit(built, tmp_path / "config") == 1024
    built.alibi_starting_size = 2048
    assert built.max_position_embeddings == 2048
    built.max_position_embeddings = 600
    assert built.max_position_embeddings == 2048
    built.max_position_embeddings = 9000
    assert built.max_position_embeddings == 9000
    loaded = AutoConfig.from_pretrained(repository, alibi_starting_size=3000, **REMOTE)
    assert loaded.max_position_embeddings == 3000
    assert AutoConfig.from_pretrained(tmp_path / "config", **REMOTE).max_position_embeddings == 1024
