"""The PDF, the ZIP, and the commands that make them."""

import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import jupytext
import nbformat
import pypdf
import pytest
from conftest import ROOT, STUDENT, edited_notebook, replace_in
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

import attention
import vision_transformer
from report import build, bundle, notebooks, pdf, tables
from report.build import Submission
from report.student import check_student
from support import records
from support.records import UserError

DRAFT = check_student("Surname", "Given Name", "00000000")
NOTEBOOKS = [ROOT / "attention.ipynb", ROOT / "vision_transformer.ipynb"]
CELLS = [c for path in NOTEBOOKS for c in notebooks.read_notebook(path).cells]
SOURCES = "\n".join(cell.source for cell in CELLS)


def text_of(path, last=None):
    return read_pages(path.read_bytes(), last)


@functools.cache  # reading a PDF back takes longer than making it
def read_pages(content, last):
    pages = pypdf.PdfReader(io.BytesIO(content)).pages
    return [page.extract_text() for page in pages[:last]]


def squeezed(text):
    return re.sub(r"[\s\u200b↪]+", "", text)


def shown(student=STUDENT, **changes):
    """What `make report` shows in the working directory."""
    return dataclasses.replace(Submission.of(student), **changes)


def source_of(name):
    """Return the lines of a definition ("VisionTransformer.forward"), or parameter."""
    if name.isupper():
        return [f"{name} = "]
    is_task_1 = hasattr(attention, name.split(".")[0])
    module = attention if is_task_1 else vision_transformer
    found = functools.reduce(getattr, name.split("."), module)
    return inspect.getsource(found).rstrip().splitlines()


def test_the_first_page_says_who_and_on_which_pages_the_points_are(report_pdf):
    pages = text_of(report_pdf)
    first = " ".join(pages[0].split())
    for part in ("Müller-Lüdenscheidt", "Anna María", "12345678", "executed on 20"):
        assert part in first
    assert not re.search("DRAFT|DEMO", first)
    assert sum(points for _, points, *_ in tables.POINTS) == 20
    for what, points, code, proof in tables.POINTS:
        where = r"pp?\. (\d+)(?:\W(\d+))?"
        row = re.escape(f"{what} {points} ") + rf"{where} {where}, (.*)"
        found = re.search(row, first)
        assert found, what
        code_page, code_end, proof_page, proof_end = (
            pages[int(found[n] or found[n - 1]) - 1] for n in (1, 2, 3, 4)
        )
        begin, end = (source_of(code.split(" to ")[n]) for n in (0, -1))
        assert squeezed(begin[0]) in squeezed(code_page), what
        assert squeezed(end[-1]) in squeezed(code_end), what
        if isinstance(proof, str):
            assert f"def test_{proof.replace(' ', '_')}(" in proof_page
            assert f"passed  {proof}: " in proof_end
            assert found[5].startswith(f"{proof}: ")
        else:
            assert f"{proof:.0%} by the recipe's measure: 0." in proof_page
            assert re.match(r"epoch .*, the last: ", found[5])


def test_points_that_were_not_reached_are_said():
    rows = tables.points("", {"val_accs": [0.4, 0.6, 0.55]})
    evidence = [row["evidence"] for row in rows]
    assert evidence[0] == "multi head: not run"
    assert evidence[-2] == "epoch 2: 60.0 %; epoch 3, the last: 55.0 %"
    assert evidence[-1].startswith("never; ")


def test_the_result_tells_how_seeds_scatter_where_the_notebook_shows_it():
    history = {"val_accs": [0.7], "val_accs_eval": [0.7]}
    row = "| standard deviation | 0.70 | 0.84 |"
    assert "standard deviation of 0.70 points" in tables.result(row, history)
    assert tables.result("", history).endswith("The run has one seed.")


