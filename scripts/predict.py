"""Predict with a classifier or a regressor of finetune_classification.py, and write one row per text as CSV.

python scripts/predict.py runs/topics new.csv predictions.csv
"""

from pathlib import Path

from lib import cli


def main() -> None:
    """Parse the command line, predict and write the table."""
    parser = cli.Parser(__doc__)
    parser.add_argument("model", help="folder or Hub id of the model")
    parser.add_argument(
        "data", help=".jsonl, .json or .csv file, or .txt with a text a line (also .gz), or a `datasets` id"
    )
    parser.add_argument("output", type=cli.new_file, help="CSV file to write: texts, predictions, probabilities")
    parser.option(
        "--text_fields", "one field with texts, or two with pairs", default=["text"], nargs="+", metavar="NAME"
    )
    parser.option(
        "--max_length", "truncate longer texts to this many tokens (default: --tokens_per_batch)", cli.text_length
    )
    parser.option("--tokens_per_batch", "approximate number of tokens per batch", cli.positive_integer, 16_384)
    parser.option("--device", "such as cpu or cuda:1 (default: the GPU if there is one)")
    parser.option("--trust_remote_code", **cli.TRUST)
    options = parser.parse_args()
    from lib.common import check_whole, count_tokens, load_model, load_words
    from lib.examples import load_examples
    from lib.staging import check_apart

    check_apart(options.output, "output", data=options.data, model=options.model)
    check_whole(options.model, options.trust_remote_code, "ForSequenceClassification")
    examples = load_examples([options.data], options, "test", "data", labelled=False)
    from lib import prediction
    from lib.evaluation import find_device
    from lib.scores import write_predictions

    device = find_device(options.device)
    tokenizer = load_words(options.model, trust_remote_code=options.trust_remote_code)
    model = load_model("ForSequenceClassification", options.model, options.trust_remote_code)
    count_tokens(tokenizer, model.config.vocab_size)
    task = prediction.task_of(model.config)
    sets, _ = prediction.tokenize({"test": examples}, tokenizer, options.max_length, 1, options.tokens_per_batch)
    logits = prediction.predict(model.float().to(device), tokenizer, sets["test"], options.tokens_per_batch)
    write_predictions(Path(options.output), options.text_fields, examples, task, logits)
    cli.say_end(f"saved in {options.output}: {len(logits):,} predictions ({task.problem})")


if __name__ == "__main__":
    cli.run(main, "a smaller --tokens_per_batch or --max_length needs less")
