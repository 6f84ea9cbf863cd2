"""scripts/pretrain_mlm.py: cutting, masking and packing text, the published recipe, and runs that survive what happens
to them."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import packing
import pretrain_mlm
import pytest
import recipe
import torch
from conftest import ROOT
from models import tiny_model
from numerics import SAME, assert_same
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertTokenizerFast,
    DataCollatorWithFlattening,
    HfArgumentParser,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [first + second for first in "bcdfghjk" for second in "aeiou"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """60 documents of 5 to 300 words as JSON lines."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    documents = [" ".join(generator.choice(WORDS, generator.integers(5, 300))) for _ in range(60)]
    path.write_text("\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(documents)))
    return path


def sequences_of(corpus, tokenizer, lengths=(32,), shares=(1.0,), streaming=False):
    texts = packing.load_texts([str(corpus)], streaming=streaming)
    return packing.load_sequences(texts, tokenizer, list(lengths), list(shares), seed=0)


def command_line(corpus, tokenizer, output_dir, **flags):
    settings = {
        "train_data": corpus,
        "tokenizer": tokenizer.name_or_path,
        "output_dir": output_dir,
        "max_length": 32,
        "tokens_per_row": 128,
        "max_steps": 8,
        "logging_steps": 1,
        "save_steps": 3,
        "peak_tflops": 1e-3,
        "use_cpu": True,
        "gradient_accumulation_steps": 2,
        "disable_tqdm": True,
        **flags,
    }
    sizes = "hidden_size=24 num_hidden_layers=2 num_attention_heads=3 intermediate_size=20".split()
    flat = [[f"--{name}", *map(str, value if isinstance(value, list) else [value])] for name, value in settings.items()]
    return [*itertools.chain(*flat), "--config_fields", *sizes]


def run(arguments):
    parser = HfArgumentParser(
        (pretrain_mlm.ModelArguments, pretrain_mlm.DataArguments, pretrain_mlm.PretrainingArguments)
    )
    return pretrain_mlm.train(*parser.parse_args_into_dataclasses(arguments))


def losses(folder):
    history = json.loads((folder / "log_history.json").read_text())
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_documents_are_cut_without_losing_or_mixing_anything(tokenizer):
    texts = [" ".join(WORDS * 3), "ba be bi", " ".join(WORDS[::-1])]
    cut = packing.cut_documents({"text": texts}, [0, 1, 2], tokenizer, [32], [1.0], seed=0)
    assert cut["length"] == [len(ids) for ids in cut["input_ids"]] and max(cut["length"]) == 32
    assert {ids.dtype for ids in cut["input_ids"]} == {np.dtype("uint16")}
    for ids in cut["input_ids"]:
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    joined = np.concatenate([ids[1:-1] for ids in cut["input_ids"]])
    # The second document is shorter than the shortest sequence and left out.
    assert tokenizer.decode(joined).split() == WORDS * 3 + WORDS[::-1]


def test_lengths_are_mixed_by_their_share_of_wordpieces(tokenizer):
    cut = packing.cut_documents({"text": [" ".join(WORDS * 1000)]}, [0], tokenizer, [16, 64], [0.3, 0.7], seed=0)
    short = sum(length for length in cut["length"] if length <= 16) / sum(cut["length"])
    # 40,000 wordpieces make about 1,200 draws: five standard deviations of the share are below 0.05.
    assert abs(short - 0.3) < 0.05


def test_masking_is_bert_s_80_10_10_and_spares_special_tokens(tokenizer):
    first = np.array(
        [tokenizer.cls_token_id, *np.random.default_rng(0).integers(5, 45, 50_000), tokenizer.sep_token_id]
    )
    row = packing.mask_row([first], tokenizer, 0.3, np.random.default_rng(1))
    chosen = row["labels"] != -100
    assert not chosen[[0, -1]].any()
    assert (row["labels"][chosen] == first[chosen]).all() and (row["input_ids"][~chosen] == first[~chosen]).all()
    assert abs(chosen.mean() - 0.3) < 0.012  # five standard deviations of 50,000 draws
    masked = row["input_ids"][chosen] == tokenizer.mask_token_id
    kept = row["input_ids"][chosen] == first[chosen]
    assert abs(masked.mean() - (0.8 + 0.1 / 45)) < 0.02  # five standard deviations of 15,000 draws; 45 words to draw
    assert abs(kept.mean() - (0.1 + 0.1 / 45)) < 0.015

    row = packing.mask_row([first], tokenizer, 0.3, np.random.default_rng(1), mask_token_share=1.0)
    assert (row["input_ids"][row["labels"] != -100] == tokenizer.mask_token_id).all()


def test_each_sequence_is_in_one_row_of_a_pass(corpus, tokenizer):
    sequences = sequences_of(corpus, tokenizer)
    rows = packing.PackedRows(sequences, tokenizer, 100, 0.0, seed=0)
    seen = []
    for i in range(len(rows)):
        row = rows[i]
        assert len(row["input_ids"]) == row["lengths"].sum() <= 100 and sorted(row["lengths"]) == list(row["lengths"])
        seen += [tuple(part) for part in np.split(row["input_ids"], row["lengths"].cumsum()[:-1])]
    assert sorted(seen) == sorted(tuple(ids) for ids in sequences["input_ids"])


def test_a_row_depends_on_its_number_alone_and_the_next_pass_is_masked_afresh(corpus, tokenizer):
    def make():
        return packing.PackedRows(sequences_of(corpus, tokenizer), tokenizer, 100, 0.3, seed=0)

    one, other = make(), make()
    size = one.rows_per_pass
    before = [one[i] for i in range(2 * size)]
    for i in (size + 3, 5, 0):
        assert all((other[i][name] == before[i][name]).all() for name in before[i])

    def originals(rows):
        return sorted(np.where(row["labels"] == -100, row["input_ids"], row["labels"]).tolist() for row in rows)

    assert originals(before[:size]) == originals(before[size:])
    masks = [sorted((row["labels"] != -100).tolist() for row in part) for part in (before[:size], before[size:])]
    assert masks[0] != masks[1]


def test_a_stream_gives_the_same_text_and_starts_over_in_another_order(corpus, tokenizer):
    rows = packing.StreamedRows(sequences_of(corpus, tokenizer, streaming=True), tokenizer, 100, 0.0, seed=0)
    total = sum(sequences_of(corpus, tokenizer)["length"])
    passes, iterator = [], iter(rows)
    for _ in range(2):
        row, taken = [], 0
        while taken < 0.9 * total:
            row.append(next(iterator))
            taken += len(row[-1]["input_ids"])
            assert len(row[-1]["input_ids"]) <= 100
        passes.append(np.concatenate([part["input_ids"] for part in row]))
    assert (passes[0][:200] != passes[1][:200]).any()


def test_text_files_and_shards_are_read(corpus, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("ba be bi bo\nbu ba\n\nca ce ci")
    assert packing.load_texts([str(tmp_path / "*.txt")])["text"][:] == ["ba be bi bo\nbu ba", "ca ce ci"]
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "index.json").write_text("{}")
    library = types.SimpleNamespace(StreamingDataset=lambda local, **_: [{"content": f"text in {local}"}])
    monkeypatch.setitem(sys.modules, "streaming", library)  # MosaicML Streaming's one class that is used
    read = packing.load_texts([str(shards)], text_field="content")
    assert [example["text"] for example in read] == [f"text in {shards}"]


def test_batches_carry_boundaries_in_the_names_of_transformers(tokenizer):
    parts = [np.array([2, 7, 8, 3]), np.array([2, 9, 3]), np.array([2, 5, 6, 7, 8, 3])]
    generator = np.random.default_rng(0)
    rows = [packing.mask_row(group, tokenizer, 0.0, generator) for group in (parts[:2], parts[2:])]
    batch = packing.flatten_rows(rows)
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(
        [{"input_ids": part.tolist()} for part in (parts[1], parts[0], parts[2])]
    )
    for name in ("input_ids", "cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[name].dtype == flat[name].dtype and torch.equal(batch[name], flat[name])
    assert (batch["max_length_q"], batch["max_length_k"]) == (flat["max_length_q"], flat["max_length_k"]) == (6, 6)


def test_transformers_collator_gives_the_loss_of_a_padded_batch():
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(1, 101, (length,), generator=generator) for length in (5, 9, 2)]
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(
        [{"input_ids": part.tolist(), "labels": part.tolist()} for part in parts]
    )
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # the collator's separator
    expected = model(input_ids=padded, attention_mask=mask, labels=labels).loss
    assert_same(model(**flat).loss, expected, SAME[torch.float32])


def test_defaults_are_the_published_recipe(corpus, tokenizer, tmp_path):
    parser = HfArgumentParser(
        (pretrain_mlm.ModelArguments, pretrain_mlm.DataArguments, pretrain_mlm.PretrainingArguments)
    )
    flags = ["--train_data", str(corpus), "--output_dir", str(tmp_path)]
    _, data, arguments = parser.parse_args_into_dataclasses(flags)
    assert (data.mask_probability, data.eval_mask_probability, data.global_batch_size) == (0.3, 0.15, 4096)
    assert (arguments.learning_rate, arguments.adam_beta1, arguments.adam_beta2) == (5e-4, 0.9, 0.98)
    assert (arguments.adam_epsilon, arguments.warmup_share, arguments.final_lr_share) == (1e-6, 0.06, 0.02)
    assert arguments.bf16 and arguments.decoupled_weight_decay == 1e-5
    trainer = run(
        command_line(corpus, tokenizer, tmp_path, gradient_accumulation_steps=0, tokens_per_row=8192, max_steps=1)
    )
    # 4,096 sequences of 32 wordpieces in rows of 8,192
    assert trainer.args.gradient_accumulation_steps == 16
    assert trainer.optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.02)
    config = trainer.model.config
    assert (config.vocab_size, config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (64, 0.1, 0.0)


def test_the_learning_rate_warms_up_and_falls_in_lines():
    rates = [recipe.linear_schedule(step, warmup=6, total=100, final=0.02) for step in range(101)]
    assert rates[:7] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert rates[53] == pytest.approx(0.51) and rates[100] == pytest.approx(0.02)


def test_flops_are_those_that_torch_counts(tokenizer):
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model(vocab_size=64, sparse_prediction=True, attn_implementation="eager")
    generator = np.random.default_rng(0)
    batch = packing.flatten_rows([packing.mask_row([np.arange(5, 45)], tokenizer, 0.3, generator)])
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    predicted = int((batch["labels"] != packing.IGNORED).sum())
    assert recipe.count_flops(model.config, 40, 40**2, predicted) == counter.get_total_flops()


def test_a_run_ends_in_a_repository_that_loads_by_itself(corpus, tokenizer, tmp_path):
    run(command_line(corpus, tokenizer, tmp_path, validation_data=corpus, save_dtype="bfloat16"))
    history = json.loads((tmp_path / "log_history.json").read_text())
    assert {"loss", "tokens_per_second", "mfu", "seconds"} <= history[0].keys()
    assert history[0]["tokens_per_second"] > 0 and history[0]["mfu"] > 0
    assert any("eval_32_loss" in entry for entry in history)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path, trust_remote_code=True, torch_dtype="auto")
    assert model.dtype == torch.bfloat16 and not model.config.sparse_prediction
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    encoded = AutoTokenizer.from_pretrained(tmp_path)("ba [MASK] bi", return_tensors="pt")
    logits = model(**encoded).logits
    assert logits.shape == (1, 5, 64) and (logits.argmax(-1) < len(SPECIAL + WORDS)).all()


