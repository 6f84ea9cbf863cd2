"""Fine-tuning for classification and regression: the work behind finetune_classification.py."""

import argparse
import copy
import importlib
import os
import shutil
from pathlib import Path

import numpy as np
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    TrainingArguments,
    set_seed,
)

from .cards import write_card
from .common import REPOSITORY, load_model, load_words, say_float32, write_json
from .examples import SINGLE, encode_labels, infer_problem, load_examples, split_examples
from .records import pieces
from .runs import STAGE, Run, is_finite, open_run
from .scores import DECIDING, decide, draw_confusion, fit_baseline, score
from .training import CarefulTrainer, Divergence

# Below this many weights a model needs larger steps and one more epoch.
SMALL_MODEL = 50_000_000


def default_rates(weights: int) -> tuple[float, float]:
    """The learning rate and the number of epochs for a model of this many weights.

    Source: ours for small models, measured with the checkpoint of this repository; for others what
        https://arxiv.org/abs/1810.04805, appendix A.3, recommends.
    """
    return (3e-4, 4.0) if weights < SMALL_MODEL else (5e-5, 3.0)


def finetune(options: argparse.Namespace, arguments: TrainingArguments) -> dict:
    """Run the fine-tuning that the options describe and write its results to `output_dir`.

    Args:
        options: the own options of finetune_classification.py.
        arguments: the options of transformers' Trainer.

    Returns:
        What `metrics.json` holds: the problem, the classes, the scores of each seed, their mean and standard
        deviation, the seeds that diverged and the step of each, and the baseline's scores where asked.

    Raises:
        ValueError: data that `load_examples`, `infer_problem` or `encode_labels` refuse, more than two text fields, or
            several processes.
        FloatingPointError: every seed diverged.
    """
    if not 1 <= len(options.text_fields) <= 2:
        raise ValueError(f"text_fields must name one or two fields, got {options.text_fields}")
    if arguments.world_size > 1:
        raise ValueError(f"fine-tuning runs in one process, got {arguments.world_size}: start it without torchrun")
    for package in ("sklearn", "matplotlib"):  # so that they are missed before training
        importlib.import_module(package)
    model_name = str(REPOSITORY) if options.model is None else options.model
    tokenizer = load_words(model_name, trust_remote_code=options.trust_remote_code)
    inputs = {"train_data": options.train_data, "validation_data": options.validation_data, "model": model_name}
    with open_run(Path(arguments.output_dir), options.overwrite, **inputs) as run:
        arguments.output_dir = str(run.work)
        return _finetune(options, arguments, run, model_name, tokenizer)


