"""The PDF, the ZIP, and the command that makes them."""

import functools
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile

import nbformat
import pypdf
import pytest
import torch
from conftest import ROOT, copy_project, run_script, small_model

import training
from report import build, bundle, make, notebooks, pdf
from report.identity import check_student
from vision_transformer import VisionTransformer, make_loaders, predict, verify

STUDENT = check_student("Müller-Lüdenscheidt", "Anna María", "12345678")
DRAFT = check_student("Surname", "Given Name", "00000000")
NOTEBOOKS = [ROOT / "attention.ipynb", ROOT / "vision_transformer.ipynb"]
ROWS = [["attention.ipynb", "executed live"], ["training", "no finished run"]]


def text_of(path, last=None):
    return read_pages(path.read_bytes(), last)


@functools.cache  # reading a PDF back takes longer than making it
def read_pages(content, last):
    pages = pypdf.PdfReader(io.BytesIO(content)).pages
    return [page.extract_text() for page in pages[:last]]


def test_first_page_says_who_and_what(report_pdf):
    first = text_of(report_pdf)[0]
    for part in (
        "Exercise Sheet 11: Transformers",
        "Generative AI",
        "Müller-Lüdenscheidt",
        "Anna María",
        "12345678",
        "executed live",
        "no finished run",
    ):
        assert part in first
    contents = text_of(report_pdf)[1]
    for part in ("Task 1: Self-Attention", "References", "Appendix: Code"):
        assert part in contents
    assert "DRAFT" not in first
    assert "DEMO" not in first


def test_the_first_page_shows_where_the_points_are_earned(report_pdf):
    pages = text_of(report_pdf)
    first = " ".join(pages[0].split())
    assert sum(points for _, points, *_ in pdf.POINTS) == 20
    for what, points, place, proof in pdf.POINTS:
        row = re.escape(f"{what} {points} ") + r"(Fig\. \d|\d\.\d), p\. (\d+) (.*)"
        found = re.search(row, first)
        assert found, what
        is_figure = place.startswith("fig-")
        there = (
            f"ure {found[1][-1]}. Validation" if is_figure else f"{found[1]} {place}"
        )
        assert there in pages[int(found[2]) - 1], "not that page"
        assert found[3].startswith("not shown" if is_figure else f"{proof}: "), what


def test_drafts_and_demos_are_marked_and_the_first_page_stays_one(tmp_path):
    where = (
        "Linux, a processor with a long name, 128 cores, Python 3.13.10, torch 2.15.0"
    )
    rows = [[name, f"executed live on 2026-11-23 14:48 UTC: {where}"] for name in "ab"]
    rows.append(["training", f"CIFAR10, batch size 64, 18 epochs, seed 0: {where}"])
    rows.append(
        ["data set", f"CIFAR-10, all files intact; MD5 of the archive: {'0' * 32}"]
    )
    target = tmp_path / "x.pdf"
    history = training.RECORD_FOLDERS["quick"] / training.HISTORY_NAME
    pdf.make_pdf(NOTEBOOKS, ROOT / history, DRAFT, rows, target, demo=True)
    first, second = text_of(target, last=2)
    assert "0" * 32 in first
    assert second.partition("Contents")[0].count("\n") <= 2, "only the page's header"
    assert "DRAFT" in first
    assert "DEMO DATA" in first
    assert {"draft", "demo data"} <= set(pdf.keywords(target))


def test_no_page_is_nearly_empty_and_the_code_begins_in_time(report_pdf):
    pages = text_of(report_pdf)
    code = next(n for n, page in enumerate(pages) if "Appendix: Code\nat" in page)
    assert 15 < code <= 25
    for number, page in enumerate(pages[:code], 1):
        has_caption = re.search(r"Figure\s+\d+\. ", page)
        assert has_caption or len(page) > 700, f"page {number} is nearly empty"


