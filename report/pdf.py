"""From executed notebooks to the PDF: nbconvert's Markdown, pandoc, Typst."""

import base64
import contextlib
import datetime
import hashlib
import json
import re
import shutil
import statistics
import tempfile
from pathlib import Path

import nbformat
import pypandoc
import pypdf
import typst
from nbconvert import MarkdownExporter

from training import HISTORY_NAME, RECORD_FOLDERS, read_history, write_whole

HERE = Path(__file__).parent
SOURCES = ("template.typ", "filter.lua", "references.bib", "pdf.py")
LISTINGS = (HERE.parent / "analysis.py", HERE.parent / "training.py")
SPEED = HERE.parent / "bench" / "speed.json"
GROWTH = HERE.parent / "bench" / "growth.svg"
TRIALS = HERE.parent / "bench" / "trials"
ABLATION = HERE.parent / "bench" / "ablation.svg"
QUICK_HISTORY = HERE.parent / RECORD_FOLDERS["quick"] / HISTORY_NAME
IMAGE_TYPES = {"image/svg+xml": "svg", "image/png": "png"}
DEMO_KEYWORD = "demo data"
DRAFT_KEYWORD = "draft"
TO_APPENDIX = (
    "`#link(<app-code>)[The code of this section stands in the appendix.]`{=typst}"
)


# The sheet's 20 points: what, points, section or figure of the report, and the unit
# test, or the mark of validation accuracy, that is the evidence
POINTS = (
    ("Task 1: modules in __init__", 1, "The layer", "multi head"),
    ("Task 1: single head", 3, "Unit tests", "single head"),
    ("Task 1: several heads", 2, "Unit tests", "multi head"),
    ("Task 2: FeedForwardBlock", 1, "The building blocks", "dropout"),
    ("Task 2: transformer block", 2, "The building blocks", "block"),
    ("Task 2: __init__", 2, "The Vision Transformer", "parameter count"),
    ("Task 2: patchify", 2, "The Vision Transformer", "patch order"),
    ("Task 2: forward", 1, "The Vision Transformer", "class token"),
    ("Task 2: 25 % validation accuracy", 2, "fig-validation-accuracy", 0.25),
    ("Task 2: 50 % validation accuracy", 2, "fig-validation-accuracy", 0.5),
    ("Task 2: 70 % validation accuracy", 2, "fig-validation-accuracy", 0.7),
)


class PdfError(RuntimeError):
    """A report that could not be made; the message says why."""


def fingerprint(notebooks, history, student):
    """Return what a report depends on, as hexadecimal digits.

    It stands in the PDF, so that a PDF can be told from an outdated one by its content.

    Args:
        notebooks: paths of the executed notebooks.
        history: path of the run's ``history.json``; it need not exist.
        student: a ``Student``.
    """
    identity = student.surname, student.given_name, student.matriculation_number
    digest = hashlib.sha256(repr(identity).encode())
    records = [SPEED, GROWTH, *sorted(TRIALS.glob("*.json")), ABLATION, QUICK_HISTORY]
    sources = [HERE / name for name in SOURCES]
    for path in [*notebooks, history, *records, *LISTINGS, *sources]:
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def keywords(pdf):
    """Return the keywords of a PDF as a list; empty if it has none."""
    try:
        metadata = pypdf.PdfReader(pdf).metadata
    except (OSError, pypdf.errors.PyPdfError):
        return []
    return re.split(r"[,;]\s*", (metadata or {}).get("/Keywords", ""))


def make_pdf(notebooks, history, student, provenance, target, demo=False):
    """Make the report.

    Args:
        notebooks: paths of the executed notebooks, in the order of the sections.
        history: path of the run's ``history.json``; it need not exist.
        student: a ``Student``.
        provenance: pairs (what, how), rows of the table on the first page.
        target: path of the PDF.
        demo: whether something else than CIFAR-10 was trained on.

    Raises:
        PdfError: pandoc or Typst refused what they were given.
    """
    facts = _facts(notebooks, history, student, provenance, demo)
    write_whole(target, _typeset(notebooks, facts, pdf_standards=["ua-1"]))


