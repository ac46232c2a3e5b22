"""The ZIP that goes to Moodle."""

import subprocess
import sys
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

from report.course import executed
from report.notebooks import read_notebook
from report.pdf import LISTINGS, make_pdf
from report.student import tomllib
from report.sync import SCRIPTS, bring_together, first_not_executed
from support import records
from support.records import UserError

DIST = Path("dist")
TEST_SECONDS = 300
FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # two builds of the same content are the same file

README = """\
Exercise Sheet 11: Transformers. Page 1 of {stem}.pdf says where the points are.

python attention.py              Task 1: prints "passed" for each unit test
python vision_transformer.py     Task 2: likewise
python recipe_check.py           compares our training with a plain loop of the recipe,
                                 on generated images, in a minute or two
python train.py --verify         validates the recorded weights, if the ZIP has them
python train.py                  the training of the exercise: hours without a GPU
jupyter lab                      both notebooks; Run All shows the recorded run again

The first two need Python 3.8 or newer, torch 2.0 or newer, torchvision and einops. All
else needs Python 3.10 or newer, `pip install -r requirements.txt`, and CIFAR-10 in
data/, which is fetched if it is missing.

If there is a folder course/, it has the course's own notebooks, executed with these
classes in place of theirs. To do so by hand, copy only the two .py files beside those
notebooks, which have the same names, and import the classes in place of those there.
"""


def make_zip(submission, weights=True, keep=None):
    """Make ``dist/Surname-MatriculationNumber.zip``, test it as a grader would.

    The PDF is made again. What has to be executed or trained before is refused. Only
    the modules that a notebook imports may be newer, as without the data set; the PDF
    says so. Returns the path.
    """
    target = DIST / f"{submission.student.stem}.zip"
    try:
        _make_ready(submission, weights, keep)
    except UserError as error:
        if target.is_file():
            raise UserError(f"{error} ({target} is still that of before)") from error
        raise
    pictures = make_pdf(submission)  # of the notebooks as they are now
    content = pack(_members(submission, weights, pictures))
    with tempfile.TemporaryDirectory() as temporary:
        # A name as graders' folders have them
        _test_as_grader(content, Path(temporary, "Übung 11 ä"))
    records.write_whole(target, content)
    print(f"{target.as_posix()}: {len(content) / 1e6:.1f} MB, unpacked and tested.")
    print("This is what to upload to Moodle, as it is.")
    if weights:
        print("Should Moodle refuse the size, WEIGHTS=0 leaves the weights out.")
    return target


def _make_ready(submission, weights, keep):
    if submission.demo:
        raise UserError(
            f"{submission.run} is a demo run, not trained on CIFAR-10, and cannot be "
            "handed in: leave RUN= away, or name another"
        )
    if submission.student.is_placeholder:
        raise UserError(
            "the identity is still the placeholder: fill in report/student.toml, or "
            "give SURNAME= and MATRICULATION="
        )
    for script, notebook in submission.pairs:
        bring_together(script, notebook, keep)
        if not notebook.is_file():
            raise UserError(f"{notebook} is missing: make it with `make report`")
        number = first_not_executed(read_notebook(notebook), script)
        if number:
            where = ", with CIFAR-10 in data" * (script == SCRIPTS[1])
            raise UserError(
                f"{notebook}, cell {number}: `make report` has not executed it as it "
                f"is now; run that first{where}, then this again"
            )
    submission.check()
    path = submission.run / records.WEIGHTS_NAME
    if weights and records.checksum(path) != submission.history["weights_sha256"]:
        raise UserError(
            f"{path} is missing, or not that of the record: restore it, or leave it "
            "out with WEIGHTS=0"
        )


def _members(submission, weights, pictures):
    """Return what goes into the ZIP, as a dict from name to bytes."""
    names = (records.HISTORY_NAME, records.WEIGHTS_NAME)[: 1 + weights]
    files = [
        *SCRIPTS,
        *(Path("support", name) for name in ("__init__.py", "demo_data.py")),
        *map(Path, LISTINGS),
        *(submission.run / name for name in names),
        *pictures,
        *records.RUNS.glob("*.csv"),
    ]
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    needed = [entry.split(",")[0] for entry in project["dependency-groups"]["run"]]
    readme = README.format(stem=submission.student.stem)
    return {
        **{path.as_posix(): path.read_bytes() for path in files},
        **{f"course/{p.name}": p.read_bytes() for p, _ in executed()},
        **{p.name: p.read_bytes() for p in [*submission.notebooks, submission.pdf]},
        "README.txt": readme.encode(),
        "requirements.txt": "".join(f"{name}\n" for name in needed).encode(),
    }


def pack(members):
    """Return a ZIP of a dict from names to bytes, the same for the same content."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in sorted(members.items()):
            info = zipfile.ZipInfo(name, FIXED_TIME)
            info.create_system = 3  # Unix, on every machine
            info.external_attr = 0o644 << 16
            file.writestr(info, data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _test_as_grader(content, folder):
    """Open a ZIP again, unpack it, and run both scripts there."""
    with zipfile.ZipFile(BytesIO(content)) as file:
        file.extractall(folder)  # which compares the checksums
    for script in SCRIPTS:
        print(f"$ python {script}    (in the unpacked ZIP)", flush=True)
        command = [sys.executable, str(script)]
        try:
            subprocess.run(command, cwd=folder, timeout=TEST_SECONDS, check=True)
        except subprocess.SubprocessError as error:
            raise UserError(f"{script} failed in the unpacked ZIP: {error}") from None