def test_code_in_the_appendix_leaves_its_output_and_one_link_a_section(tmp_path):
    def code(source, tags, **data):
        output = nbformat.v4.new_output("display_data", data=data)
        cell = nbformat.v4.new_code_cell(source, outputs=[output])
        cell.metadata["tags"] = tags
        return cell

    text = {"text/plain": "what one() printed"}
    picture = {"image/svg+xml": "<svg/>"}
    caption = "**Figure.** A square.\n<!-- label: fig-x -->\n<!-- alt: Four sides. -->"
    caption = nbformat.v4.new_markdown_cell(caption)
    caption.metadata["tags"] = ["caption"]
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("## One"),
            code("one()", ["appendix"], **text),
            code("two()", ["appendix"], **picture),
            caption,
            nbformat.v4.new_markdown_cell("See the square<!-- fig-x -->."),
            nbformat.v4.new_markdown_cell("## Two\n\nNot drawn<!-- fig-y -->."),
            code("three()", ["appendix"], **text),
            code("four()", [], **text),
        ]
    )
    markdown, appendix = pdf.to_markdown(notebook, tmp_path, "x")
    assert appendix == ["one()", "two()", "three()"]
    assert markdown.count(text["text/plain"]) == 3
    shown = markdown.replace(text["text/plain"], "")
    assert "A square" in shown
    assert "four()" in shown
    assert not re.search(r"(one|two|three)\(\)", shown)
    assert shown.count("stands in the appendix") == 2
    typeset = pdf._to_typst(markdown)
    assert "the square (@fig-x)" in typeset
    assert "Not drawn." in typeset


def test_a_sentence_stays_with_the_equation_that_ends_it():
    typeset = " ".join(pdf._to_typst("It is\n\n$$x = 1$$\n\nEnd.").split())
    assert typeset.startswith("#block(sticky: true)[ It is ] #math.equation(")
    assert typeset.count("sticky") == 1


def test_the_points_are_read_from_the_record(tmp_path, monkeypatch):
    history = tmp_path / "history.json"
    history.write_text("{}", encoding="utf-8")
    record = {"val_accs": [0.4, 0.6, 0.55]}
    monkeypatch.setattr(pdf, "read_history", lambda _: record)
    evidence = {row["what"]: row["evidence"] for row in pdf._points([], history)}
    assert evidence["Task 2: 25 % validation accuracy"].startswith("40.0 % in epoch 1")
    assert evidence["Task 2: 50 % validation accuracy"] == (
        "60.0 % in epoch 2, 55.0 % in the last of 3"
    )
    for what in ("Task 2: 70 % validation accuracy", "Task 1: single head"):
        assert evidence[what] == "not shown: there is no record of it"


def test_all_code_is_there_and_no_debris(report_pdf):
    text = "\n".join(text_of(report_pdf))
    squeezed = re.sub(r"\s+", "", text)
    for script in ("attention.py", "vision_transformer.py"):
        code = (ROOT / script).read_text(encoding="utf-8")
        for line in code.splitlines():
            if line.startswith(("def ", "class ", "    def ", "        self.")):
                assert re.sub(r"\s+", "", line) in squeezed, line
    debris = ["model_id", "widget", "Warning", "it/s", "![", "{#", "<!--"]
    for part in [*debris, str(ROOT), sys.prefix]:
        assert part not in text
    assert "Vaswani" in text
    assert "Dosovitskiy" in text


def test_every_figure_is_numbered_and_captioned(report_pdf):
    text = "\n".join(text_of(report_pdf))
    pictures = 0
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                pictures += "image/png" in output.get("data", {})
    assert pictures > 0
    numbers = re.findall(r"Figure\s+(\d+)\.", text)
    assert numbers[:pictures] == [str(n) for n in range(1, pictures + 1)]
    tables = re.findall(r"Table\s+(\d+)\.", text)
    assert tables == [str(n) for n in range(1, len(tables) + 1)]