def make_picture(notebooks, history, student, provenance, target):
    """Draw the first page of the report as a PNG; arguments as for ``make_pdf``."""
    facts = _facts(notebooks, history, student, provenance, demo=False)
    write_whole(target, _typeset(notebooks, facts, format="png", ppi=90)[0])


def use_system_fonts(student):
    """Return whether the fonts that come with Typst lack letters of a name.

    Args:
        student: a ``Student``.

    Raises:
        PdfError: the fonts of this machine lack them, too.
    """
    name = f"{student.given_name} {student.surname}"
    for system in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "name.txt").write_text(name, encoding="utf-8")
            page = Path(folder) / "name.typ"
            page.write_text(
                '#set document(title: "x")\n#read("name.txt")', encoding="utf-8"
            )
            with contextlib.suppress(typst.TypstError):
                typst.compile(
                    str(page), ignore_system_fonts=not system, pdf_standards=["ua-1"]
                )
                return system
    raise PdfError(
        f"no font on this machine has all letters of {name!r}: install one, for "
        "example Noto Sans of that script, or give the name in Latin letters"
    )


def _facts(notebooks, history, student, provenance, demo):
    """Return what the first page shows."""
    has_speed = SPEED.is_file() and GROWTH.is_file()
    kinds = [DEMO_KEYWORD] * demo + [DRAFT_KEYWORD] * student.is_placeholder
    return {
        "student": {
            "surname": student.surname,
            "given_name": student.given_name,
            "matriculation_number": student.matriculation_number,
        },
        "provenance": provenance,
        "draft": student.is_placeholder,
        "demo": demo,
        "system_fonts": use_system_fonts(student),
        "speed": json.loads(SPEED.read_text(encoding="utf-8")) if has_speed else None,
        "trials": _trials(),
        "seeds": _seeds(),
        "keywords": [*kinds, fingerprint(notebooks, history, student)],
        "points": _points([nbformat.read(n, as_version=4) for n in notebooks], history),
        "curve": None,
    }


