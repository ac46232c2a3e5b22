"""The ZIP that goes to Moodle."""

import os
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from io import BytesIO
from pathlib import Path, PurePosixPath

import nbformat

from report.notebooks import checksum, differences
from report.pdf import DEMO_KEYWORD, DRAFT_KEYWORD, fingerprint, keywords
from training import (
    HISTORY_NAME,
    PRESETS,
    RECORD_FOLDERS,
    WEIGHTS_NAME,
    handed_in,
    read_history,
    write_whole,
)

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

NAMES = ("attention", "vision_transformer")
SCRIPTS = tuple(Path(f"{name}.py") for name in NAMES)
NOTEBOOKS = tuple(Path(f"{name}.ipynb") for name in NAMES)
DIST = Path("dist")
LARGE_BYTES = 10_000_000
TEST_SECONDS = 300
FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # two builds of the same content are the same file

README = """\
Exercise Sheet 11: Transformers

  {stem}.pdf             the report
  attention.py            Task 1; run it to test it: python attention.py
  vision_transformer.py   Task 2; run it to test it: python vision_transformer.py
  *.ipynb                 the same as notebooks, with outputs; opened, they run and
                          show the recorded training run, without training it again
  training.py             data, checkpoints and records of training runs
  analysis.py             the figures of what the trained model does
  {history}            the recorded training run

To be imported and to test themselves, attention.py and vision_transformer.py need
Python 3.8 or newer with torch 2.0, torchvision 0.15 and einops. All else needs Python
3.10 or newer and what requirements.txt lists: pip install -r requirements.txt
"""
VERIFY = """
The weights are included. To validate them on the CIFAR-10 test images, fetched into
./data if they are not there (after the installation named above):

  python vision_transformer.py --verify
"""


class BundleError(RuntimeError):
    """A submission that is not ready; the message is one sentence that says why."""


def make_zip(student, weights=False):
    """Make ``dist/Surname-MatriculationNumber.zip`` and test it as a grader would.

    Args:
        student: a ``Student``.
        weights: whether to add the recorded weights.

    Returns:
        The path of the ZIP.

    Raises:
        BundleError: something is missing, outdated, a draft or a demo, or the ZIP
            does not stand the test; a ZIP made earlier is left as it is.
    """
    pdf = Path("report", f"{student.stem}.pdf")
    _check_report(pdf, student)
    for script, notebook in zip(SCRIPTS, NOTEBOOKS, strict=True):
        _check_notebook(script, notebook)
    _check_record(weights)
    _check_fresh(pdf, student)

    content = pack(_members(student, pdf, weights))
    with tempfile.TemporaryDirectory() as temporary:
        # A name as graders' folders have them
        _test_as_grader(content, Path(temporary, "Übung 11 ä"))
    target = DIST / f"{student.stem}.zip"
    write_whole(target, content)
    size = len(content) / 1e6
    print(f"{target.as_posix()}: {size:.1f} MB, unpacked and tested. This is what to")
    print("upload to Moodle, as it is.")
    if len(content) > LARGE_BYTES:
        print(f"Mind that {size:.1f} MB may be more than Moodle accepts.")
    return target


def _check_report(pdf, student):
    found = keywords(pdf) if pdf.is_file() else []
    if DEMO_KEYWORD in found:
        raise BundleError(
            f"{pdf.as_posix()} is a demo report, not trained on CIFAR-10, and cannot "
            "be handed in: make the real one with `make report`"
        )
    if student.is_placeholder:
        raise BundleError(
            "the identity is still the placeholder: fill in report/student.toml, or "
            "give SURNAME= and MATRICULATION="
        )
    if not pdf.is_file():
        raise BundleError(f"{pdf.as_posix()} is missing: make it with `make report`")
    if DRAFT_KEYWORD in found:
        raise BundleError(
            f"{pdf.as_posix()} is a draft: make it again with `make report`"
        )


def _check_notebook(script, notebook):
    if not notebook.is_file():
        raise BundleError(f"{notebook} is missing: make it with `make report`")
    found = differences(script, notebook)
    if found:
        raise BundleError(
            f"{notebook} does not match {script} ({found[0]}): run `make report`"
        )
    for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells, 1):
        if any(output.output_type == "error" for output in cell.get("outputs", [])):
            raise BundleError(
                f"{notebook} holds an error in cell {number}: run `make report`"
            )