def test_it_is_tagged_and_has_title_and_language(report_pdf):
    reader = pypdf.PdfReader(report_pdf)
    root = reader.trailer["/Root"]
    assert root["/MarkInfo"]["/Marked"]
    assert root["/Lang"].startswith("en")
    assert reader.metadata.title == "Exercise Sheet 11: Transformers"
    assert reader.metadata.author == "Anna María Müller-Lüdenscheidt"
    assert root["/StructTreeRoot"]["/K"]


def test_the_same_input_gives_the_same_bytes(report_pdf, tmp_path):
    pdf.make_pdf(NOTEBOOKS, ROOT / "none", STUDENT, ROWS, tmp_path / "two.pdf")
    assert (tmp_path / "two.pdf").read_bytes() == report_pdf.read_bytes()


def test_the_appendix_shows_what_was_tried(report_pdf):
    text = " ".join(" ".join(text_of(report_pdf)).split())
    assert "Appendix: Trials" in text
    tried = 0
    for path in (ROOT / "bench" / "trials").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "held_out_accs" in record:
            last = (record[key][-1] for key in ("held_out_accs", "held_out_accs_eval"))
            recipe, evaluated = (f"{100 * accuracy:.2f}" for accuracy in last)
            row = f"{record['epochs']} x {record['images']:,} {recipe} {evaluated}"
            assert row in text, path.name
            tried += 1
    assert tried >= 6


def test_the_appendix_shows_ablations_and_seeds_once_they_are_recorded(
    tmp_path, monkeypatch
):
    shutil.copytree(ROOT / "bench" / "trials", tmp_path / "trials")
    monkeypatch.setattr(pdf, "TRIALS", tmp_path / "trials")
    monkeypatch.setattr(pdf, "ABLATION", tmp_path / "ablation.svg")
    monkeypatch.setattr(pdf, "QUICK_HISTORY", tmp_path / "history.json")
    monkeypatch.setattr(pdf, "LISTINGS", ())
    short = tmp_path / "short.ipynb"
    nbformat.write(nbformat.v4.new_notebook(), short)
    for path in pdf.TRIALS.glob("[as]*-*.json"):
        if path.name.startswith(("ablation", "seeds")):
            path.unlink()
    target = tmp_path / "x.pdf"

    def appendix():
        pdf.make_pdf([short], tmp_path / "none", STUDENT, ROWS, target)
        return " ".join(" ".join(text_of(target)).split())

    text = appendix()
    assert "What was tried" in text
    assert "Ablations:" not in text
    assert "The ablations, the best" not in text
    assert "Quick runs" not in text

    stored = next(pdf.TRIALS.glob("init-*.json")).read_text(encoding="utf-8")
    one_head = {**json.loads(stored), "group": "ablation", "name": "one head"}
    one_head |= {"make": "one_head", "held_out_accs": [0.4321]}
    (pdf.TRIALS / "ablation-one-head.json").write_text(json.dumps(one_head))
    pdf.ABLATION.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    )
    run = {**training.QUICK, "epoch_seconds": [600], "machine": "a machine", "seed": 7}
    run |= {"val_accs": [0.7123], "val_accs_eval": [0.7345]}
    seed = pdf.TRIALS / "seeds-7.json"
    seed.write_text(json.dumps(run))
    text = appendix()
    assert re.search(r"as handed in 64 .* one head 64 .* 43\.21", text)
    assert "The ablations, the best" in text
    assert "7 71.23 73.45 1" in text
    assert "on a machine; what else" in text
    assert ",)" not in text.rpartition("References")[2].partition("Appendix: Code")[0]
    assert "the spread is" not in text
    run |= {"seed": 8, "val_accs": [0.6999]}
    seed.with_name("seeds-8.json").write_text(json.dumps(run))
    text = appendix()
    assert "the spread is the sample standard deviation" in text
    assert "Of 2 quick runs that differ in it only, 1 ended at 70 %" in text