def _points(notebooks, history):
    """Return the rows of the table of points, the evidence read from what was run.

    Args:
        notebooks: the executed notebooks.
        history: path of the run's ``history.json``; it need not exist.

    Returns:
        Dicts with the keys ``what``, ``points``, ``place`` and ``evidence``.
    """
    printed = "\n".join(
        output.get("text", "")
        for notebook in notebooks
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    passed = dict(re.findall(r"^passed  ([\w ]+): (.*)$", printed, re.MULTILINE))
    accuracies = read_history(history)["val_accs"] if history.is_file() else []
    rows = []
    for what, points, place, proof in POINTS:
        if isinstance(proof, str):
            evidence = f"{proof}: {passed[proof]}" if proof in passed else ""
        else:
            epochs = [n for n, acc in enumerate(accuracies, 1) if acc >= proof]
            evidence = ""
            if epochs:
                reached = (
                    f"{100 * accuracies[epochs[0] - 1]:.1f} % in epoch {epochs[0]}"
                )
                best = f"{100 * accuracies[-1]:.1f} % in the last of {len(accuracies)}"
                evidence = f"{reached}, {best}"
        rows.append(
            {
                "what": what,
                "points": points,
                "place": place,
                "evidence": evidence or "not shown: there is no record of it",
            }
        )
    return rows


def _percent(accuracy):
    return f"{100 * accuracy:.2f}"


def _trials():
    """Return the rows of the table of trials, by group, the best of each first.

    The model as it is handed in stands among the ablations, too, to compare them with.
    """
    records = [
        json.loads(path.read_text(encoding="utf-8")) for path in TRIALS.glob("*.json")
    ]
    trials = [record for record in records if "held_out_accs" in record]
    if any(record["group"] == "ablation" for record in trials):
        trials += [
            {**record, "group": "ablation", "name": "as handed in"}
            for record in trials
            if (record["group"], record["make"]) == ("init", "default")
        ]
    trials.sort(key=lambda record: (-record["held_out_accs"][-1], record["name"]))
    rows = {}
    for record in trials:
        rows.setdefault(record["group"], []).append(
            {
                "name": record["name"],
                "batch": str(record["batch_size"]),
                "lr": f"{record['lr']:g}",
                "data": f"{record['epochs']} x {record['images']:,}",
                "recipe": _percent(record["held_out_accs"][-1]),
                "eval": _percent(record["held_out_accs_eval"][-1]),
            }
        )
    return rows


def _seeds():
    """Return the rows of the table of quick runs, one per seed, and what they share."""
    runs = [read_history(QUICK_HISTORY)] if QUICK_HISTORY.is_file() else []
    runs += [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(TRIALS.glob("seeds-*.json"))
    ]
    if not runs:
        return None
    rows = []
    for run in runs:
        epochs = [n for n, accuracy in enumerate(run["val_accs"], 1) if accuracy >= 0.7]
        last = run["val_accs"][-1], run["val_accs_eval"][-1]
        reached = str(epochs[0]) if epochs else "not reached"
        rows.append([str(run["seed"]), *map(_percent, last), reached])
    if len(runs) > 1:
        for name, what in (("mean", statistics.mean), ("spread", statistics.stdev)):
            last = [
                what(run[key][-1] for run in runs)
                for key in ("val_accs", "val_accs_eval")
            ]
            rows.append([name, *map(_percent, last), ""])
    shared = runs[0]
    return {
        "rows": rows,
        "runs": len(runs),
        "passed": sum(run["val_accs"][-1] >= 0.7 for run in runs),
        "epochs": shared["n_epochs"],
        "batch": shared["batch_size"],
        "lr": f"{shared['lr']:g}",
        "hours": f"{hours_of(shared):.1f}",
        "machine": shared["machine"],
    }


def hours_of(history):
    """Return how long a run takes, whatever one epoch in a sleeping machine took."""
    seconds = history["epoch_seconds"]
    return len(seconds) * statistics.median(seconds) / 3600


def _typeset(notebooks, facts, **options):
    """Return what Typst makes of executed notebooks and the facts of the first page."""
    loaded = [nbformat.read(path, as_version=4) for path in notebooks]
    year, month, day = facts["date"] = _date_of(loaded)
    midnight = datetime.datetime(year, month, day, tzinfo=datetime.timezone.utc)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in SOURCES:
            shutil.copy(HERE / name, folder)
        for path in (GROWTH, ABLATION):
            if path.is_file():
                shutil.copy(path, folder)
        body, code = [], ["# Appendix: Code {#app-code}"]
        for path, notebook in zip(notebooks, loaded, strict=True):
            text, rest = to_markdown(notebook, folder, prefix=path.stem)
            body.append(text)
            code += [f"## {path.name}, the cells left out above", *map(_listing, rest)]
        for path in LISTINGS:
            code += [f"## {path.name}", _listing(path.read_text(encoding="utf-8"))]
        curve = re.search(r"\((\S+)\)\{#fig-validation-accuracy ", body[-1])
        if curve:
            facts["curve"] = curve[1]
        try:
            for name, parts in (("body.typ", body), ("code.typ", code)):
                text = _to_typst("\n\n".join(parts))
                (folder / name).write_text(text, encoding="utf-8")
            (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
            return typst.compile(
                str(folder / "template.typ"),
                root=str(folder),
                ignore_system_fonts=not facts["system_fonts"],
                timestamp=int(midnight.timestamp()),
                **options,
            )
        except (RuntimeError, typst.TypstError) as error:
            raise PdfError(f"the report could not be typeset: {error}") from error


def _to_typst(text):
    """Convert pandoc's Markdown to Typst."""
    text = pypandoc.convert_text(
        text,
        to="typst",
        format="markdown-auto_identifiers-citations",
        extra_args=[f"--lua-filter={HERE / 'filter.lua'}", "--wrap=none"],
    )
    # pandoc makes figures of tables; one without a caption takes no number
    return text.replace(", kind: table\n", ", kind: table, numbering: none\n")


def _listing(source):
    """Return Python code as a block of Markdown."""
    return f"~~~~~python\n{source.rstrip()}\n~~~~~"


def _date_of(notebooks):
    """Return the latest day of execution as [year, month, day]."""
    days = [
        n.metadata.get("provenance", {}).get("executed", "")[:10] for n in notebooks
    ]
    return [int(part) for part in (max(days) or "2024-07-05").split("-")]


def to_markdown(notebook, folder, prefix):
    """Turn an executed notebook into pandoc's Markdown.

    A Markdown cell tagged ``caption`` belongs to the picture right before it: the two
    become a numbered figure. It may name a label and an alternative text in comments,
    which a notebook does not show. A caption without a picture is left out. A code
    cell tagged ``appendix`` gives way to a link to the appendix, once in a section;
    what it printed and drew stays.

    Args:
        notebook: the notebook; left as it is.
        folder: where the pictures are written.
        prefix: what their names begin with.

    Returns:
        The Markdown text, and the sources of the cells for the appendix.
    """
    cells, picture, appendix, is_linked = [], None, [], False
    for number, cell in enumerate(notebook.cells, 1):
        cell = cell.copy()
        tags = cell.metadata.get("tags", [])
        if "appendix" in tags:
            appendix.append(cell.source)
            cell["metadata"] = {**cell.metadata, "transient": {"remove_source": True}}
            if not is_linked:
                cells.append(nbformat.v4.new_markdown_cell(TO_APPENDIX))
            is_linked = True
        elif cell.cell_type == "markdown" and cell.source.startswith("#"):
            is_linked = False
        if cell.cell_type == "code":
            picture, cell["outputs"] = _take_picture(cell.outputs)
        elif "caption" in tags:
            if picture is None:
                continue
            extension, content = picture
            path = folder / f"{prefix}-{number}.{extension}"
            path.write_bytes(content)
            cell["source"] = _figure(cell.source, path.name)
        if cell.cell_type != "raw":
            cells.append(cell)
    reduced = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
    text, _ = MarkdownExporter().from_notebook_node(reduced)
    return text, appendix


def _take_picture(outputs):
    """Return the last picture among outputs, as (extension, bytes), and the rest."""
    picture, rest = None, []
    for output in outputs:
        data = output.get("data", {})
        kind = next((kind for kind in IMAGE_TYPES if kind in data), None)
        if kind is None:
            rest.append(output)
            continue
        content = data[kind]
        binary = kind == "image/png"
        content = base64.b64decode(content) if binary else content.encode()
        picture = IMAGE_TYPES[kind], content
    return picture, rest


def find_picture(notebook, label):
    """Return the content of the picture that a label names, or None.

    Args:
        notebook: an executed notebook.
        label: as in the comment of the caption, behind the picture.
    """
    picture = None
    for cell in notebook.cells:
        if cell.cell_type == "code":
            picture, _ = _take_picture(cell.outputs)
        elif re.search(rf"<!--\s*label:\s*{label}\s*-->", cell.source):
            return picture[1] if picture else None
    return None


def _figure(caption, file_name):
    """Return a caption cell and its picture as a figure in pandoc's Markdown."""
    comments = dict(
        re.findall(r"<!--\s*(label|alt):\s*(.*?)\s*-->", caption, re.DOTALL)
    )
    text = re.sub(r"<!--.*?-->", "", caption, flags=re.DOTALL)
    text = " ".join(text.replace("**Figure.**", "").split())
    alt = " ".join(comments.get("alt", text).split()).replace('"', "'")
    label = f"#{comments['label']} " if "label" in comments else ""
    return f'![{text}]({file_name}){{{label}alt="{alt}"}}'
