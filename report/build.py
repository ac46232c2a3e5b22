"""The commands that execute notebooks and make reports from them.

Only the finished run that is handed in may change the tracked notebooks and the report:
the default run, recorded in ``report/run``, or while there is none the quick one, in
``report/quick``. Everything else is written below ``build/``. The exception is
``store_notebooks``, for whoever edits the scripts.
"""

import json
import shutil
import time
from pathlib import Path

import nbformat
import torch
from torchvision.datasets import CIFAR10

from report import notebooks
from report.pdf import (
    find_picture,
    hours_of,
    make_pdf,
    make_picture,
    use_system_fonts,
)
from training import (
    ARCHIVE_MD5,
    DEFAULTS,
    HISTORY_NAME,
    PRESETS,
    RECORD_FOLDERS,
    Run,
    TrainingError,
    fetch,
    finished,
    handed_in,
    is_present,
    read_history,
    write_whole,
)

ATTENTION = Path("attention.ipynb")
TRANSFORMER = Path("vision_transformer.ipynb")
BUILD = Path("build")
README = Path("README.md")
COSTS = Path("report", "costs.json")
FIRST_PAGE = Path("report", "first-page.png")
CURVE = Path("report", "accuracy.svg")
SPEED = Path("bench", "speed.json")
ATTENTION_SECONDS = 600  # a cell that takes longer hangs
LIVE, RECORDED = "executed live", "outputs as recorded"

DEMO_SETTINGS = {"dataset": "DemoCIFAR10", "batch_size": 32, "n_epochs": 3}
DEMO_CELL = """\
# DEMO DATA, generated, instead of CIFAR-10: see report/demo.py
from report.demo import DemoCIFAR10 as CIFAR10

BATCH_SIZE, N_EPOCHS, TRAIN = {batch_size}, {n_epochs}, True
DATASET_CACHE_DIR = "build/demo"\
"""
RUN_CELL = """\
# Set on the command line
BATCH_SIZE, LR, N_EPOCHS, TRAIN = {batch_size}, {lr!r}, {n_epochs}, True\
"""


def _announce(what):
    print(f"{what} ...", flush=True)
    return time.perf_counter()


def _done(start):
    print(f"  done in {time.perf_counter() - start:.0f} s", flush=True)


def _execute(path, injected=None, timeout=None):
    """Build a notebook from its script, execute it, and return it."""
    start = _announce(f"Executing {path}")
    notebook = notebooks.read_script(path.with_suffix(".py"))
    if injected:
        notebooks.inject(notebook, injected)
    notebooks.execute(notebook, path.name, Path.cwd(), timeout)
    _done(start)
    return notebook


def _run(settings):
    return Run(device=torch.device("cpu"), **settings)


def _has_record(settings):
    return _run(settings).find_record()[1] is not None


def _show_record(notebook, settings):
    """Note in an executed notebook which record it shows."""
    history = _run(settings).record_folder / HISTORY_NAME
    notebook.metadata["provenance"]["record"] = notebooks.checksum(history)


def _provenance(how):
    """Describe how each notebook came by its outputs: rows for the first page."""
    rows = []
    for path, (notebook, way) in how.items():
        facts = notebook.metadata.get("provenance", {})
        if facts:
            way += (
                f" on {facts['executed']}: {facts['system']}, Python "
                f"{facts['python']}, torch {facts['torch']}"
            )
        rows.append([path.name, way])
    return rows


def _make_report(how, settings, student, folder, target, demo=False):
    """Store notebooks in a folder, and make the PDF of them."""
    stored = [folder / path.name for path in how]
    for path, (notebook, way) in zip(stored, how.values(), strict=True):
        if way == LIVE or folder != Path():
            notebooks.store(notebook, path)
    start = _announce(f"Making {target.as_posix()}")
    run = _run(settings)
    history = run.record_folder / HISTORY_NAME
    rows = _provenance(how)
    rows.append(["training", _training_row(run, history)])
    rows.append(["data set", _data_row(demo)])
    make_pdf(stored, history, student, rows, target, demo=demo)
    _done(start)
    if student.is_placeholder:
        print("It is a DRAFT: fill in report/student.toml, or give SURNAME= and")
        print("MATRICULATION=, to get one that can be handed in.")


def _training_row(run, history):
    """Describe the run that the report shows, in one line."""
    if not history.is_file():
        return "no finished run is recorded"
    facts = read_history(history)
    return (
        f"{facts['dataset']}, batch size {facts['batch_size']}, learning rate "
        f"{facts['lr']:g}, {facts['n_epochs']} epochs, seed {facts['seed']}: "
        f"{finished(facts)}, {facts['machine']}, torch {facts['versions']['torch']}"
    )