def test_a_run_starts_from_the_weights_it_is_given(corpus, tokenizer, tmp_path):
    run(command_line(corpus, tokenizer, tmp_path / "first", max_steps=1))
    flags = command_line(corpus, tokenizer, tmp_path / "second", max_steps=1, learning_rate=1e-30)
    flags = flags[: flags.index("--config_fields")]
    trainer = run([*flags, "--model", str(tmp_path / "first"), "--config_fields", "hidden_dropout_prob=0.0"])
    first = AutoModelForMaskedLM.from_pretrained(tmp_path / "first", trust_remote_code=True)
    for name, value in first.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])
    assert trainer.model.config.hidden_dropout_prob == 0.0


def test_loss_falls(corpus, tokenizer, tmp_path):
    flags = {"bf16": False, "max_steps": 30, "learning_rate": 1e-2, "save_steps": 100}
    run(command_line(corpus, tokenizer, tmp_path, **flags))
    curve = losses(tmp_path)
    # Of 64 slots 45 are alive: 3.81 nats for a guess; 3.69 at best, as words are drawn from 40 with equal odds.
    assert curve[1] > 3.79 and sum(curve[step] for step in range(26, 31)) / 5 < 3.72


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
def test_a_killed_run_resumes_to_the_same_loss_curve(corpus, tokenizer, tmp_path, streaming):
    run(command_line(corpus, tokenizer, tmp_path / "whole", streaming=streaming))
    killer = (
        "import os, signal, pretrain_mlm\n"
        "log = pretrain_mlm.PretrainingTrainer.log\n"
        "def log_or_die(self, *args, **kwargs):\n"
        "    log(self, *args, **kwargs)\n"
        "    if self.state.global_step == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "pretrain_mlm.PretrainingTrainer.log = log_or_die\n"
        "pretrain_mlm.main()\n"
    )
    flags = command_line(corpus, tokenizer, tmp_path / "killed", streaming=streaming)
    died = subprocess.run(
        [sys.executable, "-c", killer, *flags], cwd=ROOT / "scripts", capture_output=True, timeout=120
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    assert max(losses(tmp_path / "killed")) == 5
    (tmp_path / "killed" / "checkpoint-4").mkdir()  # what a kill leaves while a checkpoint is written
    run([*flags, "--resume_from_checkpoint", "last"])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 8


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
def test_two_processes_train_like_one(corpus, tokenizer, tmp_path, streaming):
    plain = {"bf16": False, "max_steps": 4, "save_steps": 100, "streaming": streaming}
    no_dropout = ["hidden_dropout_prob=0.0"]
    run([*command_line(corpus, tokenizer, tmp_path / "one", **plain), *no_dropout])
    flags = command_line(corpus, tokenizer, tmp_path / "two", **{**plain, "gradient_accumulation_steps": 1})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "scripts/pretrain_mlm.py"), *flags, *no_dropout],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() == {1, 2, 3, 4}
    # Gradients are summed in another order; the log keeps float32 losses.
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)