def test_drafts_are_marked_and_the_first_page_stays_one(project, monkeypatch):
    where = "Linux, a processor with a long name, 128 cores, Python 3.13.10, torch 2.15"
    rows = [[name, f"executed on 2026-11-23 14:48 UTC: {where}"] for name in "abcd"]
    monkeypatch.setattr(pdf, "origin", lambda *_: rows)
    pdf.make_pdf(shown(DRAFT))
    first, second = text_of(shown(DRAFT).pdf, last=2)
    assert first.count("128 cores") == 4
    assert "Task 1: Self-Attention (6 P)\n" in second
    assert "DRAFT" in first


def test_the_report_is_short_and_no_page_nearly_empty(report_pdf):
    pages = text_of(report_pdf)
    code = next(n for n, p in enumerate(pages) if n and "Appendix: Code\n" in p)
    assert code <= 17
    assert len(pages) <= 33
    for number, page in enumerate(pages[:code], 1):
        has_caption = re.search(r"(Figure|Table)\s+\d+\. ", page)
        assert has_caption or len(page) > 700, f"page {number} is nearly empty"


def test_all_code_is_there_and_no_debris(report_pdf):
    text = "\n".join(text_of(report_pdf))
    all_of_it = squeezed(text)
    code = [cell.source for cell in CELLS if cell.cell_type == "code"]
    code += [(ROOT / name).read_text(encoding="utf-8") for name in pdf.LISTINGS]
    lines = [squeezed(line) for part in code for line in part.splitlines()]
    missing = [line for line in lines if line not in all_of_it]
    # Where a line is broken between two columns, the page's header stands inside it
    assert len(missing) <= 5, missing
    debris = ["model_id", "widget", "Warning", "it/s", "![", "{#", "<!--"]
    assert not [part for part in [*debris, str(ROOT), sys.prefix] if part in text]
    for part in ("Vaswani", "Dosovitskiy", "operations per image"):  # the last: output
        assert part in text


def test_figures_have_the_numbers_of_the_notebooks_and_links_lead_there(report_pdf):
    pages = ["\n" + page for page in text_of(report_pdf)]
    captions = re.findall(
        r"\*\*Figure (\d+)\.\*\* .{60,}?<!-- alt: .{60,}?\s-->", SOURCES, re.DOTALL
    )
    assert captions == [str(n) for n in range(1, SOURCES.count("figures.plot_") + 1)]
    texts = SOURCES.replace("**Figure", "")
    pairs = re.findall(r"Figures?\s(\d+)(?:\sand\s(\d+))?", texts)
    assert {number for pair in pairs for number in pair if number} == set(captions)
    assert re.findall(r"\nFigure (\d+)\. ", "".join(pages)) == captions
    links = 0
    for here, page in zip(pages, pypdf.PdfReader(report_pdf).pages, strict=True):
        named = set(re.findall(r"(?:Figure|Table)\s+\d+", here))
        for link in page.get("/Annots", []):
            target = re.fullmatch(r"page (\d+)", link.get_object()["/Contents"])
            if target and named:
                there = pages[int(target[1]) - 1]
                assert named & set(re.findall(r"\n((?:Figure|Table) \d+)\. ", there))
                links += 1
    assert links >= len(captions)


def test_it_is_accessible_as_pdf_ua_1_asks(report_pdf):
    reader = pypdf.PdfReader(report_pdf)  # Typst has checked it, where it says so
    root = reader.trailer["/Root"]
    assert b"<pdfuaid:part>1<" in root["/Metadata"].get_data()
    assert root["/Lang"].startswith("en")
    assert reader.metadata.author == "Anna María Müller-Lüdenscheidt"
    objects = map(reader.get_object, range(1, int(reader.trailer["/Size"])))
    tags = [each for each in objects if isinstance(each, dict) and "/S" in each]
    alternatives = [each["/Alt"] for each in tags if each["/S"] == "/Figure"]
    first_line = re.search("<!-- alt: (.+)", SOURCES)[1]
    assert min(map(len, alternatives)) > 40
    assert any(text.startswith(first_line) for text in alternatives), "not the caption"