def test_seeds_are_read_from_the_records(tmp_path, monkeypatch):
    monkeypatch.setattr(pdf, "TRIALS", tmp_path)
    monkeypatch.setattr(pdf, "QUICK_HISTORY", tmp_path / "history.json")
    assert pdf._seeds() is None
    run = {**training.QUICK, "epoch_seconds": [600, 600, 9000], "machine": "a machine"}
    for seed, accuracies in ((1, [0.6, 0.71, 0.7]), (2, [0.5, 0.6, 0.68])):
        facts = {**run, "seed": seed, "val_accs": accuracies, "val_accs_eval": [0.75]}
        path = tmp_path / f"seeds-{seed}.json"
        path.write_text(json.dumps(facts), encoding="utf-8")
    seeds = pdf._seeds()
    assert seeds["rows"] == [
        ["1", "70.00", "75.00", "2"],
        ["2", "68.00", "75.00", "not reached"],
        ["mean", "69.00", "75.00", ""],
        ["spread", "1.41", "0.00", ""],
    ]
    assert (seeds["runs"], seeds["passed"]) == (2, 1)
    assert seeds["hours"] == "0.5", "a night of sleep does not count"


# --- The ZIP -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project with a finished default run (not trained) and the PDF made of it."""
    folder = copy_project(tmp_path_factory.mktemp("finished") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for record in training.RECORD_FOLDERS.values():
            shutil.rmtree(record, ignore_errors=True)
        torch.manual_seed(0)
        model = VisionTransformer()
        defaults = {**training.DEFAULTS, "device": torch.device("cpu")}
        run = training.Run(**defaults)
        patch.setattr(run, "_store_checkpoint", lambda: None)
        for _ in run.epochs(model, torch.optim.Adam(model.parameters()), 1):
            run.end_epoch([1.0], 0.7, 0.75)
        show_record()
        make_report(folder)
    return folder


@pytest.fixture
def ready(finished, tmp_path, monkeypatch):
    """A copy of the finished project as the working directory."""
    folder = shutil.copytree(finished, tmp_path / "Übung 11 ä")
    monkeypatch.chdir(folder)
    return folder


def show_record():
    """Let the stored notebook claim to show the record, as an executed one does."""
    notebook = nbformat.read("vision_transformer.ipynb", as_version=4)
    history = training.RECORD_FOLDERS["default"] / "history.json"
    notebook.metadata["provenance"]["record"] = notebooks.checksum(history)
    nbformat.write(notebook, "vision_transformer.ipynb")


def make_report(project, student=STUDENT, demo=False):
    target = project / "report" / f"{student.stem}.pdf"
    history = training.RECORD_FOLDERS["default"] / "history.json"
    pdf.make_pdf(bundle.NOTEBOOKS, history, student, ROWS, target, demo=demo)


EXPECTED = {
    "README.txt",
    "analysis.py",
    "attention.ipynb",
    "attention.py",
    "history.json",
    "requirements.txt",
    "training.py",
    "vision_transformer.ipynb",
    "vision_transformer.py",
    "Müller-Lüdenscheidt-12345678.pdf",
}


@pytest.mark.fault("ZIP in another folder")
def test_the_zip_is_what_moodle_wants(ready, capfd):
    path = bundle.make_zip(STUDENT)
    assert path.name == "Müller-Lüdenscheidt-12345678.zip"
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        assert file.testzip() is None
        assert set(file.namelist()) == EXPECTED
        assert {info.external_attr >> 16 for info in file.infolist()} == {0o644}
        requirements = file.read("requirements.txt").decode().split()
    assert {"torch", "torchvision", "einops", "matplotlib"} <= set(requirements)
    assert bundle.make_zip(STUDENT).read_bytes() == content, "deterministic"
    said = capfd.readouterr().out
    assert said.count("passed  ") == 2 * 9
    assert "MB, unpacked and tested" in said


@pytest.mark.fault("ZIP in another folder")
def test_the_unpacked_zip_works_alone(ready, tmp_path):
    folder = tmp_path / "von Moodle, Übung 11"
    with zipfile.ZipFile(bundle.make_zip(STUDENT, weights=True)) as file:
        assert set(file.namelist()) == EXPECTED | {"vision_transformer.safetensors"}
        file.extractall(folder)
    code = "import torch; from training import *; from vision_transformer import *; "
    code += "m = VisionTransformer(); r = Run(**DEFAULTS, device=torch.device('cpu')); "
    code += "print(bool(r.load_record(m)), r.has_weights)"
    done = run_script("-c", code, folder=folder)
    assert done.stdout.strip() == "True True", done.stderr
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook"]
    command += ["--execute", "--inplace", "attention.ipynb", "vision_transformer.ipynb"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    notebook = nbformat.read(folder / "vision_transformer.ipynb", as_version=4)
    shown = str([cell.get("outputs") for cell in notebook.cells])
    assert "0.7500 (eval)" in shown
    assert "Not validated again: no CIFAR10 in ./data" in shown
    assert not (folder / "build").exists(), "nothing was trained"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("placeholder", "identity is still the placeholder"),
        ("no pdf", "is missing: make it"),
        ("draft", "is a draft"),
        ("demo", "is a demo report"),
        ("demo and placeholder", "is a demo report"),
        ("other identity", "is missing"),
        ("notebook changed", "is outdated"),
        ("drift", "does not match attention.py"),
        ("error output", "holds an error in cell"),
        ("no record", "there is no finished run"),
        ("other record", "is not the record of the default run"),
        ("record not shown", "does not show the run in report/run"),
        ("no pdf at all", "is outdated"),
    ],
)
def test_what_is_not_ready_is_refused(ready, spoil, said):
    student = STUDENT
    made = ready / "report" / f"{STUDENT.stem}.pdf"
    history = ready / training.RECORD_FOLDERS["default"] / "history.json"
    notebook = nbformat.read("attention.ipynb", as_version=4)
    if spoil == "placeholder":
        student = DRAFT
    elif spoil == "no pdf":
        made.unlink()
    elif spoil == "draft":
        make_report(ready, DRAFT)
        (ready / "report" / f"{DRAFT.stem}.pdf").replace(made)
    elif spoil == "demo":
        make_report(ready, demo=True)
    elif spoil == "demo and placeholder":
        make_report(ready, DRAFT, demo=True)
        student = DRAFT
    elif spoil == "other identity":
        student = check_student("Meier", "Anna", "12345678")
    elif spoil == "notebook changed":
        notebook.metadata["provenance"]["executed"] = "1999-01-01 00:00 UTC"
        nbformat.write(notebook, "attention.ipynb")
    elif spoil == "drift":
        notebook.cells[0].source += " "  # alone, trailing blanks do not count
        notebook.cells[1].source += "changed"
        nbformat.write(notebook, "attention.ipynb")
    elif spoil == "error output":
        cell = next(cell for cell in notebook.cells if cell.get("outputs"))
        cell.outputs = [nbformat.v4.new_output("error", ename="E", evalue="")]
        nbformat.write(notebook, "attention.ipynb")
    elif spoil == "no record":
        history.unlink()
    elif spoil == "other record":
        facts = {**training.read_history(history), "n_epochs": 5}
        facts["sha256"] = training._history_digest(facts)
        history.write_text(json.dumps(facts), encoding="utf-8")
    elif spoil == "record not shown":
        text = history.read_text(encoding="utf-8")
        history.write_text(text + " ", "utf-8")
    elif spoil == "no pdf at all":
        made.write_bytes(b"not a pdf")
    with pytest.raises(bundle.BundleError) as caught:
        bundle.make_zip(student)
    assert said in str(caught.value)
    assert not (ready / "dist").exists()