def _data_row(demo):
    """Describe the data set that is at hand, in one line."""
    if demo:
        return "generated images, see report/demo.py"
    if is_present(CIFAR10, "data"):
        return f"CIFAR-10, all files intact; MD5 of the archive: {ARCHIVE_MD5}"
    return "not at hand when the report was made"


def report(settings, student):
    """Execute both notebooks and make the PDF.

    The run with these settings is trained, or continued, when there is no record of it.
    Without the data set the Vision Transformer's outputs are taken as they are stored.

    Args:
        settings: as the attribute ``settings`` of ``training.Run``.
        student: a ``Student``.

    Raises:
        NotebookError: a cell failed.
        TrainingError: a record or checkpoint does not fit.
        PdfError: the report could not be typeset.
    """
    use_system_fonts(student)  # a name that cannot be printed is refused at once
    trained = _has_record(settings)
    how = {ATTENTION: (_execute(ATTENTION, timeout=ATTENTION_SECONDS), LIVE)}
    try:
        fetch(CIFAR10, "data")
    except TrainingError as error:
        print(f"{error}\n")
        how[TRANSFORMER] = _recorded_outputs()
        settings = PRESETS[handed_in()]
    else:
        if not trained:
            print(
                "There is no record of this run, so it is trained, or continued: "
                f"{settings['n_epochs']} epochs, batch size {settings['batch_size']}, "
                f"learning rate {settings['lr']:g}."
            )
        executed = None
        if not trained or settings != PRESETS[handed_in()]:
            executed = _execute(TRANSFORMER, RUN_CELL.format(**settings))
        if settings == PRESETS[handed_in()]:
            if executed and settings == DEFAULTS:
                notebooks.remove_injected(executed)  # it set what was set already
            else:
                executed = _execute(TRANSFORMER)  # the code that is handed in
        _show_record(executed, settings)
        how[TRANSFORMER] = executed, LIVE

    live = how[TRANSFORMER][1] == LIVE
    if settings == PRESETS[handed_in()] and _has_record(settings):
        folder, target = Path(), Path("report", f"{student.stem}.pdf")
    else:
        folder = BUILD / "report" / (_run(settings).folder.name if live else "no-data")
        target = folder / f"{student.stem}.pdf"
        print(f"This is not the run that is handed in: all of it is below {folder}.")
    _make_report(how, settings, student, folder, target)


def _recorded_outputs():
    """Return the stored Vision Transformer notebook, and how that is to be called."""
    if not TRANSFORMER.is_file():
        raise TrainingError(f"{TRANSFORMER} is missing, too: restore it")
    print(f"Without the data, {TRANSFORMER} is taken with the outputs it has.")
    way = RECORDED
    if notebooks.differences(TRANSFORMER.with_suffix(".py"), TRANSFORMER):
        way += f" and code older than {TRANSFORMER.stem}.py;"
        print(
            f"Mind that {TRANSFORMER.stem}.py has changed since: it shows older code."
        )
    return nbformat.read(TRANSFORMER, as_version=4), way


def store_notebooks():
    """Execute both notebooks as they are, without training, and store them.

    For whoever edits text or figures: the tracked outputs follow the scripts.

    Raises:
        NotebookError: a cell failed; neither notebook is changed.
        TrainingError: there is a record, but not the data to validate it again.
    """
    shown = PRESETS[handed_in()]
    if _has_record(shown):
        fetch(CIFAR10, "data")
    executed = {
        ATTENTION: _execute(ATTENTION, timeout=ATTENTION_SECONDS),
        TRANSFORMER: _execute(TRANSFORMER),
    }
    _show_record(executed[TRANSFORMER], shown)
    for path, notebook in executed.items():
        notebooks.store(notebook, path)


def readme(student):
    """Renew what the README shows: first page, accuracy, runs, and what it all costs.

    Args:
        student: a ``Student``.
    """
    paths = [ATTENTION, TRANSFORMER]
    how = {path: (nbformat.read(path, as_version=4), LIVE) for path in paths}
    run = _run(PRESETS[handed_in()])
    history = run.record_folder / HISTORY_NAME
    rows = [*_provenance(how), ["training", _training_row(run, history)]]
    rows.append(["data set", _data_row(demo=False)])
    make_picture(paths, history, student, rows, FIRST_PAGE)
    curve = find_picture(how[TRANSFORMER][0], "fig-validation-accuracy")
    if curve:
        write_whole(CURVE, curve)
    else:
        CURVE.unlink(missing_ok=True)
    text = README.read_text(encoding="utf-8")
    write_whole(README, with_records(text).encode())


