"""The tables of the PDF that are read from records: points, trials, seeds, origin."""

import json
import re
import statistics
from pathlib import Path

from torchvision.datasets import CIFAR10

from report.sync import edited_since, provenance
from support.dataset import ARCHIVE_MD5, is_present
from support.records import (
    QUICK_RECORD,
    describe,
    finished,
    first_epoch_at,
    read_history,
)

ROOT = Path(__file__).parent.parent
TRIALS = ROOT / "bench" / "trials"
ORDER = "init screen final settings ablation"  # of the groups, as the text has them
FIGURE = re.compile(r"\*\*Figure (\d+)\.\*\*")  # what a caption begins with

RECIPE = "make_loaders to train_run"
GRID_ATTENTION = "SelfAttention2d.forward to SelfAttention2d"
# The sheet's 20 points: what, points, the code (from one definition to another), and
# the unit test, or the mark of validation accuracy, that is the evidence
POINTS = (
    ("Task 1: modules in __init__", 1, "SelfAttention2d.__init__", "multi head"),
    ("Task 1: single head", 3, GRID_ATTENTION, "single head"),
    ("Task 1: several heads", 2, GRID_ATTENTION, "multi head"),
    ("Task 2: FeedForwardBlock", 1, "FeedForwardBlock", "dropout"),
    ("Task 2: transformer block", 2, "SelfAttentionTransformerBlock", "block"),
    ("Task 2: __init__", 2, "VisionTransformer.__init__", "parameter count"),
    ("Task 2: patchify", 2, "VisionTransformer.patchify", "patch order"),
    ("Task 2: forward", 1, "VisionTransformer.forward", "class token"),
    ("Task 2: 25 % validation accuracy", 2, RECIPE, 0.25),
    ("Task 2: 50 % validation accuracy", 2, RECIPE, 0.5),
    ("Task 2: 70 % validation accuracy", 2, RECIPE, 0.7),
)


def points(notebooks, history):
    """Return the rows of the table of points, the evidence read from what was run.

    Each is a dict with ``what``, ``points``, ``code`` (of which definitions), ``proof``
    (from a test to what it printed, or the printed accuracy) and ``evidence``.
    """
    cells = [cell for notebook in notebooks for cell in notebook.cells]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    printed = "\n".join(output.get("text", "") for output in outputs)
    passed = dict(re.findall(r"^passed  ([\w ]+): (.*)$", printed, re.MULTILINE))
    captions = [cell.source for cell in cells if FIGURE.match(cell.source)]
    curve = [FIGURE.match(c)[1] for c in captions if "validation accuracy" in c]
    figure = f"; Figure {curve[0]}" if curve else ""
    accuracies, rows = history["val_accs"], []
    for what, number, code, proof in POINTS:
        if isinstance(proof, str):
            evidence = f"{proof}: {passed.get(proof, 'not run')}"
            proof = f"test_{proof.replace(' ', '_')} to passed {proof}"
        else:
            epoch = first_epoch_at(accuracies, proof)
            proof = f"{proof:.0%} by the recipe"
            first = f"epoch {epoch}: {accuracies[epoch - 1]:.1%}" if epoch else "never"
            last = f"epoch {len(accuracies)}, the last: {accuracies[-1]:.1%}"
            evidence = f"{first}; {last}{figure}".replace("%", " %")
        row = {"what": what, "points": number, "code": code, "proof": proof}
        rows.append({**row, "evidence": evidence})
    return rows


def origin(submission, notebooks):
    """Return the rows of the first page on what was made where and when."""
    rows = []
    for path, notebook in zip(submission.notebooks, notebooks, strict=True):
        facts = provenance(notebook)
        how = "it is not known when it was executed"
        if "executed" in facts:
            how = (
                f"executed on {facts['executed']}: {facts['system']}, Python "
                f"{facts['python']}, torch {facts['torch']}"
            )
        edited = ", ".join(edited_since(notebook))
        rows.append([path.name, how + f"; edited since: {edited}" * bool(edited)])
    history = submission.history
    data = "not at hand when the report was made"
    if submission.demo:
        data = "generated images, see support/demo_data.py"
    elif is_present(CIFAR10, "data"):
        data = f"CIFAR-10, all files intact; MD5 of the archive: {ARCHIVE_MD5}"
    run = (
        f"{describe(history)}: {finished(history)}, {history['machine']}, torch "
        f"{history['versions']['torch']}"
    )
    return [*rows, ["training", run], ["data set", data]]