@pytest.mark.parametrize(
    "names", [["../x"], ["/x"], ["a/b"], ["a\\b"], ["C:x"], [""], [".x"], ["A", "a"]]
)
def test_names_that_harm_are_not_packed(names):
    with pytest.raises(bundle.BundleError):
        bundle.pack(dict.fromkeys(names, b""))


def test_names_are_packed_as_nfc():
    with zipfile.ZipFile(io.BytesIO(bundle.pack({"u\u0308.txt": b""}))) as file:
        assert file.namelist() == ["\u00fc.txt"]


# --- Commands ------------------------------------------------------------------------


def run_make(*arguments, folder=ROOT, **environment):
    """Run report/make.py inside the environment that the tests run in."""
    environment = {"VENV": sys.prefix, **environment}
    script = folder / "report" / "make.py"
    return run_script(script, *arguments, folder=folder, timeout=600, **environment)


def test_make_alone_lists_every_target():
    done = run_make()
    assert done.returncode == 0
    for name in make.COMMANDS:
        assert re.search(rf"^  {name} +\w", done.stdout, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^TARGETS := (.*)$", makefile, re.MULTILINE).group(1)
    assert set(targets.split()) == set(make.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["repot"], "'repot' is no command"),
        (["report", "EPOCH=1"], "EPOCH is no option"),
        (["report", "EPOCHS=0"], "EPOCHS must be a whole number above 0"),
        (["report", "EPOCHS=1.5"], "EPOCHS must be a whole number above 0"),
        (["report", "LR=nan"], "LR must be a number above 0"),
        (["report", "SURNAME=O'Brien"], "for example OBrien"),
        (["report", "SURNAME=$(touch x)", "MATRICULATION=1"], "for example touch-x"),
        (["zip", "MATRICULATION=12a"], "must be digits only, for example 12"),
        (["zip"], "identity is still the placeholder"),
    ],
)
def test_bad_commands_get_one_sentence(project, arguments, said):
    done = run_make(*arguments, folder=project)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not (project / "x").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_hands_values_on_as_they_were_typed(project):
    command = ["make", "zip", "SURNAME=$(shell touch x)", f"VENV={sys.prefix}"]
    done = subprocess.run(
        [*command, f"PYTHON={sys.executable}"],
        cwd=project,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode != 0
    assert 'the surname "$(shell touch x)" holds' in done.stderr
    assert not (project / "x").exists()


def test_the_readme_shows_what_the_records_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    record = (ROOT / "report" / "costs.json").read_text(encoding="utf-8")
    assert build.with_records(readme) == readme, "run `make readme`"
    costs = {entry["command"].split()[1] for entry in json.loads(record)["commands"]}
    assert {"setup", "report", "test", "demo"} <= costs
    for picture in re.findall(r'<img src="([^"]+)"', readme):
        assert (ROOT / picture).is_file()
    notebook = nbformat.read(build.TRANSFORMER, as_version=4)
    curve = build.CURVE.read_bytes() if build.CURVE.is_file() else None
    shown = pdf.find_picture(notebook, "fig-validation-accuracy")
    assert curve == shown, "run `make readme`"
    shown = set(re.findall(r"`make ([a-z]+)", readme))
    assert shown <= set(make.COMMANDS)


def test_the_readme_shows_runs_and_curve_once_they_are_recorded(workplace, monkeypatch):
    for path in (build.README, build.COSTS, build.SPEED):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, path)
    before = build.with_records(build.README.read_text("utf-8"))
    assert before.count("not recorded yet") == 2
    assert "accuracy" not in before.partition("## Two commands")[0]
    quick = training.RECORD_FOLDERS["quick"] / training.HISTORY_NAME
    quick.parent.mkdir(parents=True)
    quick.write_text("{}", encoding="utf-8")
    build.CURVE.write_text("<svg/>", encoding="utf-8")
    record = {"val_accs": [0.6, 0.711, 0.705], "val_accs_eval": [0.723]}
    record |= {"epoch_seconds": [3600, 3600, 9000], "machine": "a machine"}
    monkeypatch.setattr(build, "read_history", lambda _: record)
    after = build.with_records(before)
    assert "| 70.50 % | 72.30 % | 2 | 3.0 h on a machine |" in after
    assert after.count("not recorded yet") == 1
    assert '<img src="report/accuracy.svg"' in after
    assert "the accuracy curve" in after
    quick = f"{training.QUICK['n_epochs']} epochs, batches of 64, learning rate 0.0003"
    assert f"The recorded quick run: {quick}." in after
    assert build.with_records(after) == after


