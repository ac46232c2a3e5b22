"""From executed notebooks to the PDF: nbconvert's Markdown, pandoc, Typst."""

import base64
import contextlib
import datetime
import json
import re
import shutil
import tempfile
from pathlib import Path

import nbformat
import pypandoc
import typst
from nbconvert import MarkdownExporter

from report.notebooks import read_notebook
from report.sync import provenance
from report.tables import FIGURE, origin, points, trials
from support.records import UserError, write_whole

HERE = Path(__file__).parent
ROOT = HERE.parent
# Complete, in the appendix
LISTINGS = (
    *(f"support/{name}.py" for name in ("figures", "records", "training", "dataset")),
    "train.py",
)
IMAGE_TYPES = {"image/svg+xml": "svg", "image/png": "png"}


def use_system_fonts(student):
    """Return whether the fonts that come with Typst lack letters of a name.

    Raises:
        UserError: the fonts of this machine lack them, too.
    """
    name = f"{student.given_name} {student.surname}"
    source = f'#set document(title: "x")\n#{json.dumps(name, ensure_ascii=False)}'
    for system in (False, True):
        with contextlib.suppress(typst.TypstError):
            typst.compile(
                source.encode(), ignore_system_fonts=not system, pdf_standards=["ua-1"]
            )
            return system
    raise UserError(
        f"no font on this machine has all letters of {name!r}: install one, for "
        "example Noto Sans of that script, or give the name in Latin letters"
    )


def make_pdf(submission):
    """Make the PDF of a ``Submission`` from its stored notebooks."""
    notebooks = [read_notebook(path) for path in submission.notebooks]
    tables = trials()
    labels = {f"figure-{number}" for book in notebooks for number in _drawn(book)}
    labels |= set(re.findall(r"\{#(table-\d+)\}", tables))
    facts = _facts(submission, notebooks)
    system_fonts = use_system_fonts(submission.student)
    year, month, day = facts["date"]
    midnight = datetime.datetime(year, month, day, tzinfo=datetime.timezone.utc)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("template.typ", "references.bib"):
            shutil.copy(HERE / name, folder)
        body, code = [], []
        for path, notebook in zip(submission.notebooks, notebooks, strict=True):
            text, left_out = to_markdown(notebook, folder, path.stem, labels)
            body.append(text)
            code.append(_listing(f"{path.name}: the cells left out above", left_out))
        for name in LISTINGS:
            code.append(_listing(name, [(ROOT / name).read_text(encoding="utf-8")]))
        try:
            for name, parts in (("body", body), ("trials", [tables]), ("code", code)):
                typeset = to_typst("\n\n".join(parts))
                (folder / f"{name}.typ").write_text(typeset, encoding="utf-8")
            (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
            content = typst.compile(
                str(folder / "template.typ"),
                root=str(folder),
                ignore_system_fonts=not system_fonts,
                timestamp=int(midnight.timestamp()),
                pdf_standards=["ua-1"],
            )
        except (RuntimeError, typst.TypstError) as error:
            raise UserError(f"the report could not be typeset: {error}") from error
    write_whole(submission.pdf, content)


def _facts(submission, notebooks):
    """Return what the template shows besides the notebooks."""
    who = submission.student
    days = [provenance(book).get("executed") for book in notebooks]
    latest = max(filter(None, days), default=submission.history["date"])[:10]
    return {
        "surname": who.surname,
        "given_name": who.given_name,
        "matriculation_number": who.matriculation_number,
        "draft": who.is_placeholder,
        "demo": submission.demo,
        "date": [int(part) for part in latest.split("-")],
        "provenance": origin(submission, notebooks),
        "points": points(notebooks, submission.history),
    }


# --- Notebooks ------------------------------------------------------------------------


def to_markdown(notebook, folder, prefix, labels):
    """Turn an executed notebook into pandoc's Markdown.

    A caption and the picture that the code cell before it drew become a figure; without
    a picture it is left out. Of a code cell tagged ``appendix`` only the outputs stay.
    Pictures are written into ``folder``, and their names begin with ``prefix``; what
    the text says of figures and tables in ``labels`` becomes a link. Returns the text,
    and the sources of the cells tagged ``appendix``.
    """
    drawn = _drawn(notebook)
    cells, left_out, captioned = [], [], list(map(id, drawn.values()))
    for cell in notebook.cells:
        cell = cell.copy()
        if cell.cell_type == "code":
            cell["outputs"] = [out for out in cell.outputs if id(out) not in captioned]
            if "appendix" in cell.metadata.get("tags", []):
                left_out.append(cell.source)
                cell["metadata"] = {"transient": {"remove_source": True}}
        elif cell.cell_type == "markdown":
            caption = FIGURE.match(cell.source)
            if caption and caption[1] not in drawn:
                continue
            source = re.sub(r"(?<=\d)\s%", "\u00a0%", cell.source)  # in one line
            cell["source"] = _with_links(source, labels)
            if caption:
                extension, content = _picture(drawn[caption[1]])
                path = folder / f"{prefix}-{caption[1]}.{extension}"
                path.write_bytes(content)
                cell["source"] = _figure(cell.source, path.name, caption[1])
        cells.append(cell)
    reduced = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
    text, made = MarkdownExporter().from_notebook_node(reduced, {"unique_key": prefix})
    for name, content in made["outputs"].items():  # pictures without a caption
        (folder / name).write_bytes(content)
    return text, left_out


def _drawn(notebook):
    """Return the outputs with pictures that have a caption, by the number it gives."""
    found, pictures = {}, []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            pictures = list(filter(_picture, cell.outputs))
        elif FIGURE.match(cell.source) and pictures:
            found[FIGURE.match(cell.source)[1]] = pictures[-1]
    return found


def _picture(output):
    """Return the picture in an output as (extension, bytes), or None."""
    for kind, extension in IMAGE_TYPES.items():
        content = output.get("data", {}).get(kind)
        if content:
            binary = extension == "png"
            return extension, base64.b64decode(content) if binary else content.encode()
    return None


def _with_links(text, labels):
    """Make links of what a text says of figures and tables that are there."""

    def link(found):
        label = f"{found['kind'].lower()}-{found['number']}"
        return f"[{found[0]}](#{label})" if label in labels else found[0]

    name = r"(?<!\*\*)\b(?P<kind>Figure|Table)s?\s+(?P<number>\d+)\b"
    return re.sub(name, link, text)


def _figure(caption, file_name, number):
    """Return a caption cell and its picture as a figure in pandoc's Markdown."""
    alt = re.search(r"<!--\s*alt:(.*?)-->", caption, re.DOTALL)
    text = " ".join(re.sub(r"<!--.*?-->", "", caption, flags=re.DOTALL).split())
    words = " ".join((alt[1] if alt else text).split()).replace('"', "'")
    return f'![{text}]({file_name}){{#figure-{number} alt="{words}"}}'


def _listing(title, sources):
    """Return code under a heading."""
    code = "\n\n".join(source.rstrip() for source in sources)
    return f"## {title}\n\n~~~~~python\n{code}\n~~~~~"


def to_typst(text):
    """Convert pandoc's Markdown to Typst."""
    return pypandoc.convert_text(
        text,
        to="typst",
        format="markdown-auto_identifiers-citations",
        extra_args=[f"--lua-filter={HERE / 'filter.lua'}", "--wrap=none"],
    )