def trials():
    """Return the tables of trials and of seeds in pandoc's Markdown."""
    records = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(TRIALS.glob("*.json"))
    ]
    short = [record for record in records if "held_out_accs" in record]
    short += [_beginning(trial) for trial in short if trial["group"] == "final"]
    short.sort(key=lambda trial: (ORDER.find(trial["group"]), -at_the_end(trial)[0]))
    seeds = [read_history(ROOT / QUICK_RECORD)]
    seeds += [record for record in records if "held_out_accs" not in record]
    return f"{_short_runs(short)}\n\n{_seeds(seeds)}"


def _beginning(final, epochs=20):
    """Return the first epochs of a final: settings and images are an ablation's."""
    lists = {key: value[:epochs] for key, value in final.items() if type(value) is list}
    return {**final, **lists, "group": "ablation", "epochs": epochs}


def at_the_end(trial):
    """Return accuracy by the recipe, with eval(), and perhaps the loss of a trial.

    Of a long one, the mean over its last five epochs: single epochs scatter.
    """
    number = 5 if trial["epochs"] >= 20 else 1
    names = ("held_out_accs", "held_out_accs_eval", "held_out_losses")
    return [statistics.mean(trial[name][-number:]) for name in names if name in trial]


def _short_runs(runs):
    header = "group, trial, batch, rate, epochs x images, seed, recipe / %, eval / %, "
    header += "loss / nats"
    rows = [
        [
            run["group"],
            run["name"],
            run["batch_size"],
            f"{run['lr']:g}",
            f"{run['epochs']} x {run['images']:,}",
            run["seed"],
            *_percents(at_the_end(run)[:2]),
            *(f"{loss:.3f}" for loss in at_the_end(run)[2:]),
        ]
        for run in runs
    ]
    return _table(
        header,
        rows,
        "**Table 1.** Short runs, by group, the best of each first: accuracy on held-"
        "out training images after the last epoch, or the mean over the last five if "
        "there are 20 or more, as the recipe measures it (dropout active) and in "
        "evaluation mode (eval), as is the loss, if recorded. An "
        "ablation named like a final shows its first 20 epochs; those with other seeds "
        "were trained anew. A patch gain multiplies the initial weights of the patch "
        "embedding. MLP dropout is that of the exercise; the section on trials "
        "explains the other names. {#table-1}",
    )


def _seeds(runs):
    ends = [(run["val_accs"][-1], run["val_accs_eval"][-1]) for run in runs]
    rows = [
        [run["seed"], *_percents(end), first_epoch_at(run["val_accs"], 0.7) or "never"]
        for run, end in zip(runs, ends, strict=True)
    ]
    for name, of in (("mean", statistics.mean), ("spread", statistics.stdev)):
        rows.append([name, *_percents(map(of, zip(*ends, strict=True))), ""])
    return _table(
        "seed, recipe / %, eval / %, 70 % by the recipe in epoch",
        rows,
        f"**Table 2.** Quick runs ({runs[0]['n_epochs']} epochs, batch size "
        f"{runs[0]['batch_size']}, learning rate {runs[0]['lr']:g}) that differ in the "
        "seed: accuracy on the 10,000 test images after the last epoch. The spread is "
        "the sample standard deviation. {#table-2}",
    )


def _percents(accuracies):
    return [f"{100 * accuracy:.2f}" for accuracy in accuracies]


def _table(header, rows, caption):
    header = header.split(", ")
    lines = [header, ["---"] * len(header), *rows]
    lines = [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join([*lines, "", f": {caption}"])