def with_records(readme):
    """Return the README's text with the tables that its records give.

    Each table stands between two marks, of which it replaces what is there.
    """
    costs = json.loads(COSTS.read_text(encoding="utf-8"))
    rows = ["| command | what it does | time | disk |", "|---|---|---|---|"]
    rows += [
        f"| `{entry['command']}` | {entry['what']} | {_duration(entry['seconds'])} | "
        f"{_size(entry['megabytes'])} |"
        for entry in costs["commands"]
    ]
    rows += ["", f"Measured on {costs['machine']}, {costs['date']}."]
    readme = _between(readme, "costs", rows)

    speed = json.loads(SPEED.read_text(encoding="utf-8"))
    rows = [
        "| | training step | inference | peak memory of a step |",
        "|---|---|---|---|",
    ]
    rows += [
        f"| {name} | {row['median']:.0f} ms | {speed['inference'][name]['median']:.0f} "
        f"ms | {speed['training_step_memory_mib'][name]:.0f} MiB |"
        for name, row in speed["training_step"].items()
    ]
    rows += ["", "| in short | |", "|---|---|"]
    rows += [f"| {name} | {value:.2f} |" for name, value in speed["summary"].items()]
    machine = speed["machine"]
    rows += [
        "",
        f"Medians of {speed['rounds']} interleaved rounds for training steps and of "
        f"{2 * speed['rounds']} for the rest, memory in a process of its own for each, "
        f"batch of {speed['batch_size']}, float32, on {machine['processor']} with "
        f"{machine['threads']} threads, torch {machine['torch']}, "
        f"{speed['date'][:10]}.",
    ]
    readme = _between(readme, "speed", rows)

    readme = _between(readme, "pictures", _pictures())

    rows = [
        "| run | validation accuracy by the recipe | `model.eval()` | 70 % in epoch | "
        "time |",
        "|---|---|---|---|---|",
        *(_run_row(name) for name in PRESETS),
    ]
    return _between(readme, "runs", rows)


def _pictures():
    """Return the README's lines that show the first page and the accuracy."""
    curve = CURVE.is_file()
    what = "title, identity, the table of the sheet's points with page and evidence, "
    what += "the accuracy curve, " * curve + "and what was executed where and when"
    lines = [
        f'<img src="{FIRST_PAGE.as_posix()}" alt="First page of the report: {what}" '
        'width="420">'
    ]
    if curve:
        s = PRESETS[handed_in()]
        lines += [
            "",
            f'<img src="{CURVE.as_posix()}" alt="Validation accuracy in percent '
            "against epochs, as the recipe measures it and in evaluation mode, with "
            'marks at 25, 50 and 70 percent" width="480">',
            "",
            f"The recorded {handed_in()} run: {s['n_epochs']} epochs, batches of "
            f"{s['batch_size']}, learning rate {s['lr']:g}.",
        ]
    return lines


def _run_row(preset):
    """Return the row of the README's table on the recorded run of a preset."""
    s = PRESETS[preset]
    name = f"{preset}: {s['n_epochs']} epochs, batches of {s['batch_size']}"
    path = RECORD_FOLDERS[preset] / HISTORY_NAME
    if not path.is_file():
        return f"| {name} | not recorded yet | | | |"
    history = read_history(path)
    recipe, evaluated = history["val_accs"], history["val_accs_eval"]
    reached = [epoch for epoch, acc in enumerate(recipe, 1) if acc >= 0.7]
    return (
        f"| {name} | {100 * recipe[-1]:.2f} % | {100 * evaluated[-1]:.2f} % | "
        f"{reached[0] if reached else 'not reached'} | {hours_of(history):.1f} h on "
        f"{history['machine']} |"
    )


def _between(text, name, lines):
    """Return a text with what stands between the marks of a table replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    return "\n".join([before + begin, "", *lines, "", end + rest.partition(end)[2]])


def _duration(seconds):
    if seconds is None:
        return ""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _size(megabytes):
    if megabytes is None:
        return ""
    return f"{megabytes} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"


def demo(student):
    """Execute both notebooks on generated data, and make a PDF that says so.

    Args:
        student: a ``Student``.

    Raises:
        NotebookError: a cell failed.
        PdfError: the report could not be typeset.
    """
    use_system_fonts(student)
    settings = {**DEFAULTS, **DEMO_SETTINGS}
    shutil.rmtree(_run(settings).folder, ignore_errors=True)  # everything live
    how = {
        ATTENTION: (_execute(ATTENTION, timeout=ATTENTION_SECONDS), LIVE),
        TRANSFORMER: (_execute(TRANSFORMER, DEMO_CELL.format(**settings)), LIVE),
    }
    folder = BUILD / "demo"
    target = folder / f"DEMO-{student.stem}.pdf"
    _make_report(how, settings, student, folder, target, demo=True)
