"""The PDF, the ZIP, and the commands that make them."""

import dataclasses
import functools
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import nbformat
import pypdf
import pytest
from conftest import ROOT, STUDENT, edited_notebook, only_files, replace_in, run_script

import attention
import make
import vision_transformer
from report import build, bundle, notebooks, pdf, tables
from report.build import Submission
from report.student import check_student
from support import dataset, records
from support.records import UserError

DRAFT = check_student("Surname", "Given Name", "00000000")
NOTEBOOKS = [ROOT / "attention.ipynb", ROOT / "vision_transformer.ipynb"]
LISTINGS = [ROOT / name for name in pdf.LISTINGS]


def text_of(path, last=None):
    return read_pages(path.read_bytes(), last)


@functools.cache  # reading a PDF back takes longer than making it
def read_pages(content, last):
    pages = pypdf.PdfReader(io.BytesIO(content)).pages
    return [page.extract_text() for page in pages[:last]]


def cells_of(paths):
    return [cell for path in paths for cell in notebooks.read_notebook(path).cells]


def squeezed(text):
    return re.sub(r"[\s\u200b↪]+", "", text)


def source_of(name):
    """Return the lines of a graded definition, as in "VisionTransformer.forward"."""
    is_task_1 = hasattr(attention, name.split(".")[0])
    module = attention if is_task_1 else vision_transformer
    found = functools.reduce(getattr, name.split("."), module)
    return inspect.getsource(found).rstrip().splitlines()


def shown(student=STUDENT, **changes):
    """What `make report` shows in the working directory."""
    return dataclasses.replace(Submission.of(student), **changes)


# --- The PDF -------------------------------------------------------------------------


def test_first_page_says_who_and_what(report_pdf):
    first = text_of(report_pdf)[0]
    for part in (
        "Exercise Sheet 11: Transformers",
        *("Müller-Lüdenscheidt", "Anna María", "12345678"),
        "executed on 20",
        *("Contents", "Appendix: Code"),
    ):
        assert part in first
    assert "DRAFT" not in first
    assert "DEMO" not in first


def test_the_first_page_names_the_page_of_code_and_evidence(report_pdf):
    pages = text_of(report_pdf)
    first = " ".join(pages[0].split())
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
            assert re.match(r"epoch .*; Figure 6", found[5])


def test_points_are_read_from_tests_and_record():
    book = nbformat.v4.new_notebook()
    output = nbformat.v4.new_output("stream", text="passed  single head: the same\n")
    book.cells = [nbformat.v4.new_code_cell("x", outputs=[output])]
    rows = tables.points([book], {"val_accs": [0.4, 0.6, 0.55]})
    evidence = {row["what"]: row["evidence"] for row in rows}
    assert evidence["Task 1: single head"] == "single head: the same"
    assert evidence["Task 1: several heads"] == "multi head: not run"
    half = evidence["Task 2: 50 % validation accuracy"]
    assert half == "epoch 2: 60.0 %; epoch 3, the last: 55.0 %"
    assert "never; " in evidence["Task 2: 70 % validation accuracy"]


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
    trials = next(n for n, p in enumerate(pages) if n and "Appendix: Trials\n" in p)
    assert trials <= 17
    assert len(pages) <= 26
    for number, page in enumerate(pages[:code], 1):
        has_caption = re.search(r"(Figure|Table)\s+\d+\. ", page)
        assert has_caption or len(page) > 700, f"page {number} is nearly empty"


def test_all_code_is_there_and_no_debris(report_pdf):
    text = "\n".join(text_of(report_pdf))
    all_of_it = squeezed(text)
    code = [cell.source for cell in cells_of(NOTEBOOKS) if cell.cell_type == "code"]
    code += [path.read_text(encoding="utf-8") for path in LISTINGS]
    lines = [squeezed(line) for part in code for line in part.splitlines()]
    missing = [line for line in lines if line not in all_of_it]
    # Where a line is broken between two columns, the page's header stands inside it
    assert len(missing) <= 5, missing
    debris = ["model_id", "widget", "Warning", "it/s", "![", "{#", "<!--"]
    for part in [*debris, str(ROOT), sys.prefix]:
        assert part not in text
    assert "operations per image" in text, "what code of the appendix printed"
    assert "Vaswani" in text
    assert "Dosovitskiy" in text


