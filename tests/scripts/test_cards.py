"""The card of a model: where it comes from, how its task is used, and that foreign names stay plain text."""

import json
import re
import shutil

import pytest
import yaml
from folders import write_complete_repository
from lib import cards, checkpoint_conversion


def test_the_card_names_source_revision_and_licence(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    source = tmp_path / "models--someone--bert" / "snapshots" / commit
    write_complete_repository(source)
    checkpoint = checkpoint_conversion.read_checkpoint(str(source), None)
    assert checkpoint.revision == commit
    cards.write_card(tmp_path, "by hand", "someone/bert", source, commit)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    expected = ["license: apache-2.0", "base_model: someone/bert", f"`{commit}`", "trust_remote_code=True", "revision="]
    assert all(words in card for words in expected), card
    cards.write_card(tmp_path, "by hand", "someone/bert", source, license="mit")
    assert "| Licence | mit |" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_card_names_the_base_model_that_a_local_source_names(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    source = tmp_path / "source"
    source.mkdir()
    for stated, expected in (("a/b", "a/b"), ("[a/b, c/d]", None), ("'a b'", None)):
        (source / "README.md").write_text(f"---\nbase_model: {stated}\nlicense: mit\n---\n")
        cards.write_card(tmp_path, "by hand", str(source), source)
        head = yaml.safe_load((tmp_path / "README.md").read_text(encoding="utf-8").split("---")[1])
        assert (head.get("base_model"), head["license"]) == (expected, "mit")


CLASSIFIER = "MosaicBertForSequenceClassification"


@pytest.mark.parametrize(
    ("head", "fields", "task", "words"),
    [
        ("MosaicBertForMaskedLM", {}, "fill-mask", "model.tokenizer.mask_token"),
        ("BertForSequenceClassification", {}, "text-classification", 'model(["A text.", "Another'),
        (CLASSIFIER, {"problem_type": "regression"}, "text-classification", 'function_to_apply="none"'),
        (CLASSIFIER, {"problem_type": "multi_label_classification"}, "text-classification", "top_k=None"),
        ("MosaicBertForTokenClassification", {}, "token-classification", "aggregation_strategy"),
        ("MosaicBertForQuestionAnswering", {}, "question-answering", "AutoModelForQuestionAnswering."),
        ("MosaicBertForMultipleChoice", {}, "multiple-choice", "AutoModelForMultipleChoice."),
        ("MosaicBertModel", {}, "feature-extraction", "AutoModel."),
        (None, {}, "feature-extraction", "AutoModel."),
    ],
)
def test_the_card_shows_how_its_task_is_used(tmp_path, head, fields, task, words):
    fields = {**fields, "id2label": {"0": "x|y", "1": "![z](q)"}, **({"architectures": [head]} if head else {})}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    cards.write_card(tmp_path, "by hand", "someone/bert")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == task
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(block, "card", "exec")
    assert words in block and "trust_remote_code=True" in block
    assert r"Its labels are x\|y, \!\[z\]\(q\)." in card


def test_a_name_or_licence_from_elsewhere_stays_text_in_the_card(tmp_path):
    """A card that closes its table, its code block and its metadata, a folder that is named like Markdown."""
    folder = tmp_path / "snapshots" / "a`](x) | <b>{y}\n# z"
    write_complete_repository(folder)
    licences = ["'mit | <script>'", "[mit, apache-2.0]", "{a: b}", "3", '"x\\n---\\nlicense: mit"']
    for stated in (*licences, "!!python/object:os.system x"):
        (folder / "README.md").write_text(f"---\nlicense: {stated}\n---\n", encoding="utf-8")
        target = tmp_path / "new"
        checkpoint_conversion.convert(str(folder), target)
        card = (target / "README.md").read_text(encoding="utf-8")
        assert "| Revision of the source | unknown |" in card, "it is not a commit"
        assert "| Licence | unknown |" in card and "license:" not in card
        assert "| Source | `a___x_ _ _b__y___ z`, a local file or folder |" in card
        assert not re.search(r"<script>|<b>|^# z", card, re.M)
        shutil.rmtree(target)
