"""Train a stock BERT and the MosaicBERT made of it on the same text, and compare their loss by wordpieces and by time.

    python scripts/convert_bert.py BERT runs/warm --text corpus/*.jsonl.gz
    python scripts/compare_with_bert.py --bert BERT --mosaicbert runs/warm --train_data corpus/*.jsonl.gz \\
        --validation_data valid/*.jsonl.gz --output_dir runs/compare

Both get the same depth, width, first weights (the MLM head of the MosaicBERT included), sequences, masks, seeds and
optimizer; with `--random_weights` both start from random ones, and the two folders give sizes and tokenizer alone.
Stock BERT reads the sequences padded, MosaicBERT packed, each with what it offers: MosaicBERT scores the masked
wordpieces alone. `seconds` are the process's CPU time on a CPU, so that other programs do not count, and time on a
GPU. Written: `curves.csv`, `curves.png`, and each model of the first seed, for evaluate_mlm.py.
"""

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch
from common import repository_class
from pretrain_mlm import IGNORED, PackedRows, flatten_rows, linear_schedule, load_sequences, load_texts
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

COLUMNS = ("model", "seed", "step", "wordpieces", "seconds", "train_loss", "validation_loss")


def stock_twin(source: str, mosaic, random_weights: bool = False):
    """A stock BERT for masked language modelling that starts from what a MosaicBERT was converted from.

    Args:
        source: folder or Hub id of the BERT; its first layers are used, as many as `mosaic` has.
        mosaic: the converted model; its MLM head and the size of its vocabulary are taken over.
        random_weights: whether only the sizes are taken over.

    Returns:
        A `transformers.BertForMaskedLM`.
    """
    config = BertConfig.from_pretrained(source)
    config.num_hidden_layers = mosaic.config.num_hidden_layers
    config.hidden_dropout_prob = mosaic.config.hidden_dropout_prob
    config.attention_probs_dropout_prob = mosaic.config.attention_probs_dropout_prob
    if random_weights:
        config.vocab_size = mosaic.config.vocab_size
        return BertForMaskedLM(config)
    model = BertForMaskedLM(config)
    model.bert.load_state_dict(BertModel.from_pretrained(source).state_dict(), strict=False)  # it may have more layers
    model.resize_token_embeddings(mosaic.config.vocab_size, mean_resizing=False)
    head = {name: value for name, value in mosaic.state_dict().items() if name.startswith("cls.")}
    model.load_state_dict({**head, "cls.predictions.bias": head["cls.predictions.decoder.bias"]}, strict=False)
    return model


def flatten_row(row: dict) -> dict:
    """Turn a row of `mask_row` to the batch without padding that MosaicBERT reads, see `flatten_rows`."""
    return flatten_rows([row])


def pad_row(row: dict) -> dict[str, torch.Tensor]:
    """Turn a row of `mask_row` to the padded batch that a stock BERT reads: ids, mask and labels, int64 [N, S]."""
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


