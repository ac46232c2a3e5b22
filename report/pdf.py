"""From executed notebooks to the PDF: Jupyter's HTML, pandoc, Typst."""

import datetime
import json
import re
import shutil
import tempfile
from pathlib import Path

import pypandoc
import typst

from report.cells import Cells, breakable, missing
from report.notebooks import read_notebook
from report.sync import LIBRARIES, provenance
from report.tables import origin, points, printed, result
from support.records import UserError, write_whole

HERE = Path(__file__).parent
ROOT = HERE.parent
LIBRARY = [path.as_posix() for path in LIBRARIES]
LISTINGS = (*LIBRARY, "train.py", "recipe_check.py")  # complete, in the appendix
WHERE = re.compile(r"^error:.*?┌─ [^\n]*?([^/\\\s]+)\.typ:", re.M | re.S)
MARK = re.compile(r"^// cell-of-notebook-c7b1 (\S+)$\n", re.MULTILINE)
STRING = r'"(?:[^"\\]|\\.)*"'
TEX = re.compile(rf'#raw\(lang: "tex", ({STRING})\)')
EQUATION = re.compile(
    rf"(#math\.equation\(block: \w+, alt: ({STRING}), \$(?:[^$\\]|\\.)*\$\))", re.S
)


def make_pdf(submission):
    """Make the PDF of a ``Submission`` from its stored notebooks; say what it lacks.

    Returns the files of pictures that the notebooks show.
    """
    notebooks = [read_notebook(path) for path in submission.notebooks]
    with tempfile.TemporaryDirectory() as temporary:
        folder, counts = Path(temporary), {}
        tasks = [
            Cells(notebook, path.stem, folder, ".", counts)  # counted through
            for path, notebook in zip(submission.notebooks, notebooks, strict=True)
        ]
        report = Report(folder, tasks, _facts(submission, notebooks), LISTINGS)
        content = report.compile()
    write_whole(submission.pdf, content)
    for note in report.notes:
        print(f"Not as in the notebook: {note}")
    return [path for task in tasks for path in task.files]


class Report:
    """The files that Typst reads, in a folder of their own: one for each cell."""

    def __init__(self, folder, tasks, facts, listings=()):
        self.folder, self.facts, self.notes = folder, facts, []
        for name in ("template.typ", "references.bib"):
            shutil.copy(HERE / name, folder)
        _, *parts = MARK.split(to_typst("\n".join(task.html() for task in tasks)))
        self.cells = dict(zip(parts[::2], parts[1::2], strict=True))
        self.sources = {k: v for task in tasks for k, v in task.sources.items()}
        for stem, text in self.cells.items():
            for tex in TEX.findall(text):
                self.notes.append(f"{_place(stem)}: the formula {json.loads(tex)!r}")
        self.notes += [note for task in tasks for note in task.notes]
        what = "the cells left out above, each behind # %%"
        code = [(f"{t.name}.ipynb: {what}", t.left_out) for t in tasks if t.left_out]
        code += [(name, [(ROOT / name).read_text("utf-8")]) for name in listings]
        parts = [f'#heading(level: 2, "{n}")\n{_raw(text)}\n' for n, text in code]
        self._write("code", "".join(parts))
        self._write("body", "".join(f'#include "{stem}.typ"\n' for stem in self.cells))

    def _write(self, stem, text):
        Path(self.folder, f"{stem}.typ").write_text(text, encoding="utf-8")

    def compile(self):
        """Return the PDF, in which nothing that stops Typst stops the rest.

        What a font of Typst lacks is taken from those of this machine, and else shown
        as a box. A cell that cannot be typeset is shown as its source. Accessibility
        (PDF/UA-1) is given up last.
        """
        for stem, text in self.cells.items():
            self._write(stem, text)
        standards, no_fonts = ["ua-1"], True
        midnight = datetime.datetime(*self.facts["date"], tzinfo=datetime.timezone.utc)
        while True:
            (self.folder / "facts.json").write_text(json.dumps(self.facts), "utf-8")
            try:
                return typst.compile(
                    str(self.folder / "template.typ"),
                    root=str(self.folder),
                    ignore_system_fonts=no_fonts,
                    timestamp=int(midnight.timestamp()),
                    pdf_standards=standards,
                )
            except typst.TypstError as error:
                signs = missing(error.diagnostic)
                place = WHERE.search(error.diagnostic)
                if signs and no_fonts:
                    no_fonts = False
                elif signs - set(self.facts["no_font"]):
                    self.facts["no_font"] += "".join(sorted(signs))
                    for stem, text in self.cells.items():
                        found = " ".join(sorted(signs & set(text)))
                        if found:
                            self.notes.append(f"{_place(stem)}: no font has {found}")
                elif standards and "PDF/UA-1" in error.message:
                    standards = []
                    self.notes.append(f"the PDF is not accessible: {error.message}")
                elif place and self.cells.get(place[1]):
                    self._give_up(place[1], error.message)
                else:
                    raise UserError(f"the report cannot be typeset: {error}") from error

    def _give_up(self, stem, reason):
        """Show the formulas of a cell that cannot be typeset as TeX, or all of it."""
        text = self.cells[stem]
        for whole, alt in EQUATION.findall(text):
            try:
                typst.compile(whole.encode(), ignore_system_fonts=True)
            except typst.TypstError:
                text = text.replace(whole, f'#raw(lang: "tex", {alt})')
                self.notes.append(f"{_place(stem)}: the formula {json.loads(alt)!r}")
        if text == self.cells[stem]:
            self.notes.append(f"{_place(stem)}: shown as its source ({reason})")
            text = _raw([self.sources[stem]], "text")
            self.cells[stem] = ""  # nothing more can be done
        else:
            self.cells[stem] = text
        self._write(stem, text)


def _place(stem):
    return re.sub(r"(.*)-(\d+)$", r"\1.ipynb, cell \2", stem)


def _raw(parts, lang="python"):
    text = breakable("\n\n# %%\n".join(map(str.strip, parts)))
    text = json.dumps(text, ensure_ascii=False)
    return f'#raw(block: true, lang: "{lang}", {text})'


def to_typst(text):
    """Convert HTML to Typst."""
    options = ["--wrap=none", "--preserve-tabs", "--quiet"]
    options.append(f"--lua-filter={HERE / 'filter.lua'}")
    return pypandoc.convert_text(text, "typst+smart", "html", options)


def _facts(submission, notebooks):
    """Return what the template shows besides the notebooks."""
    who = submission.student
    days = [provenance(book).get("executed") for book in notebooks]
    shown = printed(notebooks)
    latest = max(filter(None, days), default=submission.history["date"])[:10]
    return {
        "surname": who.surname,
        "given_name": who.given_name,
        "matriculation_number": who.matriculation_number,
        "draft": who.is_placeholder,
        "demo": submission.demo,
        "date": [int(part) for part in latest.split("-")],
        "provenance": origin(submission, notebooks),
        "points": points(shown, submission.history),
        "result": result(shown, submission.history),
        "no_font": "",
    }
