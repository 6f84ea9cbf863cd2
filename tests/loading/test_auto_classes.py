"""Auto classes: each gives our class with its weights, or refuses; none gives stock BERT."""

import json
import pickle

import numerics
import pytest
import torch
import transformers
from conftest import ROOT
from folders import write_complete_repository
from heads import call_of, outputs
from lib.common import CODE_FILES
from models import VOCAB, tiny_config, tiny_model
from processes import run_python
from repositories import REMOTE, is_ours

from mosaicbert.bert_layers import BertModel

# tests/card/test_loads.py loads the others.
AUTO_CLASSES = {"AutoModelForTextEncoding": "BertModel", "AutoModelForPreTraining": "BertForMaskedLM"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    write_complete_repository(folder, vocab_size=VOCAB)
    return folder


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_every_auto_class_of_an_encoder_gives_its_class_and_weights(repository, auto_class):
    model = getattr(transformers, auto_class).from_pretrained(repository, **REMOTE).eval()
    assert type(model).__name__ == AUTO_CLASSES[auto_class] and is_ours(model)
    encoder = getattr(model, "bert", model)
    expected = tiny_model().bert(**call_of(BertModel)).last_hidden_state
    numerics.assert_same(encoder(**call_of(BertModel)).last_hidden_state, expected, 0.0)


@pytest.mark.parametrize("way", ["from_pretrained", "from_config"])
@pytest.mark.parametrize("auto_class", ["AutoModelForNextSentencePrediction", "AutoModelForCausalLM"])
def test_an_auto_class_without_a_model_is_refused_with_a_list_of_those_that_have_one(repository, auto_class, way):
    source = repository
    if way == "from_config":
        source = transformers.AutoConfig.from_pretrained(repository, **REMOTE)
    with pytest.raises(ValueError, match="AutoModelForMaskedLM") as error:
        getattr(getattr(transformers, auto_class), way)(source, **REMOTE)
    assert auto_class in str(error.value)


def test_every_auto_class_of_stock_bert_is_ours_or_refuses():
    """So that no auto class builds stock BERT, whose encoder would be random."""
    from transformers.models.auto import modeling_auto

    mappings = [m for name, m in vars(modeling_auto).items() if name.endswith("_MAPPING") and name.isupper()]
    served = {id(mapping) for mapping in mappings if transformers.BertConfig in mapping}
    classes = {name: value for name, value in vars(modeling_auto).items() if isinstance(value, type)}
    autos = {name for name, auto in classes.items() if id(getattr(auto, "_model_mapping", None)) in served}
    assert len(autos) >= 10
    known = json.loads((ROOT / "config.json").read_text())["auto_map"]
    deprecated = {"_AutoModelWithLMHead", "AutoModelWithLMHead"}  # gone since transformers 5
    assert not autos - set(known) - deprecated


def test_an_encoder_decoder_of_two_mosaicberts_is_refused_instead_of_built_from_stock_bert(repository):
    remote = {"encoder_trust_remote_code": True, "decoder_trust_remote_code": True}
    # 4.54 stops earlier: it drops the flag for the encoder.
    with pytest.raises(ValueError, match="MosaicBERT is a bidirectional encoder|trust_remote_code"):
        transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(repository, repository, **remote)


@pytest.mark.parametrize("loader", ["AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"])
def test_a_folder_from_a_saved_config_holds_the_code_that_from_config_needs(tmp_path, loader):
    tiny_config(num_labels=3).save_pretrained(tmp_path)
    assert {*CODE_FILES} <= {file.name for file in tmp_path.iterdir()}
    config = transformers.AutoConfig.from_pretrained(tmp_path, **REMOTE)
    model = getattr(transformers, loader).from_config(config, **REMOTE)
    assert is_ours(model)
    assert torch.isfinite(outputs(model, **call_of(BertModel))[0]).all()


class Tagger(transformers.PreTrainedModel):
    """A user's own model around ours; a subclass says which config it takes."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder = transformers.AutoModel.from_config(config, **REMOTE)
        self.tags = torch.nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, **call):
        return self.tags(self.encoder(**call).last_hidden_state)


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_a_users_model_around_ours_is_saved_with_the_code_that_it_needs(repository, tmp_path, kind):
    loaded = transformers.AutoConfig.from_pretrained(repository, **REMOTE)
    config_class = type(loaded) if kind == "ours" else transformers.BertConfig
    own = type("OwnTagger", (Tagger,), {"config_class": config_class, "__module__": __name__})
    model = own(loaded).eval()
    model.save_pretrained(tmp_path / "saved")
    assert {*CODE_FILES} <= {file.name for file in (tmp_path / "saved").iterdir()}
    again = own.from_pretrained(tmp_path / "saved").eval()
    assert is_ours(again.encoder)
    numerics.assert_same(again(**call_of(BertModel)), model(**call_of(BertModel)), 0.0)


def test_a_pickled_model_loads_in_a_process_that_has_prepared_for_remote_code(repository, tmp_path):
    """As docs/tasks.md says of Ray; a process that does not know ends in an error."""
    model = transformers.AutoModelForMaskedLM.from_pretrained(repository, **REMOTE)
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    read = f"import pickle; print(pickle.load(open({str(tmp_path / 'model')!r}, 'rb')).num_parameters())"
    know = "from transformers.dynamic_module_utils import init_hf_modules; init_hf_modules()\n"
    assert "No module named 'transformers_modules'" in run_python(read, fails=True)
    assert run_python(know + read).split() == [str(model.num_parameters())]
