"""Train a stock BERT and the MosaicBERT that was initialized from it on the same text, and compare their losses.

    python scripts/convert_bert.py BERT runs/warm --text corpus/*.jsonl.gz
    python benchmarks/compare_with_bert.py --bert BERT --mosaicbert runs/warm --train_data corpus/*.jsonl.gz \\
        --validation_data valid/*.jsonl.gz --output_dir runs/compare

Both models get the same depth, width, initial weights (including the MLM head), sequences, masks, seeds and optimizer.
With `--random_weights` both start from random weights, and the two folders only provide sizes and tokenizer.
Stock BERT reads padded batches, MosaicBERT packed ones. Each uses what it has: MosaicBERT computes scores for masked
tokens only. `seconds` is CPU time on a CPU, so that other programs do not count, and wall time on a GPU. The script
writes `curves.csv`, `curves.png` and the models of the first seed, for evaluate_mlm.py. With `--save_every` the same
command continues a run that was stopped.

To compare losses by length rather than by time, train stock BERT alone and skip work that does not change its numbers:

    python benchmarks/compare_with_bert.py ... --models "stock BERT" --lean_baseline --bf16 --max_length 128 512
"""

import csv
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from loading import load_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

cli, _, common, _, packing, recipe = (
    load_file(f"scripts/{name}.py") for name in ("cli", "references", "common", "records", "packing", "recipe")
)
IGNORED = packing.IGNORED

MODELS = ("stock BERT", "MosaicBERT")
COLUMNS = ("model", "seed", "step", "wordpieces", "seconds", "train_loss", "validation_loss")


def stock_twin(source: str, mosaic, random_weights: bool = False, attention: str = "sdpa"):
    """A stock BERT for masked language modelling with the weights that a MosaicBERT was initialized from.

    Args:
        source: folder or Hub id of the BERT; as many of its first layers are used as `mosaic` has.
        mosaic: the converted model; it provides the MLM head and the size of the vocabulary.
        random_weights: take only the sizes, and start from random weights.
        attention: `attn_implementation` of the stock BERT.

    Returns:
        A `transformers.BertForMaskedLM`.
    """
    config = BertConfig.from_pretrained(source)
    config.num_hidden_layers = mosaic.config.num_hidden_layers
    config.hidden_dropout_prob = mosaic.config.hidden_dropout_prob
    config.attention_probs_dropout_prob = mosaic.config.attention_probs_dropout_prob
    if random_weights:
        config.vocab_size = mosaic.config.vocab_size
        return BertForMaskedLM._from_config(config, attn_implementation=attention)
    model = BertForMaskedLM._from_config(config, attn_implementation=attention)
    model.bert.load_state_dict(BertModel.from_pretrained(source).state_dict(), strict=False)  # it may have more layers
    model.resize_token_embeddings(mosaic.config.vocab_size, mean_resizing=False)
    head = {name: value for name, value in mosaic.state_dict().items() if name.startswith("cls.")}
    model.load_state_dict({**head, "cls.predictions.bias": head["cls.predictions.decoder.bias"]}, strict=False)
    return model


def flatten_row(row: dict) -> dict:
    """Turn a row of `Masking` into the batch without padding that MosaicBERT reads; see `flatten_rows`."""
    return packing.flatten_rows([row])


def pad_row(row: dict) -> dict[str, torch.Tensor]:
    """Turn a row of `Masking` into the padded batch that a stock BERT reads: ids, mask and labels, int64 [N, S]."""
    ends = row["lengths"].cumsum()[:-1]
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(part) for part in np.split(row[name], ends)], batch_first=True, padding_value=filler
        )
        for name, filler in (("input_ids", 0), ("labels", IGNORED))
    )
    lengths = torch.from_numpy(row["lengths"])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batch_loss(model, batch: dict) -> torch.Tensor:
    """The model's own loss on a batch from `flatten_row` or `pad_row`."""
    return model(**batch).loss