def test_the_pdf_has_the_date_of_the_newest_notebook(project):
    for name, day in (("attention", "31-01-02"), ("vision_transformer", "30-01-02")):
        with edited_notebook(f"{name}.ipynb") as book:
            book.metadata["provenance"]["executed"] = f"20{day} 10:00 UTC"
    pdf.make_pdf(shown())
    assert pypdf.PdfReader(shown().pdf).metadata["/CreationDate"][2:10] == "20310102"


WEIGHTS = (records.RECORD / records.WEIGHTS_NAME).as_posix()
EXPECTED = {
    *("attention.ipynb", "attention.py"),
    *("vision_transformer.ipynb", "vision_transformer.py"),
    *("support/__init__.py", "support/demo_data.py", "recipe_check.py", "train.py"),
    *("support/analysis.py", "support/dataset.py", "support/figures.py"),
    *("support/records.py", "support/training.py"),
    *("runs/exercise/history.json", WEIGHTS),
    *("runs/trials.csv", "runs/ablations.csv", "runs/seeds.csv"),
    *("README.txt", "requirements.txt"),
    "Müller-Lüdenscheidt-12345678.pdf",
}


@pytest.mark.fault("ZIP in another folder")
def test_the_zip_is_what_moodle_wants_and_works_alone(project, tmp_path, capfd):
    path = bundle.make_zip(shown())
    assert path.name == "Müller-Lüdenscheidt-12345678.zip"
    said = capfd.readouterr().out
    assert said.count("passed  ") == 8
    assert "MB, unpacked and tested" in said
    folder = tmp_path / "von Moodle, Übung 11"
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert set(file.namelist()) == EXPECTED
        assert {info.external_attr >> 16 for info in file.infolist()} == {0o644}
        requirements = file.read("requirements.txt").decode().split()
        file.extractall(folder)
    assert {"torch", "einops"} <= {name.partition(">")[0] for name in requirements}
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook"]
    command += ["--execute", "--inplace", "vision_transformer.ipynb"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    notebook = nbformat.read(folder / "vision_transformer.ipynb", as_version=4)
    outputs = str([cell.get("outputs") for cell in notebook.cells])
    accuracy = records.read_history(folder / records.RECORD)["val_accs_eval"][-1]
    assert f"{accuracy:.4f} (eval)" in outputs, "the recorded run is found"
    assert "Not shown (position similarity)" not in outputs, "and its weights"
    assert "not classified: no CIFAR-10 in ./data" in outputs
    assert outputs.count("Not shown (") == 6
    assert not (folder / "build").exists(), "nothing was trained"


def test_pictures_are_in_the_zip_which_is_the_same_each_time(project, monkeypatch):
    monkeypatch.setattr(bundle, "_test_as_grader", lambda *_: None)
    path = Path("my plots", "Bild ä.png")
    path.parent.mkdir()
    Image.new("RGB", (40, 20)).save(path)
    with edited_notebook() as book:
        book.cells.append(new_markdown_cell("![mine](my%20plots/Bild%20%C3%A4.png)"))
    content = bundle.make_zip(shown(), weights=False).read_bytes()
    assert bundle.make_zip(shown(), weights=False).read_bytes() == content
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        assert set(file.namelist()) == EXPECTED - {WEIGHTS} | {path.as_posix()}
        assert file.read(path.as_posix()) == path.read_bytes()


def test_a_script_that_fails_in_the_unpacked_zip_is_refused(project):
    members = bundle._members(shown(), False, [])
    members["attention.py"] = b"import nowhere"
    with pytest.raises(UserError, match=r"attention.py failed in the unpacked ZIP"):
        bundle._test_as_grader(bundle.pack(members), project / "unpacked")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("placeholder", "identity is still the placeholder"),
        ("demo run", "is a demo run"),
        ("script changed", "cell 2: `make report` has not executed it"),
        ("cell deleted", "`make report` has not executed it"),
        ("outputs cleared", "cell 2: `make report` has not executed it"),
        ("error output", "cell 2: `make report` has not executed it"),
        ("record not shown", "shows runs/exercise (00000000), and not runs/exercise"),
        ("no weights", "leave it out with WEIGHTS=0"),
    ],
)
def test_what_has_to_be_executed_or_trained_is_refused(project, spoil, said):
    submission = shown(DRAFT if spoil == "placeholder" else STUDENT)
    with edited_notebook() as book:
        code = [cell for cell in book.cells if cell.cell_type == "code"]
        if spoil == "outputs cleared":
            code[0].execution_count = None
        elif spoil == "error output":
            code[0].outputs = [new_output("error", ename="E", evalue="")]
        elif spoil == "cell deleted":  # in both: nobody has edited one of them
            book.cells.remove(code[-1])
    if spoil == "cell deleted":
        script = jupytext.read("attention.py")
        script.cells = [c for c in script.cells if c.source != code[-1].source]
        jupytext.write(script, "attention.py", fmt="py:percent")
    elif spoil == "demo run":
        submission = shown(history={**submission.history, "dataset": "DemoCIFAR10"})
    elif spoil == "script changed":
        replace_in("attention.py", "import math", "import math  # pi")
    elif spoil == "record not shown":
        record = submission.history["sha256"][:8]
        replace_in("vision_transformer.ipynb", f"(record {record})", f"(record {0:08})")
    elif spoil == "no weights":
        (submission.run / records.WEIGHTS_NAME).unlink()
    made = shown().pdf.read_bytes()
    before = Path("dist", f"{submission.student.stem}.zip")
    before.parent.mkdir()
    before.write_bytes(b"of yesterday")
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        bundle.make_zip(submission)
    assert "zip is still that of before" in str(caught.value)
    assert before.read_bytes() == b"of yesterday"
    assert shown().pdf.read_bytes() == made