def test_figures_have_the_numbers_of_the_notebooks_and_links_lead_there(report_pdf):
    pages = ["\n" + page for page in text_of(report_pdf)]
    sources = "\n".join(cell.source for cell in cells_of(NOTEBOOKS))
    captions = re.findall(r"^\*\*Figure (\d+)\.\*\*", sources, re.MULTILINE)
    assert captions == [str(n) for n in range(1, len(captions) + 1)]
    assert re.findall(r"\nFigure (\d+)\. ", "".join(pages)) == captions
    for here, page in zip(pages, pypdf.PdfReader(report_pdf).pages, strict=True):
        for link in page.get("/Annots", []):
            target = re.match(r"Figure, page (\d+)", link.get_object()["/Contents"])
            if target:
                there = re.findall(r"\nFigure (\d+)\. ", pages[int(target[1]) - 1])
                assert set(re.findall(r"Figures? (\d+)", here)) & set(there)


def elements(node):
    """Yield the elements of a PDF's structure tree below a node."""
    node = node.get_object()
    if isinstance(node, pypdf.generic.ArrayObject):
        for kid in node:
            yield from elements(kid)
    elif isinstance(node, pypdf.generic.DictionaryObject):
        if "/S" in node:
            yield node
        if "/K" in node:
            yield from elements(node["/K"])


def test_it_is_accessible_as_pdf_ua_1_asks(report_pdf):
    reader = pypdf.PdfReader(report_pdf)
    root = reader.trailer["/Root"]
    assert b"<pdfuaid:part>1<" in root["/Metadata"].get_data()
    assert root["/MarkInfo"]["/Marked"]
    assert root["/Lang"].startswith("en")
    assert reader.metadata.title == "Exercise Sheet 11: Transformers"
    assert reader.metadata.author == "Anna María Müller-Lüdenscheidt"
    alternatives = {}
    for element in elements(root["/StructTreeRoot"]["/K"]):
        alternatives.setdefault(element["/S"], []).append(element.get("/Alt", ""))
    assert {"/H1", "/H2", "/Table", "/TH", "/L", "/Code", "/Link"} <= set(alternatives)
    assert min(map(len, alternatives["/Figure"])) > 40
    sources = "\n".join(cell.source for cell in cells_of(NOTEBOOKS))
    first_line = re.search("<!-- alt: (.+)", sources)[1]
    assert alternatives["/Figure"][0].startswith(first_line), "not the caption"
    assert len(alternatives["/Formula"]) >= 20
    assert all(alternatives["/Formula"])


def test_the_same_input_gives_the_same_bytes(project):
    before = shown().pdf.read_bytes()
    pdf.make_pdf(shown())
    assert shown().pdf.read_bytes() == before


def test_the_appendix_shows_every_trial_and_seed(report_pdf):
    text = " ".join(" ".join(text_of(report_pdf)).split())
    paths = sorted(tables.TRIALS.glob("*.json"))
    assert len(paths) > 6
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        kind = "held_out_accs" if "held_out_accs" in record else "val_accs"
        last = 5 if record.get("epochs", 0) >= 20 else 1  # of a long trial, their mean
        is_final = record.get("group") == "final"  # its first epochs are an ablation
        for end in (None, 20) if is_final else (None,):
            recipe, evaluated = (
                100 * sum(record[key][:end][-last:]) / last
                for key in (kind, f"{kind}_eval")
            )
            row = rf"{record['seed']} {recipe:.2f} {evaluated:.2f}"
            assert re.search(row, text), path.name


def test_seeds_have_mean_and_spread():
    runs = [
        {**records.PRESETS["quick"], "seed": seed, "val_accs": accuracies}
        for seed, accuracies in ((1, [0.6, 0.71, 0.7]), (2, [0.5, 0.6, 0.68]))
    ]
    table = tables._seeds([{**run, "val_accs_eval": [0.75]} for run in runs])
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert rows == [
        "| 1 | 70.00 | 75.00 | 2 |",
        "| 2 | 68.00 | 75.00 | never |",
        "| mean | 69.00 | 75.00 |  |",
        "| spread | 1.41 | 0.00 |  |",
    ]


# --- The ZIP -------------------------------------------------------------------------