def lean_loss(model, batch: dict) -> torch.Tensor:
    """The loss of a stock BERT with less work: scores for masked tokens only, and little padding.

    Each sequence is padded to at most 1.25 times its length.

    Args:
        model: `transformers.BertForMaskedLM`.
        batch: from `pad_row`, its sequences sorted by length.
    """
    lengths = batch["attention_mask"].sum(1)
    labelled, start = [], 0
    while start < len(lengths):
        end = int((lengths <= 1.25 * lengths[start]).sum())
        ids, mask, labels = (
            batch[name][start:end, : lengths[end - 1]] for name in ("input_ids", "attention_mask", "labels")
        )
        hidden = model.bert(ids, attention_mask=None if mask.all() else mask).last_hidden_state
        labelled.append((hidden[labels != IGNORED], labels[labels != IGNORED]))
        start = end
    hidden, labels = (torch.cat(parts) for parts in zip(*labelled))
    return F.cross_entropy(model.cls(hidden).float(), labels)


def train(name: str, model, collate, loss_of, rows, held_out, seed: int, arguments) -> list[dict]:
    """Train one model and log its loss; continues where an earlier call with `save_every` stopped.

    Args:
        name: name of the model in the log.
        model: the model.
        collate: turns a row into a batch.
        loss_of: `(model, batch) -> loss`.
        rows: `PackedRows` to train on.
        held_out: rows to validate on.
        seed: seed of dropout.
        arguments: the parsed command line.

    Returns:
        One dict per logged step, with the keys of `COLUMNS`. The validation loss is logged at the first and last step.

    Raises:
        ValueError: `output_dir` holds the progress of another command line.
    """
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    torch.manual_seed(seed)
    model.to(arguments.device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), arguments.learning_rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.02, fused=True
    )
    warmup = max(1, round(0.06 * arguments.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: recipe.linear_schedule(step, warmup, arguments.steps, final=0.02)
    )

    def forward(row):
        batch = {k: v.to(arguments.device) if torch.is_tensor(v) else v for k, v in collate(row).items()}
        with torch.autocast(arguments.device, torch.bfloat16, enabled=arguments.bf16):
            return loss_of(model, batch)

    @torch.no_grad()
    def validate():
        model.eval()
        counts = [int((row["labels"] != IGNORED).sum()) for row in held_out]
        mean = sum(forward(row).item() * count for row, count in zip(held_out, counts)) / sum(counts)
        model.train()
        return mean

    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    progress = {"log": [], "window": [], "wordpieces": 0, "seconds": 0.0, "step": 0, "asked": asked_of(arguments)}
    saved = arguments.output_dir / f"progress-{name.replace(' ', '-')}-{seed}.pt"
    if saved.exists():
        stored = torch.load(saved, map_location=arguments.device, weights_only=True)
        if stored["asked"] != progress["asked"]:
            raise ValueError(f"output_dir holds a run of another command line: {saved} is of {stored['asked']}")
        for part, holder in parts.items():
            holder.load_state_dict(stored.pop(part))
        progress = stored
    log, window = progress["log"], progress["window"]
    while True:
        step = progress["step"]
        if step % arguments.log_every == 0 or step == arguments.steps:
            if not log or log[-1]["step"] < step:
                log.append(
                    {
                        "model": name,
                        "seed": seed,
                        "step": step,
                        "wordpieces": progress["wordpieces"],
                        "seconds": round(progress["seconds"], 1),
                        "train_loss": round(sum(window) / len(window), 4) if window else "",
                        "validation_loss": round(validate(), 4) if step in (0, arguments.steps) else "",
                    }
                )
                print(",".join(str(log[-1][column]) for column in COLUMNS), flush=True)
                window.clear()
        if arguments.save_every and (step % arguments.save_every == 0 or step == arguments.steps):
            torch.save({**progress, **{part: holder.state_dict() for part, holder in parts.items()}}, f"{saved}.new")
            os.replace(f"{saved}.new", saved)
        if step == arguments.steps:
            return log
        row = rows[step]
        began = clock()
        torch.manual_seed(seed + step)  # dropout, whichever step a run goes on from
        loss = forward(row)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        window.append(loss.item())  # waits for a GPU
        progress["seconds"] += clock() - began
        progress["wordpieces"] += len(row["input_ids"])
        progress["step"] += 1


def asked_of(arguments) -> dict[str, str]:
    """The arguments that determine the numbers of a run."""
    others = ("output_dir", "traceback", "save_every", "log_every", "models", "seeds")
    return {name: str(value) for name, value in vars(arguments).items() if name not in others}


def draw(log: list[dict], path: Path) -> None:
    """Plot the training loss against tokens and against seconds, with one line per model and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    names = list(dict.fromkeys(entry["model"] for entry in log))
    for axes, column, label in zip(panels, ("wordpieces", "seconds"), ("tokens seen", "seconds (CPU time on a CPU)")):
        for number, name in enumerate(names):
            for seed in sorted({entry["seed"] for entry in log}):
                own = [e for e in log if (e["model"], e["seed"]) == (name, seed) and e["train_loss"] != ""]
                first = seed == min(entry["seed"] for entry in log)
                axes.plot(
                    [e[column] for e in own],
                    [e["train_loss"] for e in own],
                    color=f"C{number}",
                    alpha=1.0 if first else 0.5,
                    label=name if first else None,
                )
        axes.set_xlabel(label)
    panels[0].set_ylabel("training loss (nats)")
    panels[0].legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write_curves(log: list[dict], folder: Path) -> None:
    """Write the log so far as `curves.csv` and `curves.png`."""
    with open(folder / "curves.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)
    draw(log, folder / "curves.png")


def main() -> None:
    """Parse the command line, train both models with each seed, and write the curves."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--bert", required=True, help="folder or Hub id of a stock BERT")
    parser.add_argument("--mosaicbert", required=True, help="folder that convert_bert.py made of it")
    parser.add_argument("--train_data", nargs="+", required=True, help="training text, as pretrain_mlm.py takes it")
    parser.add_argument("--validation_data", nargs="+", required=True, help="validation text, likewise")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for curves and models")
    parser.add_argument("--random_weights", action="store_true", help="start both models from random weights")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, help="models to train")
    parser.add_argument(
        "--lean_baseline", action="store_true", help="skip work of stock BERT that does not change its numbers"
    )
    parser.add_argument("--bert_attention", default="sdpa", help="attn_implementation of stock BERT")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument(
        "--max_length", nargs="+", type=int, default=[128], help="tokens per sequence; several lengths are mixed"
    )
    parser.add_argument("--mask_token_share", type=float, default=0.8, help="as pretrain_mlm.py takes it")
    parser.add_argument("--tokens_per_row", type=int, default=3072, help="most tokens per step")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--log_every", type=int, default=5, help="steps between log lines")
    parser.add_argument("--save_every", type=int, default=0, help="steps between checkpoints to resume from; 0: none")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="trains once per seed")
    parser.add_argument("--validation_rows", type=int, default=8, help="most rows to validate on")
    parser.add_argument("--learning_rate", type=float, default=8e-4, help="peak learning rate")
    parser.add_argument("--dropout", type=float, default=0.0, help="hidden dropout of both models; attention has none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to train on")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.mosaicbert)
    mosaic_class = common.repository_class("BertForMaskedLM")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    def rows_of(sources, probability, seed):
        lengths = arguments.max_length
        shares = [1 / len(lengths)] * len(lengths)
        sequences = packing.load_sequences(sources, tokenizer, lengths, shares, seed=0)
        return packing.PackedRows(
            sequences, tokenizer, arguments.tokens_per_row, probability, seed, arguments.mask_token_share
        )

    held_out = rows_of(arguments.validation_data, 0.15, 0)
    held_out = [held_out[i] for i in range(min(arguments.validation_rows, len(held_out)))]
    log = []
    print(",".join(COLUMNS))
    for seed in arguments.seeds:
        rows = rows_of(arguments.train_data, 0.3, seed)
        for name in arguments.models:
            model = mosaic_class.from_pretrained(
                arguments.mosaicbert,
                hidden_dropout_prob=arguments.dropout,
                attention_probs_dropout_prob=0.0,
                sparse_prediction=True,
            ).float()
            collate, loss_of = flatten_row, batch_loss
            torch.manual_seed(seed)
            if arguments.random_weights:
                model = mosaic_class(model.config)
            if name == "stock BERT":
                model = stock_twin(arguments.bert, model, arguments.random_weights, arguments.bert_attention)
                collate = pad_row
                loss_of = lean_loss if arguments.lean_baseline else batch_loss
            log += train(name, model, collate, loss_of, rows, held_out, seed, arguments)
            if seed == arguments.seeds[0]:
                folder = arguments.output_dir / name.replace(" ", "-")
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            write_curves(log, arguments.output_dir)


if __name__ == "__main__":
    cli.run(main, "a smaller --tokens_per_row needs less memory")