def test_a_run_is_named_inside_of_the_project(project):
    for run in ("/runs/exercise", "../runs/exercise", "runs/../.."):
        with pytest.raises(UserError, match="relative paths"):
            Submission.of(STUDENT, run)
    other = Submission.of(STUDENT, str(records.QUICK_RECORD.resolve()))
    assert (other.run, other.folder) == (Path("runs/quick"), Path("build/runs/quick"))
    assert Submission.of(STUDENT, "runs/exercise").folder == Path()


def test_the_notebook_says_which_run_is_shown(project):
    replace_in("vision_transformer.py", 'RUN = "runs/exercise"', 'RUN = "runs/quick"')
    other = shown()
    assert (other.run, other.folder) == (Path("runs/quick"), Path())
    with pytest.raises(UserError, match=r"shows runs/exercise .* not runs/quick"):
        other.check()
    computed = 'RUN = None  # or RUN = "runs/quick"'
    replace_in("vision_transformer.py", 'RUN = "runs/quick"', computed)
    with pytest.raises(UserError, match=r"RUN = None .* is no text in quotes"):
        shown()
    replace_in("vision_transformer.py", computed, "")
    with pytest.raises(UserError, match='the tag "parameters" and gives RUN'):
        shown()


@pytest.mark.parametrize(
    ("source", "printed", "said"),
    [
        ("plot()", "", r"attention.ipynb, cell 3 draws nothing any more"),
        ("plot(1)", "", r"attention.ipynb, cell 4 is a caption, but cell 3"),
        ("plot()", "Not shown (mine): there are no data.", None),
    ],
)
def test_plots_that_are_gone_after_execution_are_refused(
    workplace, source, printed, said
):
    plot = new_output("display_data", {"image/svg+xml": "<svg/>"})
    stored = new_notebook(cells=[new_markdown_cell(text) for text in ("# One", "two")])
    stored.cells += [new_code_cell("plot()", outputs=[plot])]
    stored.cells += [new_markdown_cell("**Figure 1.** Mine.")]
    path = Path("attention.ipynb")
    nbformat.write(stored, path)
    build._check_pictures(stored, path)
    now = copy.deepcopy(stored)
    now.cells[2].source = source
    now.cells[2].outputs = [new_output("stream", text=printed)]
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        build._check_pictures(now, path)
