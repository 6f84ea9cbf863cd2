"""What the scripts share: finding checkpoints, reading weights and text, writing cards."""

import convert_bert
import convert_checkpoint
import pytest
import repositories
from folders import write_complete_repository
from lib import cards, checkpoint_conversion, common


def test_a_failed_run_leaves_the_target_as_it_was(tmp_path, run_script):
    write_complete_repository(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    target = tmp_path / "new"
    target.mkdir()
    (target / "precious.txt").write_text("kept")
    arguments = (tmp_path / "old", target, "--overwrite")
    with pytest.raises(SystemExit, match="expected model.safetensors or pytorch_model.bin"):
        run_script(convert_checkpoint, *arguments)
    assert [path.name for path in target.iterdir()] == ["precious.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_a_target_that_exists_is_only_replaced_on_request(tmp_path, run_script):
    write_complete_repository(tmp_path / "old")
    target = tmp_path / "new"
    target.mkdir()
    (target / "stale.txt").write_text("stale")
    with pytest.raises(SystemExit, match="exists and is not an empty folder; pass --overwrite"):
        run_script(convert_checkpoint, tmp_path / "old", target)
    run_script(convert_checkpoint, tmp_path / "old", target, "--overwrite")
    assert not (target / "stale.txt").exists()
    assert (target / "config.json").is_file()


def test_the_card_names_source_revision_and_licence(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    source = tmp_path / "models--someone--bert" / "snapshots" / commit
    write_complete_repository(source)
    checkpoint = checkpoint_conversion.read_checkpoint(str(source), None)
    assert checkpoint.revision == commit
    cards.write_card(tmp_path, "by hand", "someone/bert", source, commit)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for words in (
        "license: apache-2.0",
        "base_model: someone/bert",
        f"`{commit}`",
        "trust_remote_code=True",
        "revision=",
    ):
        assert words in card
    cards.write_card(tmp_path, "by hand", "someone/bert", source, license="mit")
    assert "| Licence | mit |" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_sources_that_are_nothing_are_named(tmp_path):
    with pytest.raises(ValueError, match="expected a folder or a Hub id"):
        common.find_checkpoint("./nowhere")
    with pytest.raises(ValueError, match="only a Hub id has revisions"):
        common.find_checkpoint(str(tmp_path), "main")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ValueError, match="names shards that are not there: model-1.safetensors"):
        common.load_weights(tmp_path)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_a_truncated_weight_file_is_named(tmp_path, weights):
    repositories.write_repository(tmp_path, weights=weights, code=False)
    path = tmp_path / weights
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{weights}: cannot be read"):
        common.load_weights(tmp_path)


@pytest.mark.parametrize("module", [convert_bert, convert_checkpoint])
def test_help_explains_the_script(module, run_script, capsys):
    with pytest.raises(SystemExit, match="0"):
        run_script(module, "--help")
    assert "--overwrite" in capsys.readouterr().out