def test_sharded_training_by_trainer_equals_one_process_resumes_and_saves_a_whole_repository(
    corpus, tokenizer, tmp_path
):
    """FSDP through Trainer. Files of a sharded model once held torch's code for ours and each tied weight twice."""
    plain = {"bf16": False, "max_steps": 4, "save_steps": 2}
    no_dropout = ["hidden_dropout_prob=0.0"]
    run([*command_line(corpus, tokenizer, tmp_path / "one", **plain), *no_dropout])
    flags = command_line(corpus, tokenizer, tmp_path / "two", **{**plain, "gradient_accumulation_steps": 1})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += [str(ROOT / "tests/sharded_pretraining.py"), *flags, *no_dropout]
    launch += ["--fsdp", "full_shard auto_wrap", "--fsdp_config", '{"version": 2}']

    def run_sharded(*more):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "scripts")}
        done = subprocess.run([*launch, *more], env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-2000:]
        parts = {int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("parts")}
        return parts, losses(tmp_path / "two")

    parts, two = run_sharded()
    one = losses(tmp_path / "one")
    assert parts == {31} and one.keys() == two.keys() == {1, 2, 3, 4}
    # Gradients are summed in another order; the log keeps float32 losses.
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    written = {path.name for path in (tmp_path / "two").iterdir()}
    assert {path.name for path in (tmp_path / "one").iterdir()} == written >= {"bert_layers.py", "model.safetensors"}
    whole, sharded = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert whole.keys() == sharded.keys()
    for name in whole:
        assert_same(sharded[name], whole[name], SAME[torch.float32], name)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "two", trust_remote_code=True)
    assert "Wqkv" in str(model)

    shutil.rmtree(tmp_path / "two/checkpoint-4")
    assert run_sharded("--resume_from_checkpoint", "last")[1] == two
    again = load_file(tmp_path / "two/model.safetensors")
    assert all(torch.equal(again[name], sharded[name]) for name in sharded)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"train_data": "nothing/*.jsonl"}, "no file matches 'nothing/\\*.jsonl'"),
        ({"text_field": "body"}, "text_field must be one of .*'text'.*, got 'body'"),
        ({"max_length": 9}, "max_length must be at least 10, got 9"),
        ({"length_shares": [0.5, 0.5]}, "length_shares must be one positive number a max_length"),
        ({"tokens_per_row": 20}, "tokens_per_row must be at least the longest sequence, 32, got 20"),
        ({"config": "here", "model": "there"}, "config must not be given with model"),
        ({"streaming": True, "num_train_epochs": 1}, "num_train_epochs needs data of a known size"),
    ],
)
def test_bad_arguments_are_named(corpus, tokenizer, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(command_line(corpus, tokenizer, tmp_path, **flags))


def test_bad_files_fields_and_tokenizers_are_named(corpus, tokenizer, tmp_path):
    (tmp_path / "data.parquet").write_text("")
    with pytest.raises(ValueError, match="data must be .txt, .json or .jsonl files"):
        packing.load_texts([str(tmp_path / "data.parquet")])
    (tmp_path / "short.jsonl").write_text('{"text": "ba be"}')
    with pytest.raises(ValueError, match="no document of at least 8 wordpieces"):
        run(command_line(tmp_path / "short.jsonl", tokenizer, tmp_path))
    with pytest.raises(ValueError, match="config_fields must be NAME=VALUE, got 'hidden_size'"):
        pretrain_mlm.parse_fields(["hidden_size"])
    with pytest.raises(ValueError, match="the config has no field 'size'"):
        pretrain_mlm.build_model(pretrain_mlm.ModelArguments(config_fields=["size=1"]), 45)
    with pytest.raises(ValueError, match="vocab_size must be at least the tokenizer's 45 entries, got 40"):
        pretrain_mlm.build_model(pretrain_mlm.ModelArguments(config_fields=["vocab_size=40"]), 45)
    bare = BertTokenizerFast(str(ROOT / "vocab.txt"), mask_token=None)
    with pytest.raises(ValueError, match="tokenizer must have a mask_token"):
        sequences_of(corpus, bare)


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    assert pretrain_mlm.last_checkpoint(str(tmp_path)) is None
    for name in ("checkpoint-900", "checkpoint-1000", "checkpoint-1100"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-900", "checkpoint-1000"):
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert pretrain_mlm.last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1000")