def _finetune(options: argparse.Namespace, arguments: TrainingArguments, run: Run, model_name: str, tokenizer) -> dict:
    """Do what `finetune` does, in the folder of a run."""
    train = load_examples(options.train_data, options, "train")
    if options.validation_data:
        validation = load_examples(options.validation_data, options, "validation")
    else:
        train, validation = split_examples(*train)
    problem, names = infer_problem(train[1])
    if arguments.label_smoothing_factor and problem != SINGLE:
        raise ValueError(f"label_smoothing_factor works with single-label problems, this is {problem}")
    print(
        f"{problem} with "
        + (
            f"{len(names)} classes ({', '.join(names[:5])}{', …' if names[5:] else ''})"
            if names
            else "numbers as labels"
        )
        + f"; {len(train[1]):,} training and {len(validation[1]):,} validation examples",
        flush=True,
    )
    truth = [encode_labels(labels, problem, names) for labels in (train[1], validation[1])]
    results = {"problem": problem, "classes": names, "seeds": {}, "diverged": {}}
    if options.baseline:
        texts = [["\n".join(fields) for fields in part] for part in (train[0], validation[0])]
        guess = fit_baseline(problem, texts[0], truth[0], texts[1])
        results["baseline"] = score(problem, guess, truth[1])

    sets = []
    for (texts, _), labels in zip((train, validation), truth):
        # The first piece of a text has more tokens than are kept, and fits into memory.
        fields = ([next(pieces(text)) for text in field] for field in zip(*texts))
        tokens = tokenizer(*fields, truncation=True, max_length=options.max_length)
        rows = zip(*tokens.values(), labels.tolist())
        sets.append([dict(zip((*tokens, "labels"), row)) for row in rows])

    stage, best = run.work / STAGE, None
    for seed in options.seeds:
        try:
            trainer = train_seed(seed, model_name, tokenizer, sets, problem, names, options, arguments)
        except Divergence as error:
            print(f"seed {seed}: {error}", flush=True)
            results["diverged"][str(seed)] = error.step
            divergence = error
            continue
        predicted = decide(problem, trainer.predict(sets[1]).predictions)
        results["seeds"][str(seed)] = score(problem, predicted, truth[1])
        reached = results["seeds"][str(seed)][DECIDING[problem]]
        print(f"seed {seed}: {DECIDING[problem]} {reached:.4f}", flush=True)
        if best is None or reached > best[0]:
            best = (reached, predicted)
            shutil.rmtree(stage, ignore_errors=True)
            trainer.save_model(str(stage))
    if best is None:
        raise divergence
    for name, statistic in (("mean", np.mean), ("standard_deviation", np.std)):
        results[name] = {
            metric: float(statistic([scores[metric] for scores in results["seeds"].values()]))
            for metric in next(iter(results["seeds"].values()))
        }
    if problem == SINGLE:
        draw_confusion(truth[1], best[1], names, stage / "confusion.png")
    write_json(stage / "metrics.json", results)
    write_model_card(stage, run.folder.name, model_name, results)
    say_float32(stage)
    run.publish(stage, options.keep_checkpoints)
    for part in ("mean", "baseline"):
        if part in results:
            print(f"{part}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in results[part].items()))
    return results


def train_seed(
    seed: int,
    model_name: str,
    tokenizer,
    sets: list[list[dict]],
    problem: str,
    names: list[str],
    options: argparse.Namespace,
    arguments: TrainingArguments,
) -> CarefulTrainer:
    """Train one model; the trainer that comes back holds the one of the best epoch.

    Args:
        seed: of the head, the order and dropout.
        model_name: folder or Hub id to start from.
        tokenizer: of the model.
        sets: tokenized training and validation examples.
        problem, names: what `infer_problem` found.
        options, arguments: as `finetune` takes them.

    Raises:
        ValueError: the model's weights hold NaN or infinity.
        FloatingPointError: the loss or the weights became NaN or infinite.
    """
    set_seed(seed)
    classes = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}
    model = load_model(
        "ForSequenceClassification",
        model_name,
        options.trust_remote_code,
        problem_type=problem,
        num_labels=max(1, len(names)),
        **classes,
    ).float()
    if not is_finite(*model.parameters()):
        raise ValueError(f"model: the weights of {model_name!r} hold NaN or infinity")
    weights = sum(parameter.numel() for parameter in model.parameters())
    learning_rate, epochs = default_rates(weights)
    own = copy.copy(arguments)
    own.learning_rate = options.learning_rate or learning_rate
    own.num_train_epochs = options.num_train_epochs or epochs
    own.gradient_accumulation_steps = max(1, arguments.gradient_accumulation_steps)
    own.seed, own.output_dir = seed, os.path.join(arguments.output_dir, f"seed-{seed}")
    own.eval_strategy = own.save_strategy = "epoch"
    own.load_best_model_at_end = True
    own.metric_for_best_model, own.greater_is_better = DECIDING[problem], True
    rates = f"learning rate {own.learning_rate:g}, at most {own.num_train_epochs:g} epochs"
    print(f"seed {seed}: {weights:,} weights, {rates}", flush=True)
    trainer = CarefulTrainer(
        model=model,
        args=own,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=sets[0],
        eval_dataset=sets[1],
        processing_class=tokenizer,
        compute_metrics=lambda p: score(problem, decide(problem, p.predictions), p.label_ids),
        callbacks=[EarlyStoppingCallback(options.patience)],
    )
    trainer.train()
    trainer.check_weights()
    return trainer


def write_model_card(folder: Path, title: str, model_name: str, results: dict) -> None:
    """Write the README.md of a fine-tuned model, with its scores on the validation data."""
    scores = ", ".join(f"{metric} {value:.4f}" for metric, value in results["mean"].items())
    kind = results["problem"].replace("_", " ")
    source = Path(model_name)
    write_card(
        folder,
        f"Fine-tuned by `scripts/finetune_classification.py` ({kind}); on the validation data, mean over "
        f"{len(results['seeds'])} seed(s): {scores}",
        source=model_name,
        folder=source if source.is_dir() else None,
        title=title,
        notes="Load it with `AutoModelForSequenceClassification`; `metrics.json` holds all scores.",
    )
