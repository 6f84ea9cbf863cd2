"""The card of a converted model: where it comes from, and that foreign names stay plain text."""

import re
import shutil

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


def test_a_name_or_licence_from_elsewhere_stays_text_in_the_card(tmp_path):
    """A card that closes its table, its code block and its metadata, a folder that is named like Markdown."""
    folder = tmp_path / "snapshots" / "a`](x) | <b>{y}\n# z"
    write_complete_repository(folder)
    for stated in (
        "'mit | <script>'",
        "[mit, apache-2.0]",
        "{a: b}",
        "3",
        '"x\\n---\\nlicense: mit"',
        "!!python/object:os.system x",
    ):
        (folder / "README.md").write_text(f"---\nlicense: {stated}\n---\n", encoding="utf-8")
        target = tmp_path / "new"
        checkpoint_conversion.convert(str(folder), target)
        card = (target / "README.md").read_text(encoding="utf-8")
        assert "| Revision of the source | unknown |" in card, "it is no commit"
        assert "| Licence | unknown |" in card and "license:" not in card
        assert "| Source | `a___x_ _ _b__y___ z`, a local file or folder |" in card
        assert not re.search(r"<script>|<b>|^# z", card, re.M)
        shutil.rmtree(target)