def test_a_picture_is_found_by_its_label():
    notebook = nbformat.v4.new_notebook()
    for name in ("one", "two"):
        data = {"image/svg+xml": f"<svg>{name}</svg>"}
        output = nbformat.v4.new_output("display_data", data=data)
        caption = f"**Figure.** X.\n<!-- label: fig-{name} -->"
        notebook.cells += [
            nbformat.v4.new_code_cell("x", outputs=[output]),
            nbformat.v4.new_markdown_cell(caption),
        ]
    assert pdf.find_picture(notebook, "fig-two") == b"<svg>two</svg>"
    assert pdf.find_picture(notebook, "fig-three") is None
    notebook.cells[0].outputs = []
    assert pdf.find_picture(notebook, "fig-one") is None


def test_without_data_the_report_takes_recorded_outputs(project):
    before = {name: (project / name).read_bytes() for name in ("attention.ipynb",)}
    (project / "data").mkdir()
    broken = project / "data" / training.ARCHIVE_NAME
    broken.write_bytes(b"not the archive")
    # No source: the network of a machine that reaches nothing
    script = project / "training.py"
    text = script.read_text(encoding="utf-8")
    script.write_text(text + "\nfetch.__defaults__ = ((),)\n", encoding="utf-8")
    done = run_make("report", folder=project, SURNAME="Meier", MATRICULATION="123")
    assert done.returncode == 0, done.stderr
    assert f"MD5 {training.ARCHIVE_MD5}" in done.stdout
    assert "taken with the outputs it has" in done.stdout
    [made] = project.rglob("Meier-123.pdf")
    first = " ".join(text_of(made, last=1)[0].split())
    assert "vision_transformer.ipynb outputs as recorded" in first
    assert "attention.ipynb executed live" in first
    records = training.RECORD_FOLDERS.values()
    if not any((project / folder / "history.json").is_file() for folder in records):
        assert "build" in made.relative_to(project).parts
        for name, content in before.items():
            assert (project / name).read_bytes() == content


