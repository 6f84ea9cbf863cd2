"""The documentation is true: its code prints what it shows, its links and commands exist, its numbers are measured."""

import ast
import csv
import dataclasses
import re

import pytest
from conftest import ROOT
from huggingface_hub import metadata_load
from processes import run_blocks
from transformers import TrainingArguments

from mosaicbert.bert_layers import ATTENTION_BACKENDS

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNNING = [ROOT / "README.md", ROOT / "docs" / "tasks.md", ROOT / "docs" / "checkpoint.md"]


def blocks(page):
    """The Python blocks of a page that is run, and the output that each shows."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", text, flags=re.S | re.M)


def commands(page):
    """The shell commands of a page, one a line."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return "".join(blocks).replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_print_what_they_show_in_a_fresh_process(page, tmp_path):
    found = blocks(page)
    assert len(found) == page.read_text(encoding="utf-8").count("```python") > 0
    programs = [block.replace('"runs/', f'"{tmp_path}/') for block, _ in found]
    printed = run_blocks(programs, cwd=ROOT, environment={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""})
    for (block, shown), output in zip(found, printed):
        if "Trainer(" in block:  # which prints its speed first
            output = "".join(output.splitlines(keepends=True)[-shown.count("\n") :])
        assert output == shown


def test_the_templates_of_the_readme_are_filled_as_measured():
    (measured,) = (shown for block, shown in blocks(ROOT / "docs" / "checkpoint.md") if "worked as a" in block)
    told = re.findall(r'^- "The ….*?: (.*(?:\n  .*)*)', README, flags=re.M)
    assert [item for line in told for item in re.split(r";\s+", line)] == measured.splitlines()


def test_head_says_what_the_hub_reads():
    head = metadata_load(ROOT / "README.md")
    known = {"license", "language", "library_name", "pipeline_tag", "base_model", "tags", "widget", "model-index"}
    assert set(head) == known and all(head.values())
    (result,) = head["model-index"][0]["results"]
    with open(ROOT / "benchmarks" / "results" / "quality.csv", encoding="utf-8") as file:
        measured = next(row for row in csv.DictReader(file) if row["model"] == "shipped, 14 sources")
    told = {metric["type"]: metric["value"] for metric in result["metrics"]}
    expected = {"accuracy": float(measured["top1"]), "loss": float(measured["loss"])}
    assert told == pytest.approx(expected, abs=6e-4)


def test_the_readme_fits_in_13_kb():
    assert len(README.encode()) <= 13_000


def test_attention_table_is_the_backend_table():
    rows = re.findall(r"^\| (\w+) \| (float16.*?) \| (.*?) \| (.*?) \| (\w+) \|$", README, flags=re.M)
    expected = [
        (
            name,
            ", ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes),
            ", ".join(row.devices) or "any",
            f"up to {row.max_channels}" if row.max_channels else "any",
            "yes" if row.dropout else "no",
        )
        for name, row in ATTENTION_BACKENDS.items()
    ]
    assert rows == expected


def test_the_speed_table_in_words_repeats_the_measured_one():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    measured = re.findall(r"^\|[^|]*\| BERT-base, SDPA \|(.*)\|[^|]*\| ([CG][\w-]+) \|$", page, flags=re.M)
    medians = {case: re.findall(r"([\d.]+) \(", cells) for cells, case in measured}
    rows = re.findall(r"^\| ([^|]*) \| ((?:[\d.–]+ \| ){2}[\d.–]+) \| ([CG][\w, -]+) \|$", page, flags=re.M)
    assert len(rows) >= 4
    for _, cells, cases in rows:
        expected = [median for case in cases.split(", ") for median in medians[case]]
        assert [cell for cell in cells.split(" | ") if cell != "–"] == expected, cases
    shown = re.findall(r"^\| ((?:encoder|MLM).*?) \| (.*) \|$", README, flags=re.M)
    assert len(shown) >= 4 and {*shown} <= {(words, cells) for words, cells, _ in rows}


def test_loss_by_length_is_the_measured_one():
    lengths, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in re.findall(r"^\| (?:length|loss|top-1).*\|$", README, flags=re.M)
    ]
    with open(ROOT / "benchmarks" / "results" / "lengths.csv", encoding="utf-8") as file:
        measured = {row["length"]: row for row in csv.DictReader(file)}
    for name, row in zip(("loss", "top1"), rows):
        expected = [float(measured[length.replace(",", "")][name]) for length in lengths[1:]]
        assert [float(cell) for cell in row[1:]] == pytest.approx(expected, abs=5.1e-4)


def test_accuracies_of_fine_tuning_are_the_measured_ones():
    with open(ROOT / "benchmarks" / "results" / "finetuning.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def measured(model, task):
        found = [float(row["accuracy"]) for row in rows if row["model"].startswith(model) and row["task"] == task]
        return sum(found) / len(found)

    tasks = ("wiki_topics, 96 texts", "wiki_topics, 400 texts", "wiki_topics")
    pattern = r"accuracy of (.*) with 96 texts, (.*) with 400, (.*) with 7,707 .*; TF-IDF (.*), (.*), ([\d.]*)\."
    shown = re.search(pattern, " ".join(README.split())).groups()
    for task, ours, theirs in zip(tasks, shown[:3], shown[3:]):
        assert float(ours) == pytest.approx(measured("shipped", task), abs=5.1e-4)
        assert float(theirs) == pytest.approx(measured("TF-IDF", task), abs=5.1e-4)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_images_and_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://"):
            assert (page.parent / link.split("#")[0]).exists(), link
    for name in re.findall(r"`((?:scripts|tests|benchmarks|examples|docs)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"(?:`|^)make (\w+)", text, flags=re.M)) <= targets


def test_options_in_commands_exist():
    """In the pages, and in what the commands say of themselves."""
    programs = [path for folder in ("scripts", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))]
    texts = ["\n".join(commands(page)) for page in PAGES]
    texts += [(ast.get_docstring(ast.parse(path.read_text())) or "").replace("\\\n", " ") for path in programs]
    used = {}
    for script, words in re.findall(r"((?:scripts|benchmarks)/\w+\.py)(.*)", "\n".join(texts)):
        used.setdefault(script, set()).update(re.findall(r"--[a-z]\w*", words))
    assert len(used) > 5
    trainer = {f"--{field.name}" for field in dataclasses.fields(TrainingArguments)}
    for script, options in used.items():
        text = (ROOT / script).read_text(encoding="utf-8")
        known = {"--traceback", "--help", *re.findall(r'"(--\w+)"', text)}
        assert options <= known | (trainer if "TrainingParser" in text else set()), script
