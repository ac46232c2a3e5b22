"""The tables of the first page: the points, and what was made where and when."""

import math
import re
import statistics

from torchvision.datasets import CIFAR10

from report.course import executed
from report.sync import edited_since, provenance
from support.dataset import ARCHIVE_MD5, is_present
from support.records import describe, finished, first_epoch_at

RECIPE = "BATCH_SIZE to train_run"
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


def printed(notebooks):
    """Return what the cells printed, and the Markdown that they showed."""
    cells = [cell for notebook in notebooks for cell in notebook.cells]
    found = [output for cell in cells for output in cell.get("outputs", [])]
    shown = (o.get("text") or o.get("data", {}).get("text/markdown") for o in found)
    return "\n".join(filter(None, shown))


def points(printed, history):
    """Return the rows of the table of points, the evidence read from what was run."""
    passed = dict(re.findall(r"^passed  ([\w ]+): (.*)$", printed, re.MULTILINE))
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
            evidence = f"{first}; {last}".replace("%", " %")
        row = {"what": what, "points": number, "code": code, "proof": proof}
        rows.append({**row, "evidence": evidence})
    return rows


def result(printed, history):
    """Return the sentences that stand first: what was reached, and how sure that is."""
    scatter = re.search(r"^\| standard deviation \| ([\d.]+)", printed, re.MULTILINE)
    seeds = "; shorter runs that differ in the seed have a standard deviation"
    seeds = f"{seeds} of {scatter[1]} points (recipe)" if scatter else ""
    recipe, evaluated = history["val_accs"], history["val_accs_eval"]
    first = first_epoch_at(recipe, 0.7)
    reached = f"first reached in epoch {first}" if first else "not reached"
    error = 100 * math.sqrt(recipe[-1] * (1 - recipe[-1]) / 10_000)
    return (
        f"After {len(recipe)} epochs the model classifies {recipe[-1]:.2%} of the test "
        f"images correctly by the recipe, which validates with dropout active, and "
        f"{evaluated[-1]:.2%} with model.eval(). By the recipe, 70% was {reached}. The "
        f"means of the last ten epochs are {statistics.mean(recipe[-10:]):.1%} by the "
        f"recipe and {statistics.mean(evaluated[-10:]):.1%} with model.eval(). Each "
        f"accuracy has a standard error of {error:.1f} points, from 10,000 images. "
        f"The run has one seed{seeds}."
    ).replace("%", "\u00a0%")


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
    for path, facts in executed():
        what = f"unchanged but for {facts['changed']}: all its cells passed"
        rows.append([f"the course's {path.name}", f"{what} on {facts['executed']}"])
    history = submission.history
    data = "not at hand when the report was made"
    if submission.demo:
        data = "generated images, see support/demo_data.py"
    elif is_present(CIFAR10, "data"):
        data = f"CIFAR-10, all files intact; MD5 of the archive: {ARCHIVE_MD5}"
    run = (
        f"{describe(history)}: finished on {finished(history)}, {history['machine']}, "
        f"torch {history['versions']['torch']}"
    )
    return [*rows, ["training", run], ["data set", data]]
