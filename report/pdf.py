"""From executed notebooks to the PDF: nbconvert's Markdown, pandoc, Typst."""

import base64
import contextlib
import datetime
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

import nbformat
import pypandoc
import pypdf
import typst
from nbconvert import MarkdownExporter

from training import write_whole

HERE = Path(__file__).parent
SOURCES = ("template.typ", "filter.lua", "references.bib", "pdf.py")
SPEED = HERE.parent / "bench" / "speed.json"
GROWTH = HERE.parent / "bench" / "growth.svg"
IMAGE_TYPES = {"image/svg+xml": "svg", "image/png": "png"}
DEMO_KEYWORD = "demo data"
DRAFT_KEYWORD = "draft"


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
    sources = [HERE / name for name in SOURCES]
    for path in [*notebooks, history, SPEED, GROWTH, *sources]:
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
        "keywords": [*kinds, fingerprint(notebooks, history, student)],
    }


def _typeset(notebooks, facts, **options):
    """Return what Typst makes of executed notebooks and the facts of the first page."""
    loaded = [nbformat.read(path, as_version=4) for path in notebooks]
    year, month, day = facts["date"] = _date_of(loaded)
    midnight = datetime.datetime(year, month, day, tzinfo=datetime.timezone.utc)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in SOURCES:
            shutil.copy(HERE / name, folder)
        if facts["speed"]:
            shutil.copy(GROWTH, folder)
        (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        parts = [
            to_markdown(notebook, folder, prefix=path.stem)
            for path, notebook in zip(notebooks, loaded, strict=True)
        ]
        try:
            body = pypandoc.convert_text(
                "\n\n".join(parts),
                to="typst",
                format="markdown-auto_identifiers-citations",
                extra_args=[f"--lua-filter={HERE / 'filter.lua'}", "--wrap=none"],
            )
            # pandoc makes figures of tables; one without a caption takes no number
            body = body.replace(", kind: table\n", ", kind: table, numbering: none\n")
            (folder / "body.typ").write_text(body, encoding="utf-8")
            return typst.compile(
                str(folder / "template.typ"),
                root=str(folder),
                ignore_system_fonts=not facts["system_fonts"],
                timestamp=int(midnight.timestamp()),
                **options,
            )
        except (RuntimeError, typst.TypstError) as error:
            raise PdfError(f"the report could not be typeset: {error}") from error


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
    which a notebook does not show. A caption without a picture is left out.

    Args:
        notebook: the notebook; left as it is.
        folder: where the pictures are written.
        prefix: what their names begin with.

    Returns:
        The Markdown text.
    """
    cells, picture = [], None
    for number, cell in enumerate(notebook.cells, 1):
        cell = cell.copy()
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "raw" and "active-py" in tags:
            cell = nbformat.v4.new_code_cell(cell.source)
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
    return text


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