EXPECTED = {
    *("attention.ipynb", "attention.py"),
    *("vision_transformer.ipynb", "vision_transformer.py"),
    *(f"support/{n}.py" for n in ("figures", "records", "training", "dataset")),
    *("support/__init__.py", "train.py"),
    *("runs/exercise/history.json", "runs/exercise/vision_transformer.safetensors"),
    *("README.txt", "requirements.txt"),
    "Müller-Lüdenscheidt-12345678.pdf",
    "bench/former/default.json",
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


def test_the_same_content_is_the_same_zip(project, monkeypatch):
    monkeypatch.setattr(bundle, "_test_as_grader", lambda *_: None)
    content = bundle.make_zip(shown(), weights=False).read_bytes()
    assert bundle.make_zip(shown(), weights=False).read_bytes() == content
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        weights = (records.RECORD / records.WEIGHTS_NAME).as_posix()
        assert set(file.namelist()) == EXPECTED - {weights}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("placeholder", "identity is still the placeholder"),
        ("demo run", "is a demo run"),
        ("no notebook", "attention.ipynb is missing"),
        ("script changed", "cell 2: `make report` has not executed it"),
        ("outputs cleared", "cell 2: `make report` has not executed it"),
        ("error output", "cell 2: `make report` has not executed it"),
        ("record not shown", "does not show the run in runs/exercise"),
        ("no weights", "leave it out with WEIGHTS=0"),
    ],
)
def test_what_has_to_be_executed_or_trained_is_refused(project, spoil, said):
    submission = shown(DRAFT if spoil == "placeholder" else STUDENT)
    with edited_notebook() as book:
        code = next(cell for cell in book.cells if cell.cell_type == "code")
        if spoil == "outputs cleared":
            code.execution_count = None
        elif spoil == "error output":
            code.outputs = [nbformat.v4.new_output("error", ename="E", evalue="")]
    if spoil == "demo run":
        submission = shown(history={**submission.history, "dataset": "DemoCIFAR10"})
    elif spoil == "no notebook":
        Path("attention.ipynb").unlink()
    elif spoil == "script changed":
        replace_in("attention.py", "import math", "import math  # pi")
    elif spoil == "record not shown":
        with edited_notebook("vision_transformer.ipynb") as book:
            book.metadata["provenance"]["record"] = "0"
    elif spoil == "no weights":
        (submission.run / records.WEIGHTS_NAME).unlink()
    made = shown().pdf.read_bytes()
    before = project / "dist" / f"{submission.student.stem}.zip"
    before.parent.mkdir()
    before.write_bytes(b"of yesterday")
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        bundle.make_zip(submission)
    assert "zip is still that of before" in str(caught.value)
    assert before.read_bytes() == b"of yesterday"
    assert shown().pdf.read_bytes() == made


# --- Commands ------------------------------------------------------------------------


def run_make(*arguments, folder=ROOT, **environment):
    """Run make.py inside the environment that the tests run in."""
    environment = {"VENV": sys.prefix, **environment}
    script = folder / "make.py"
    return run_script(script, *arguments, folder=folder, timeout=600, **environment)


def test_make_alone_lists_every_command_the_needed_ones_first():
    done = run_make()
    assert done.returncode == 0
    commands = re.findall(r"^  ([a-z]+)  +\w", done.stdout, re.MULTILINE)
    assert commands[:4] == ["report", "test", "zip", "lab"]
    assert re.search(r"^  report .*\(\d+ s\)$", done.stdout, re.MULTILINE), "its cost"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^TARGETS := (.*)$", makefile, re.MULTILINE).group(1)
    assert set(targets.split()) == set(commands)


@pytest.fixture
def command(project, monkeypatch):
    """Commands of a copy of the project, as if typed inside its environment."""
    monkeypatch.setattr(make, "ROOT", project)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments):
        with mock.patch.dict(os.environ, VENV=sys.prefix):
            make.main(arguments)

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["repot"], "'repot' is no command"),
        (["report", "EPOCH=1"], "EPOCH is no option"),
        (["report", "EPOCHS=1"], "EPOCHS is no option of report, but of train"),
        (["report", "KEEP=both"], "KEEP=both is not one of notebook, script"),
        (["report", "SURNAME=$(touch x)", "MATRICULATION=1"], "for example touch-x"),
        (["report", "RUN=nowhere"], "there is no finished run in nowhere"),
    ],
)
def test_bad_commands_get_one_sentence(project, command, arguments, said):
    with pytest.raises(SystemExit) as caught:
        command(*arguments)
    assert str(caught.value).startswith("error: ")
    assert said in str(caught.value)
    assert not (project / "x").exists()


@pytest.mark.fault("identity")
@pytest.mark.parametrize(("number", "is_noted"), [("123", True), ("1234567", False)])
def test_a_number_that_is_not_lmu_s_is_accepted_with_a_word(
    command, monkeypatch, capsys, number, is_noted
):
    monkeypatch.setattr(build, "report", lambda *_: print("reported"))
    command("report", "SURNAME=Meier", f"MATRICULATION={number}")
    said = capsys.readouterr().out
    assert said.endswith("reported\n")
    assert ("7 or 8 digits" in said) == is_noted


