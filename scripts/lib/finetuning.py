"""Fine-tuning for classification and regression: the work behind finetune_classification.py."""

import argparse
import copy
import importlib
import math
import os
import shutil
import time
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from huggingface_hub import EvalResult
from transformers import DataCollatorWithPadding, EarlyStoppingCallback, TrainingArguments, set_seed

from .cards import hub_task, in_markdown, write_card
from .cli import command, listed, say_end
from .common import (
    REPOSITORY,
    check_labels,
    config_fields,
    count_tokens,
    is_family,
    load_model,
    load_words,
    say_float32,
    write_json,
)
from .examples import REGRESSION, SINGLE, Task
from .pictures import draw_confusion, draw_losses
from .prediction import predict, tokenize
from .records import is_file_name
from .runs import STAGE, Run, is_finite, open_run
from .scores import DECIDING, class_scores, decide, fit_baseline, interval, score, write_errors, write_predictions
from .sources import inputs
from .training import LOG_SECONDS, CarefulTrainer, Divergence, tell_time

# A model with fewer weights needs larger steps and one more epoch.
SMALL_MODEL = 50_000_000
# Few texts get smaller batches, and more epochs until there are this many steps.
SMALLEST_BATCH, FEWEST_STEPS, MOST_EPOCHS = 8, 100, 20
# A training stops after this many epochs without a better score.
PATIENCE = 2
# Fewer validation texts cannot tell one epoch from another.
FEWEST_JUDGES = 100
# The Hub's names of our metrics, if they differ.
METRIC_TYPES = {
    "macro_f1": "f1",
    "micro_f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
# The most classes whose scores are printed; the card lists all.
SHOWN_CLASSES = 20


def default_batch_size(texts: int) -> int:
    """Choose the batch size for a training set of this many texts, see docs/checkpoint.md."""
    return min(32, max(SMALLEST_BATCH, texts // 50))


def default_rates(weights: int, steps: int) -> tuple[float, float]:
    """Choose the learning rate and the number of epochs for a model of this many weights and an epoch of these steps.

    Source: https://arxiv.org/abs/1810.04805, appendix A.3; for small models and few texts docs/checkpoint.md.
    """
    rate, epochs = (3e-4, 4) if weights < SMALL_MODEL else (5e-5, 3)
    return rate, float(max(epochs, min(MOST_EPOCHS, math.ceil(FEWEST_STEPS / steps))))


def keeps_best(options: argparse.Namespace, judges: int) -> bool:
    """Decide by the number of validation texts, or by `patience`, whether the best epoch is kept or the last one.

    With the best epoch a training stops early; at the end of the last one the learning rate is 0.
    """
    return options.patience is not None or judges >= FEWEST_JUDGES


def pooling(options: argparse.Namespace) -> dict[str, str]:
    """Choose the `classifier_pooling` of a MosaicBERT, as a field of its config; {} leaves it as it is.

    A masked language model has no trained pooler; the mean over tokens learns sooner than a new pooler.

    Raises:
        ValueError: the option is given, and the model is no MosaicBERT.
    """
    fields, wanted = config_fields(options.model), options.classifier_pooling
    if is_family(fields):
        wanted = wanted or ("mean" if hub_task(fields) == "fill-mask" else None)
    elif wanted:
        raise ValueError(f"classifier_pooling: {options.model!r} is not a MosaicBERT and has its own pooling")
    return {"classifier_pooling": wanted} if wanted else {}


def old_labels(source: str) -> list[str]:
    """Read the names of a classifier's labels from its config; [] for another model, and for labels without names."""
    fields = config_fields(source)
    check_labels(fields, "model")
    named = fields.get("id2label") if hub_task(fields) == "text-classification" else None
    names = [name for _, name in sorted((named or {}).items(), key=lambda item: int(item[0]))]
    return [] if names == [f"LABEL_{number}" for number in range(len(names))] else names


def renew_head(model) -> list[str]:
    """Make the last layer of a classifier new, as transformers does; returns its name."""
    renewed, encoder = [], f"{model.base_model_prefix}."
    for name, module in model.named_modules():
        is_last = isinstance(module, torch.nn.Linear) and module.out_features == model.config.num_labels
        if is_last and not name.startswith(encoder):
            torch.nn.init.normal_(module.weight, std=getattr(model.config, "initializer_range", 0.02))
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            renewed.append(name)
    return renewed


def finetune(options: argparse.Namespace, arguments: TrainingArguments, task: Task) -> dict:
    """Run the fine-tuning that the options describe and write its results to `output_dir`.

    Args:
        options: the own options of finetune_classification.py.
        arguments: the options of transformers' Trainer.
        task: the result of `read_task`.

    Returns:
        The content of `metrics.json`: the problem, the classes, the number of examples, the scores of each seed on the
        validation data, their mean and standard deviation, the seeds that diverged and the step of each. `judged` holds
        the scores of the best seed on the test data, or else the validation data: all metrics, the 95% interval of the
        deciding one, and those of each class. `baseline` holds the baseline's scores on the same data.

    Raises:
        ValueError: the output folder holds results, the model cannot be loaded, or there are several processes.
        FloatingPointError: every seed diverged.
    """
    if arguments.world_size > 1:
        raise ValueError(f"fine-tuning runs in one process, got {arguments.world_size}: start it without torchrun")
    if arguments.label_smoothing_factor and task.problem != SINGLE:
        raise ValueError(f"label_smoothing_factor works with single-label problems, this is {task.problem}")
    for package in ("sklearn", "matplotlib"):  # so that a missing one is noticed before training
        importlib.import_module(package)
    options.model = options.model or str(REPOSITORY)
    arguments.per_device_train_batch_size = options.per_device_train_batch_size or default_batch_size(
        len(task.truth["train"])
    )
    with open_run(Path(arguments.output_dir), options.overwrite, **inputs(options)) as run:
        arguments.output_dir = str(run.work)
        return _finetune(options, arguments, task, run)


def _finetune(options: argparse.Namespace, arguments: TrainingArguments, task: Task, run: Run) -> dict:
    """Do the work of `finetune` in the folder of a run."""
    tokenizer = load_words(options.model, trust_remote_code=options.trust_remote_code)
    changes = pooling(options)
    sets, max_length = tokenize(
        task.parts, tokenizer, options.max_length, arguments.per_device_train_batch_size, options.tokens_per_batch
    )
    for name, labels in task.truth.items():
        sets[name] = [{**row, "labels": label} for row, label in zip(sets[name], labels.tolist())]
    results = {"problem": task.problem, "classes": task.names, "max_length": max_length, "seeds": {}, "diverged": {}}
    results["examples"] = {name: len(part) for name, part in sets.items()}
    judged, truth = task.judged, task.truth[task.judged]
    if options.baseline:
        began = time.perf_counter()
        texts = [["\n".join(fields) for fields in task.parts[name].texts] for name in ("train", judged)]
        guess = fit_baseline(task.problem, texts[0], task.truth["train"], texts[1])
        results["baseline"] = score(task.problem, guess, truth)
        results["baseline_interval"] = interval(task.problem, guess, truth)
        results["baseline_seconds"] = round(time.perf_counter() - began, 1)
        print(f"TF-IDF: {tell(task.problem, results['baseline'], results['baseline_interval'])}", flush=True)

    stage, best, histories, began = run.work / STAGE, None, {}, time.perf_counter()
    for seed in options.seeds:
        try:
            trainer = train_seed(seed, tokenizer, sets, task, options, arguments, changes)
        except Divergence as error:
            print(f"seed {seed}: {error}", flush=True)
            results["diverged"][str(seed)] = error.step
            divergence = error
            continue
        histories[f"seed {seed}"] = trainer.state.log_history
        logits = trainer.predict(sets["validation"]).predictions
        reached = score(task.problem, decide(task.problem, logits), task.truth["validation"])
        results["seeds"][str(seed)] = reached
        print(f"seed {seed}: {tell(task.problem, reached)}", flush=True)
        if best is None or reached[DECIDING[task.problem]] > best[0]:
            best = (reached[DECIDING[task.problem]], seed, logits)
            shutil.rmtree(stage, ignore_errors=True)
            trainer.save_model(str(stage))
    if best is None:
        raise divergence
    for name, statistic in (("mean", np.mean), ("standard_deviation", np.std)):
        results[name] = {
            metric: float(statistic([scores[metric] for scores in results["seeds"].values()]))
            for metric in next(iter(results["seeds"].values()))
        }
    results["seconds"] = round(time.perf_counter() - began, 1)
    _, seed, logits = best
    if {"test", "predict"} & sets.keys():
        model = load_model("ForSequenceClassification", str(stage), options.trust_remote_code)
        model = model.float().to(arguments.device)
    if judged == "test":
        rows = [{name: value for name, value in row.items() if name != "labels"} for row in sets["test"]]
        logits = predict(model, tokenizer, rows, options.tokens_per_batch)
    if "predict" in sets:
        found = predict(model, tokenizer, sets["predict"], options.tokens_per_batch)
        write_predictions(stage / "predictions.csv", options.text_fields, task.parts["predict"], task, found)
    predicted = decide(task.problem, logits)
    results["judged"] = {
        "data": judged,
        "seed": seed,
        "scores": score(task.problem, predicted, truth),
        "interval": interval(task.problem, predicted, truth),
        "classes": class_scores(predicted, truth, task.names) if task.names else {},
        "errors": write_errors(stage / "errors.csv", options.text_fields, task.parts[judged], task, logits, truth),
    }
    if task.problem == SINGLE:
        draw_confusion(truth, predicted, task.names, stage / "confusion.png")
    draw_losses(histories, stage / "loss.png")
    write_json(stage / "metrics.json", results)
    write_model_card(stage, run.folder.name, results, options)
    say_float32(stage)
    run.publish(stage, options.keep_checkpoints)
    say_results(results, run.folder, options.text_fields)
    return results


def train_seed(
    seed: int,
    tokenizer,
    sets: dict[str, list[dict]],
    task: Task,
    options: argparse.Namespace,
    arguments: TrainingArguments,
    changes: dict,
) -> CarefulTrainer:
    """Train one model.

    Args:
        seed: of the head, the order and dropout.
        tokenizer: of the model.
        sets: tokenized examples with their labels, by part.
        task, options, arguments: as `finetune` takes them.
        changes: fields of the model's config to set.

    Returns:
        The trainer with the model of the best epoch, or of the last one, see `keeps_best`.

    Raises:
        ValueError: the model's weights hold NaN or infinity.
        FloatingPointError: the loss or the weights became NaN or infinite.
    """
    set_seed(seed)
    new_head: list[str] = []
    old = old_labels(options.model)
    classes = {"id2label": dict(enumerate(task.names)), "label2id": {n: i for i, n in enumerate(task.names)}}
    model = load_model(
        "ForSequenceClassification",
        options.model,
        options.trust_remote_code,
        new_head,
        problem_type=task.problem,
        num_labels=max(1, len(task.names)),
        **(classes if task.names else {}),
        **changes,
    ).float()
    count_tokens(tokenizer, model.config.vocab_size)
    is_other = bool(old and task.names) and old != task.names
    if is_other and not new_head:
        new_head += renew_head(model)
    if not is_finite(*model.parameters()):
        raise ValueError(f"model: the weights of {options.model!r} hold NaN or infinity")
    weights = sum(parameter.numel() for parameter in model.parameters())
    own = copy.copy(arguments)
    own.gradient_accumulation_steps = max(1, arguments.gradient_accumulation_steps)
    texts_a_step = own.train_batch_size * own.gradient_accumulation_steps
    steps = math.ceil(len(sets["train"]) / texts_a_step)
    learning_rate, epochs = default_rates(weights, steps)
    own.learning_rate = options.learning_rate or learning_rate
    own.num_train_epochs = options.num_train_epochs or epochs
    own.seed, own.output_dir = seed, os.path.join(arguments.output_dir, f"seed-{seed}")
    own.eval_strategy = own.save_strategy = "epoch"
    own.load_best_model_at_end = keeps_best(options, len(sets["validation"]))
    if own.load_best_model_at_end:
        own.metric_for_best_model, own.greater_is_better = DECIDING[task.problem], True
    patience, most = (options.patience or PATIENCE, "at most ") if own.load_best_model_at_end else (None, "")
    epochs = f"{own.num_train_epochs:g} epoch{'' if own.num_train_epochs == 1 else 's'}"
    chosen = f"learning rate {own.learning_rate:g}, {most}{epochs} of {steps:,} steps"
    head = f", {changes['classifier_pooling']} pooling" if changes else ""
    head += ", a new head" if new_head else ", the old head"
    head += f" (the old labels are {listed(old, 5)})" if is_other else ""
    print(f"seed {seed}: {weights:,} weights, {chosen} of {texts_a_step} texts{head}", flush=True)
    trainer = CarefulTrainer(
        seconds_between_logs=LOG_SECONDS if options.logging_steps is None else None,
        model=model,
        args=own,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=sets["train"],
        eval_dataset=sets["validation"],
        processing_class=tokenizer,
        compute_metrics=lambda p: score(task.problem, decide(task.problem, p.predictions), p.label_ids),
        callbacks=[EarlyStoppingCallback(patience)] if patience else [],
    )
    trainer.train()
    trainer.check_weights()
    return trainer


def tell(problem: str, scores: dict[str, float], ends: Optional[list[float]] = None) -> str:
    """Write scores in words, the deciding one first, with its 95% interval if it is given."""
    names = sorted(scores, key=lambda metric: metric != DECIDING[problem])
    parts = [f"{metric} {scores[metric]:.4f}" for metric in names]
    if ends is not None:
        parts[0] += f" (95% interval {ends[0]:.3f} to {ends[1]:.3f})"
    return ", ".join(parts)


def say_results(results: dict, folder: Path, text_fields: list[str]) -> None:
    """Print the scores of a finished run, its files and where they are, and the commands that may follow."""
    judged, problem = results["judged"], results["problem"]
    count = results["examples"][judged["data"]]
    print(f"mean of {len(results['seeds'])} on the validation data: {tell(problem, results['mean'])}")
    print(f"best, seed {judged['seed']}, on {count:,} {judged['data']} texts:", end=" ")
    print(f"{tell(problem, judged['scores'], judged['interval'])}; trained for {tell_time(results['seconds'])}")
    if "baseline" in results:
        scores = tell(problem, results["baseline"], results["baseline_interval"])
        print(f"TF-IDF on the same texts: {scores}; fitted in {results['baseline_seconds']} s")
    for name, row in list(judged["classes"].items())[:SHOWN_CLASSES]:
        numbers = "  ".join(f"{metric} {row[metric]:.3f}" for metric in ("precision", "recall", "f1"))
        print(f"  {numbers}  support {row['support']:>5}  {name}")
    errors = "all texts by their error" if problem == REGRESSION else f"{judged['errors']:,} wrong"
    files = ["the model", "README.md (its card)", "metrics.json", "loss.png", f"errors.csv ({errors})"]
    files += [name for name in ("confusion.png", "predictions.csv") if (folder / name).is_file()]
    fields = [] if text_fields == ["text"] else ["--text_fields", *text_fields]
    say_end(
        f"saved in {folder}: {', '.join(files)}",
        command("predict.py", folder, "new.csv", "predictions.csv", *fields),
        command("push_to_hub.py", folder, f"YOUR-NAME/{folder.resolve().name}", "--dry_run"),
    )


def write_model_card(folder: Path, title: str, results: dict, options: argparse.Namespace) -> None:
    """Write the README.md of a fine-tuned model, with its training data and its scores."""
    judged, problem = results["judged"], results["problem"]
    count = results["examples"][judged["data"]]
    chosen = "the epoch and the seed" if keeps_best(options, results["examples"]["validation"]) else "the seed"
    chosen = "" if judged["data"] == "test" else f", which also chose {chosen}"
    lines = [
        f"On {count:,} {judged['data']} texts{chosen}: {tell(problem, judged['scores'], judged['interval'])}.",
        f"Mean over {len(results['seeds'])} seed(s) on {results['examples']['validation']:,} validation texts: "
        f"{tell(problem, results['mean'])}.",
    ]
    if "baseline" in results:
        scores = tell(problem, results["baseline"], results["baseline_interval"])
        lines.append(f"TF-IDF with a linear model on the {judged['data']} texts: {scores}.")
    if judged["classes"]:
        lines.append("| label | precision | recall | F1 | texts |\n| --- | --- | --- | --- | --- |")
        for name, row in judged["classes"].items():
            numbers = " | ".join(f"{row[metric]:.3f}" for metric in ("precision", "recall", "f1"))
            lines[-1] += f"\n| {in_markdown(name)} | {numbers} | {row['support']:,} |"
    if (folder / "confusion.png").is_file():
        lines.append("![which label was taken for which](confusion.png)")
    lines.append("![loss by step](loss.png)\n\n[metrics.json](metrics.json) holds all scores.")
    write_card(
        folder,
        f"Fine-tuned by `scripts/finetune_classification.py` ({problem.replace('_', ' ')}) on "
        f"{results['examples']['train']:,} texts of up to {results['max_length']:,} tokens",
        source=options.model,
        folder=Path(options.model) if Path(options.model).is_dir() else None,
        title=title,
        notes="## Scores\n\n" + "\n\n".join(lines),
        pairs=len(options.text_fields) == 2,
        results=card_results(results, options),
    )


def card_results(results: dict, options: argparse.Namespace) -> list[EvalResult]:
    """List the scores of a fine-tuned model for the head of its card, with the number of texts and the interval."""
    judged, deciding = results["judged"], DECIDING[results["problem"]]
    sources = getattr(options, f"{judged['data']}_data") or options.train_data
    is_dataset = len(sources) == 1 and not is_file_name(sources[0])
    name = sources[0].partition(":")[0] if is_dataset else Path(sources[0]).name
    count = f"{results['examples'][judged['data']]:,} texts"
    ends = ", 95% interval {:.3f} to {:.3f}".format(*judged["interval"])
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type=name if is_dataset else "local",
            dataset_name=name,
            dataset_split=judged["data"],
            metric_type=METRIC_TYPES.get(metric, metric),
            metric_name=f"{metric}, {count}{ends if metric == deciding else ''}",
            metric_value=round(value, 4),
        )
        for metric, value in judged["scores"].items()
    ]