def train(name: str, model, collate, rows, held_out, seed: int, arguments) -> list[dict]:
    """Train one model for the steps asked and log its curve.

    Args:
        name: of the model in the log.
        model: takes what `collate` makes.
        collate: turns a row to a batch.
        rows: `PackedRows` to train on.
        held_out: rows to validate on.
        seed: of dropout.
        arguments: the command line.

    Returns:
        One dict a logged step, see `COLUMNS`. The validation loss is logged at the first and the last step.
    """
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    torch.manual_seed(seed)
    model.to(arguments.device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), arguments.learning_rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.02, fused=True
    )
    warmup = max(1, round(0.06 * arguments.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: linear_schedule(step, warmup, arguments.steps, final=0.02)
    )

    def loss_of(row):
        batch = {k: v.to(arguments.device) if torch.is_tensor(v) else v for k, v in collate(row).items()}
        return model(**batch).loss

    @torch.no_grad()
    def validate():
        model.eval()
        counts = [int((row["labels"] != IGNORED).sum()) for row in held_out]
        mean = sum(loss_of(row).item() * count for row, count in zip(held_out, counts)) / sum(counts)
        model.train()
        return mean

    log, window, wordpieces, seconds = [], [], 0, 0.0
    for step in range(arguments.steps + 1):
        if step % arguments.log_every == 0 or step == arguments.steps:
            log.append(
                {
                    "model": name,
                    "seed": seed,
                    "step": step,
                    "wordpieces": wordpieces,
                    "seconds": round(seconds, 1),
                    "train_loss": round(sum(window) / len(window), 4) if window else "",
                    "validation_loss": round(validate(), 4) if step in (0, arguments.steps) else "",
                }
            )
            print(",".join(str(log[-1][column]) for column in COLUMNS), flush=True)
            window = []
        if step == arguments.steps:
            break
        row = rows[step]
        began = clock()
        loss = loss_of(row)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        window.append(loss.item())  # waits for a GPU
        seconds += clock() - began
        wordpieces += len(row["input_ids"])
    return log


def draw(log: list[dict], path: Path) -> None:
    """Save a picture of the training loss by wordpieces and by seconds, one line a model and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    names = list(dict.fromkeys(entry["model"] for entry in log))
    for axes, column, label in zip(
        panels, ("wordpieces", "seconds"), ("wordpieces seen", "seconds (CPU time on a CPU)")
    ):
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
    """Write what has been logged so far as `curves.csv` and `curves.png`."""
    with open(folder / "curves.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)
    draw(log, folder / "curves.png")


def main() -> None:
    """Parse the command line, train both models for each seed, and write the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bert", required=True, help="folder or Hub id of a stock BERT")
    parser.add_argument("--mosaicbert", required=True, help="folder of its conversion by convert_bert.py")
    parser.add_argument("--train_data", nargs="+", required=True, help="as pretrain_mlm.py takes it")
    parser.add_argument("--validation_data", nargs="+", required=True, help="the same")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--random_weights", action="store_true", help="start both from random weights")
    parser.add_argument("--max_length", type=int, default=128, help="wordpieces of a sequence")
    parser.add_argument("--tokens_per_row", type=int, default=3072, help="wordpieces of a step, at most")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--log_every", type=int, default=5)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--validation_rows", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=8e-4)
    parser.add_argument("--dropout", type=float, default=0.0, help="hidden dropout of both; attention has none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.mosaicbert)
    mosaic_class = repository_class("BertForMaskedLM")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)

    def rows_of(sources, probability, seed):
        sequences = load_sequences(load_texts(sources), tokenizer, [arguments.max_length], [1.0], seed=0)
        return PackedRows(sequences, tokenizer, arguments.tokens_per_row, probability, seed)

    held_out = rows_of(arguments.validation_data, 0.15, 0)
    held_out = [held_out[i] for i in range(min(arguments.validation_rows, len(held_out)))]
    log = []
    print(",".join(COLUMNS))
    for seed in arguments.seeds:
        rows = rows_of(arguments.train_data, 0.3, seed)
        for name in ("stock BERT", "MosaicBERT"):
            model = mosaic_class.from_pretrained(
                arguments.mosaicbert,
                hidden_dropout_prob=arguments.dropout,
                attention_probs_dropout_prob=0.0,
                sparse_prediction=True,
            ).float()
            collate = flatten_row
            torch.manual_seed(seed)
            if arguments.random_weights:
                model = mosaic_class(model.config)
            if name == "stock BERT":
                model, collate = stock_twin(arguments.bert, model, arguments.random_weights), pad_row
            log += train(name, model, collate, rows, held_out, seed, arguments)
            if seed == arguments.seeds[0]:
                folder = arguments.output_dir / name.replace(" ", "-")
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            write_curves(log, arguments.output_dir)


if __name__ == "__main__":
    main()