def test_verify_counts_the_images(demo_data, capsys):
    model = small_model()
    cpu = torch.device("cpu")
    logits, labels = predict(model, make_loaders("data", 500)[1], cpu)
    hits = (logits.argmax(-1) == labels).sum().item()
    for recorded, agrees in ((hits, True), (hits + 5, True), (hits + 6, False)):
        history = {"val_accs_eval": [0.0, recorded / len(labels)]}
        assert verify(model, history, "data", cpu) is agrees
    said = capsys.readouterr().out
    assert f"{hits} of {len(labels)} images right" in said
    assert "NOT what was recorded" in said


@pytest.mark.parametrize("surname", ["Łukasiewicz", "Nguyễn", "Иванов", "שמיר", "王"])
def test_names_of_any_script_are_printed_or_refused(surname):
    student = check_student(surname, "", "1")
    try:
        pdf.use_system_fonts(student)
    except pdf.PdfError as error:
        assert "in Latin letters" in str(error)
        assert surname == "王", "the others come with Typst's own fonts"


@pytest.mark.fault("project in another folder")
def test_the_demo_works_and_touches_nothing_tracked(project):
    before = {
        path: path.read_bytes()
        for path in project.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    done = run_make("demo", folder=project, SURNAME="Meier", MATRICULATION="123")
    assert done.returncode == 0, done.stderr
    for path, content in before.items():
        assert path.read_bytes() == content
    made = project / "build" / "demo" / "DEMO-Meier-123.pdf"
    assert "DEMO DATA" in text_of(made, last=1)[0]
    [history] = (project / "build" / "runs").glob("*/history.json")
    assert training.read_history(history)["val_accs"][-1] > 0.5, "it visibly learns"
    assert not [p for p in project.rglob("*.pdf") if "build" not in p.parts]
    assert not (project / "data").exists(), "nothing is fetched"