def _check_record(weights):
    preset = handed_in()
    path = RECORD_FOLDERS[preset] / HISTORY_NAME
    if not path.is_file():
        raise BundleError(
            f"{path.as_posix()} is missing: there is no finished run with the recipe's "
            "parameters; `make report` trains it"
        )
    history = read_history(path)
    if any(history.get(key) != value for key, value in PRESETS[preset].items()):
        raise BundleError(
            f"{path.as_posix()} is not the record of the {preset} run: restore it, or "
            "delete it and run `make report`"
        )
    shown = nbformat.read(NOTEBOOKS[1], as_version=4).metadata["provenance"]
    if shown.get("record") != checksum(path):
        raise BundleError(
            f"{NOTEBOOKS[1]} does not show the run in {path.as_posix()}: run "
            "`make report` where the data set is, or can be fetched"
        )
    weights_path = path.with_name(WEIGHTS_NAME)
    if weights and checksum(weights_path) != history.get("weights_sha256"):
        raise BundleError(
            f"{weights_path.as_posix()} is missing, or not that of the record: leave "
            "WEIGHTS=1 away, or restore it"
        )


def _check_fresh(pdf, student):
    history = RECORD_FOLDERS[handed_in()] / HISTORY_NAME
    made_of = fingerprint(NOTEBOOKS, history, student)
    if made_of not in keywords(pdf):
        raise BundleError(
            f"{pdf.as_posix()} is outdated, it was not made of the present notebooks, "
            "record and identity: make it again with `make report`"
        )


def _members(student, pdf, weights):
    """Return what goes into the ZIP, as a dict from name to bytes."""
    files = [*SCRIPTS, *NOTEBOOKS, Path("training.py"), Path("analysis.py"), pdf]
    record = RECORD_FOLDERS[handed_in()]
    files.append(record / HISTORY_NAME)
    if weights:
        files.append(record / WEIGHTS_NAME)
    members = {path.name: path.read_bytes() for path in files}
    readme = README.format(stem=student.stem, history=HISTORY_NAME)
    members["README.txt"] = (readme + (VERIFY if weights else "")).encode()
    members["requirements.txt"] = _requirements().encode()
    return members


def _requirements():
    """Return what the notebooks need, without the bounds of our own environment."""
    groups = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    entries = groups["dependency-groups"]["run"]
    return "".join(f"{entry.split('>')[0].split('=')[0]}\n" for entry in entries)


def pack(members):
    """Return a ZIP as bytes: sorted, with fixed times, the same for the same content.

    Args:
        members: a dict from file name, without folder, to bytes.

    Raises:
        BundleError: a name is no plain file name, or two differ in case only.
    """
    names = {unicodedata.normalize("NFC", name): data for name, data in members.items()}
    for name in names:
        if not name or name.startswith(".") or set(name) & set('/\\:*?"<>|\0'):
            raise BundleError(f"{name!r} is no name for a file in the ZIP")
    if len({name.casefold() for name in names}) < len(names):
        raise BundleError("two files of the ZIP differ only in upper and lower case")
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name in sorted(names):
            info = zipfile.ZipInfo(name, FIXED_TIME)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3  # Unix, on every machine
            info.external_attr = 0o644 << 16
            file.writestr(info, names[name])
    return buffer.getvalue()


def _test_as_grader(content, folder):
    """Open a ZIP again, unpack it, and run both scripts there."""
    with zipfile.ZipFile(BytesIO(content)) as file:
        damaged = file.testzip()
        names = file.namelist()
        plain = all(len(PurePosixPath(name).parts) == 1 for name in names)
        pdfs = [name for name in names if name.endswith(".pdf")]
        if damaged or not plain or len(pdfs) != 1:
            raise BundleError(f"the ZIP is not what it should be: {names}")
        file.extractall(folder)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for script in SCRIPTS:
        print(f"$ python {script}    (in the unpacked ZIP)", flush=True)
        try:
            done = subprocess.run(
                [sys.executable, script.name],
                cwd=folder,
                env=environment,
                timeout=TEST_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BundleError(
                f"{script} took longer than {TEST_SECONDS} s in the unpacked ZIP"
            ) from None
        if done.returncode:
            raise BundleError(f"{script} failed in the unpacked ZIP, see above")