def test_clean_keeps_what_took_hours(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "ROOT", tmp_path)
    kept = [f"build/{name}/x" for name in ("kept", "mine", "other", "runs", "trials")]
    for name in (*kept, "build/demo/x", "dist/x", ".hypothesis/x"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    make.clean()
    assert only_files(tmp_path) == kept


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_hands_values_on_as_they_were_typed(project):
    def refused(*arguments):
        command = ["make", *arguments, f"VENV={sys.prefix}", f"PYTHON={sys.executable}"]
        done = subprocess.run(
            command, cwd=project, capture_output=True, encoding="utf-8", check=False
        )
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        return done.stderr

    said = refused("zip", "SURNAME=$(shell touch x)")
    assert "the surname '$(shell touch x)' cannot be part" in said
    assert not (project / "x").exists()
    assert "EPOCH is no option" in refused("train", "EPOCH=1")
    assert "'repot' is no command" in refused("repot")


@pytest.mark.fault("setting up")
@pytest.mark.parametrize(
    ("stamp", "holds", "options", "driver", "index", "steps"),
    [
        ("wanted", "cuda", "", False, True, []),
        ("wanted", "cuda", "CPU", False, True, ["venv --clear", "pip>", "cpu", "test"]),
        ("wanted", "cuda", "CPU", False, False, []),
        ("wanted", "cpu", "CPU", False, True, []),
        ("wanted", "cpu", "CUDA", False, True, ["venv --clear", "pip>", "test"]),
        ("wanted", "cuda", "CUDA", False, True, []),
        ("", "cuda", "", True, True, ["venv", "pip>", "test"]),
        ("wanted", None, "", True, True, ["venv --clear", "pip>", "test"]),
        ("other", "cuda", "", False, True, ["venv", "pip>", "cpu", "test"]),
        ("other", "cuda", "", False, False, ["venv", "pip>", "test"]),
        ("other", "cuda", "CUDA", False, True, ["venv", "pip>", "test"]),
    ],
)
def test_an_environment_is_made_when_it_is_not_what_is_asked_for(
    tmp_path, monkeypatch, capsys, stamp, holds, options, driver, index, steps
):
    python = tmp_path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    python.parent.mkdir()
    if holds:
        python.touch()
    else:  # as where the Python that it was made of is gone
        (tmp_path / "pyvenv.cfg").touch()
    wanted = make.hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    text = wanted if stamp == "wanted" else stamp
    (tmp_path / "requirements.sha256").write_text(text, encoding="utf-8")
    done = []
    monkeypatch.setenv("VENV", str(tmp_path))
    for name in ("CPU", "CUDA"):
        monkeypatch.setenv(name, str(int(name == options)))
    found = {"is_linux_pc": True, "has_driver": driver, "answers": index}
    for name, answer in {**found, "build_of": holds}.items():
        monkeypatch.setattr(make, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(
        make, "set_up", lambda _, command: done.append(" ".join(command))
    )
    assert make.ensure_environment() == python
    assert len(done) == len(steps)
    for command, step in zip(done, steps, strict=True):
        assert all(word in command for word in step.split())
        assert ("--clear" in command) == ("--clear" in step)
    assert ("does not answer" in capsys.readouterr().out) == (not index)
    assert (tmp_path / "requirements.sha256").read_text(encoding="utf-8") == wanted


@pytest.mark.fault("setting up")
def test_a_step_of_the_setup_that_fails_is_named():
    with pytest.raises(SystemExit, match="could not be made"):
        make.set_up("torch", [sys.executable, "-c", "exit(1)"])


def test_the_readme_shows_what_the_records_say():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = sorted((ROOT / "runs").glob("*/history.json"))
    assert ROOT / records.RECORD / records.HISTORY_NAME in paths
    for path in paths:
        history = records.read_history(path.parent)
        recipe, evaluated = (history[key][-1] for key in ("val_accs", "val_accs_eval"))
        row = f"| {100 * recipe:.2f} % | {100 * evaluated:.2f} % | "
        row += f"{records.first_epoch_at(history['val_accs'], 0.7)} | "
        row += f"{records.hours(history):.1f} h |"
        assert row in readme
    costs = json.loads((ROOT / "bench" / "commands.json").read_text(encoding="utf-8"))
    cost = {entry["command"]: entry for entry in costs["commands"]}
    setup, report, test = (cost[f"make {name}"] for name in ("setup", "report", "test"))
    sentence = (
        f"set-up takes {setup['seconds']} s and {setup['megabytes'] / 1000:.1f} GB of "
        f"disk, `make report` {report['seconds']} s and `make test` "
        f"{test['seconds'] / 60:.0f} min"
    )
    assert sentence in " ".join(readme.split())
    speed = json.loads((ROOT / "bench" / "speed.json").read_text(encoding="utf-8"))
    summary = speed["summary"]
    for name in ("training step against the fastest peer", "memory of a training step"):
        [value] = (summary[key] for key in summary if key.startswith(name))
        assert f"{value:.2f} times" in readme, name
    commands = set(re.findall(r"make ([a-z]+)(?:[` ]|$)", readme, re.MULTILINE))
    assert commands - {"make"} <= {*make.FIRST, *make.OTHERS}
    table = readme.partition("## What is")[2]
    for row in re.findall(r"^\| (`.*?) \|.*\|$", table, re.MULTILINE):
        first, *others = re.findall(r"`([\w./]+)`", row)
        folder = (ROOT / first.rstrip("/")).parent  # bare names are beside the first
        for path in (ROOT / first, *(folder / name for name in others)):
            assert path.exists(), path


def test_without_data_the_report_takes_recorded_outputs(
    project, executed, monkeypatch, capsys
):
    (project / "data").mkdir()
    Path("data", dataset.ARCHIVE_NAME).write_bytes(b"not the archive")
    # No source: the network of a machine that reaches nothing
    monkeypatch.setattr(dataset.fetch, "__defaults__", ((),))
    stored = Path("vision_transformer.ipynb").read_bytes()
    build.report(shown())
    said = capsys.readouterr().out
    assert f"MD5 {dataset.ARCHIVE_MD5}" in said
    assert "vision_transformer.ipynb is taken with the outputs it has" in said
    assert Path("vision_transformer.ipynb").read_bytes() == stored
    assert set(executed) == {"attention.ipynb"}
    assert "not at hand" in " ".join(text_of(shown().pdf, last=1)[0].split())
    assert "is not executed" not in said

    replace_in("vision_transformer.py", "p, rows = ", "q, p, rows = 0, ")
    build.report(shown())
    number = re.search(r"Its cell (\d+) is not executed", capsys.readouterr().out)[1]
    with pytest.raises(UserError, match=f"cell {number}: .* with CIFAR-10 in data"):
        bundle.make_zip(shown(), weights=False)


@pytest.mark.fault("failing notebook cell")
def test_a_failed_report_costs_no_outputs(project):
    def cells():
        book = nbformat.read("attention.ipynb", as_version=4)
        return [(c.get("execution_count"), c.get("outputs")) for c in book.cells]

    replace_in("attention.py", "/ math.sqrt(self.head_dim)", "/ 0.01")
    before, pdf_before = cells(), shown().pdf.read_bytes()
    with pytest.raises(UserError) as caught:
        build.report(shown())
    assert re.match(r"attention\.ipynb, cell \d+, line 2:\n", str(caught.value))
    assert "run_unit_tests(test_single_head, test_multi_head)" in str(caught.value)
    assert sum(a != b for a, b in zip(before, cells(), strict=True)) == 1
    assert "math.sqrt" not in Path("attention.py").read_text(encoding="utf-8")
    assert shown().pdf.read_bytes() == pdf_before


@pytest.mark.fault("project in another folder")
def test_the_demo_works_and_touches_nothing_tracked(project):
    def files():
        paths = [path for path in project.rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in paths if path.suffix != ".pyc"}

    before = files()
    done = run_make("demo", folder=project, SURNAME="Meier", MATRICULATION="1234567")
    assert done.returncode == 0, done.stderr
    after = files()
    assert {path: after[path] for path in before} == before
    new = {path.relative_to(project).parts[0] for path in after.keys() - before.keys()}
    assert new == {"build"}
    folder = project / "build" / "demo"
    first, *others = text_of(folder / "DEMO-Meier-1234567.pdf")
    assert "DEMO DATA" in first
    assert "Figure 6. " in "".join(others)
    assert "The run above" not in "".join(others), "no caption without its picture"
    history = records.read_history(folder / "run")
    assert history["val_accs"][-1] > 0.5, "it visibly learns"
    outputs = (folder / "vision_transformer.ipynb").read_text(encoding="utf-8")
    assert "Not shown (patches" not in outputs


def test_lab_brings_edits_together_before_it_opens(project, command, monkeypatch):
    with edited_notebook() as notebook:
        notebook.cells[0].source += "\n\nMine."
    opened = []
    monkeypatch.setattr(make, "run", lambda words: opened.append(words[-2:]))
    command("lab")
    assert opened == [["lab", "attention.ipynb"]]
    assert "# Mine.\n" in (project / "attention.py").read_text(encoding="utf-8")
