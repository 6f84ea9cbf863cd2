"""The command that measures what the model promises: it keeps what the tests recorded, and nothing if one fails."""

import csv

import card
import pytest
from conftest import ROOT

README = ROOT / "README.md"


def report(path, skipped=0):
    """A report as pytest writes it of two tests of each file."""
    recorded = {"parity": {"error": 3e-6}, "extrapolation": {"loss at 128": 3.5, "loss at 7281": 3.25}}
    cases = ""
    for name in card.PROMISES:
        for factor in (1, 0.5):
            items = {k: v * (factor if k == "error" else 1) for k, v in recorded.get(name, {}).items()}
            properties = "".join(f'<property name="{key}" value="{value}"/>' for key, value in items.items())
            cases += f'<testcase classname="tests.card.test_{name}"><properties>{properties}</properties></testcase>'
    path.write_text(f'<testsuites><testsuite skipped="{skipped}">{cases}</testsuite></testsuites>')


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command with a stub in place of pytest; returns its rows and its page."""
    page, results = tmp_path / "README.md", tmp_path / "card.csv"
    page.write_text(f"# Title\n\n{card.BEGIN}\nstale words\n{card.END}\n\nend\n")

    def command(*arguments, skipped=0, code=0):
        def process(words, **kwargs):
            if words[0] == "git":
                return type("Run", (), {"stdout": "abc1234\n", "returncode": 0})()
            report(type(page)(next(word for word in words if "junitxml" in word).split("=")[1]), skipped)
            return type("Run", (), {"returncode": code})()

        monkeypatch.setattr("subprocess.run", process)
        monkeypatch.setattr("sys.argv", ["card.py", "--results", str(results), "--readme", str(page), *arguments])
        card.main()
        with results.open() as file:
            return list(csv.DictReader(file)), page.read_text()

    return command


def test_results_are_kept_and_shown(command, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    rows, page = command()
    assert [(row["promise"], row["device"], row["result"], row["tests"], row["commit"]) for row in rows] == [
        ("loads", "cpu", "yes", "2", "abc1234"),
        ("parity", "cpu", "3e-06", "2", "abc1234"),
        ("extrapolation", "cpu", "3.500 / 3.250", "2", "abc1234"),
        ("conversion", "cpu", "yes", "2", "abc1234"),
    ]
    assert page.startswith("# Title") and page.endswith("end\n") and "stale words" not in page
    assert page.count("| not run yet |") == 4 and "| 3.500 / 3.250 |" in page and "these 8 tests" in page


def test_a_gpu_gets_its_own_rows_with_card_and_commit(command, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Some GPU")
    for _ in range(2):  # the second run replaces the rows of the first
        rows, page = command()
    assert [row["device"] for row in rows] == ["cpu"] * 4 + ["cuda"] * 4
    assert "| 3e-06 | 3e-06 (Some GPU, abc1234) |" in page and "not run yet" not in page


@pytest.mark.parametrize("outcome", [{"skipped": 1}, {"code": 1}])
def test_nothing_is_kept_when_a_test_fails_or_is_skipped(command, outcome, tmp_path):
    with pytest.raises(SystemExit, match="every test of tests/card has to pass"):
        command(**outcome)
    assert not (tmp_path / "card.csv").exists() and "stale words" in (tmp_path / "README.md").read_text()


def test_the_readme_shows_the_results():
    shown = README.read_text(encoding="utf-8").split(card.BEGIN)[1].split(card.END)[0].strip()
    assert shown == card.table(card.read_rows(card.RESULTS / "card.csv"))
