"""The commands of make.py, as they are typed."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import filelock
import nbformat
import pytest
from conftest import (
    ROOT,
    copy_project,
    edited_notebook,
    only_files,
    replace_in,
    run_script,
)
from test_report import shown, text_of

import make
import train
from report import build, bundle
from support import dataset, records
from support.records import UserError


def run_make(*arguments, folder=ROOT, **environment):
    environment = {"VENV": sys.prefix, **environment}
    script = folder / "make.py"
    return run_script(script, *arguments, folder=folder, timeout=600, **environment)


def test_make_alone_lists_every_command_the_needed_ones_first():
    done = run_make()
    assert done.returncode == 0
    commands = re.findall(r"^  ([a-z]+)  +\w", done.stdout, re.MULTILINE)
    assert commands[:4] == ["report", "test", "zip", "lab"]
    assert commands == [*make.COMMANDS]
    assert re.search(r"^  report .*\(\d+ s\)$", done.stdout, re.MULTILINE), "its cost"


def test_an_old_python_reads_far_enough_to_be_refused():
    ast.parse((ROOT / "make.py").read_text("utf-8"), feature_version=(3, 6))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the project without weights, as the working directory."""
    folder = copy_project(tmp_path / "Übung 11 ä", "*.safetensors")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def command(folder, monkeypatch):
    """Commands of such a copy, as if typed inside its environment."""
    monkeypatch.setattr(make, "ROOT", folder)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments):
        variables = {**make.own_variables(), "VENV": sys.prefix}
        with mock.patch.dict(os.environ, variables, clear=True):
            return make.main(arguments)

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["repot"], "'repot' is no command: did you mean report?"),
        (["report", "MATRICULATON=1"], "is no option: did you mean MATRICULATION?"),
        (["train", "EPOCHS="], "EPOCHS= is empty"),
        (["zip", "WEIGHTS=no"], "WEIGHTS=no is not one of 1, 0"),
        (["report", "EPOCHS=1"], "EPOCHS is no option of report, but of train"),
        (["report", "SURNAME=$(touch x)", "MATRICULATION=1"], "for example touch-x"),
    ],
)
def test_bad_commands_get_one_sentence(command, arguments, said):
    with pytest.raises(SystemExit) as caught:
        command(*arguments)
    assert str(caught.value).startswith("error: ")
    assert said in str(caught.value)
    assert not Path("x").exists()


@pytest.mark.parametrize("run", ["runs/demo/x", "build/demo/checkpoint.pt"])
def test_clean_keeps_what_took_hours(workplace, monkeypatch, run):
    monkeypatch.setattr(make, "ROOT", workplace)
    kept = [f"build/{name}/x" for name in ("kept", "mine", "other", "runs", "trials")]
    kept += [run, f"{run}.other"]
    demo = ["build/demo/run/history.json"]
    for name in (*kept, *demo, "dist/x", ".hypothesis/x"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    make.clean()
    expected = kept + demo * (run == "build/demo/checkpoint.pt")
    assert only_files(workplace) == sorted(expected)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_hands_values_on_as_they_were_typed(folder):
    def refused(*arguments):
        command = ["make", *arguments, f"VENV={sys.prefix}", f"PYTHON={sys.executable}"]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, encoding="utf-8", check=False
        )
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        return done.stderr

    said = refused("zip", "SURNAME=$(shell touch x)")
    assert "the surname '$(shell touch x)' cannot be part" in said
    assert not (folder / "x").exists()
    assert "'EPOCH' is no option" in refused("train", "EPOCH=1")
    for name in ("tests", "runs", "make.py"):  # of which some are there
        assert f"'{name}' is no command" in refused(name)


@pytest.mark.fault("setting up")
@pytest.mark.parametrize(
    ("is_gone", "asked", "has_index", "backend"),
    [
        (False, None, True, "auto"),
        (False, None, False, None),
        (True, "cpu", True, "cpu"),
    ],
)
def test_an_environment_is_made_when_it_is_not_what_is_needed(
    tmp_path, monkeypatch, is_gone, asked, has_index, backend
):
    python = tmp_path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    python.parent.mkdir()
    (tmp_path / "pyvenv.cfg" if is_gone else python).touch()
    (tmp_path / "requirements.sha256").write_text("other", encoding="utf-8")
    done = []

    def set_up(_, words):
        done.append([" ".join(words), os.environ.get(make.BACKEND)])
        python.touch()

    environment = {"VENV": str(tmp_path)} | ({make.BACKEND: asked} if asked else {})
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(make, "answers", lambda _: has_index)
    monkeypatch.setattr(make, "set_up", set_up)
    for _ in range(2):  # the second time, it is there
        assert make.ensure_environment() == python
    (venv, _), (uv, _), packages = done
    assert ("--clear" in venv) == is_gone
    assert "install --quiet uv" in uv
    install = f"{python} -m uv pip install --python {python} --group test"
    assert packages == [install, backend]


@pytest.mark.fault("setting up")
@pytest.mark.parametrize(
    ("code", "seconds", "expected"),
    [("", 20, True), ("exit(1)", 20, False), ("import time; time.sleep(60)", 1, False)],
)
def test_an_index_is_asked_and_given_up_soon(monkeypatch, code, seconds, expected):
    monkeypatch.setattr(make, "ANSWER_SECONDS", seconds)
    start = time.monotonic()
    assert make.answers([sys.executable, "-c", code]) == expected
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [("exit(3)", 3, ""), ("import os; os.kill(os.getpid(), 9)", 137, "Killed")],
)
def test_the_exit_code_of_a_program_is_passed_on(capsys, code, expected, said):
    if said and os.name == "nt":
        pytest.skip("Windows has no signals")
    assert make.run([sys.executable, "-c", code]) == expected
    heard = capsys.readouterr().err
    assert said in heard
    assert heard.count("\n") == bool(said)


@pytest.mark.parametrize("fails", ["check", "--check", "pytest"])
def test_linter_and_tests_all_run_and_each_fails_the_command(
    command, monkeypatch, fails
):
    started = []

    def run(words):
        started.append(words[:3])
        return int(fails in words[2:5])

    monkeypatch.setattr(make, "run", run)
    assert command("test") == 1
    modules = ("ruff", "ruff", "pytest")
    assert started == [[sys.executable, "-m", name] for name in modules]


def test_every_command_brings_an_edit_into_the_script_first(command, monkeypatch):
    seen = []

    def look(*_):
        seen.append(f"\n# {mark}.\n" in Path("attention.py").read_text("utf-8"))
        return 0

    monkeypatch.setattr(make, "set_up", lambda *_: None)
    monkeypatch.setattr(make, "run", look)
    monkeypatch.setattr(train, "main", look)
    monkeypatch.setattr(build, "report", look)
    monkeypatch.setattr(build, "demo", look)
    monkeypatch.setattr(bundle, "make_zip", look)
    readers = make.COMMANDS.keys() - {"setup", "clean", "course"}
    asked = [[name] for name in sorted(readers)]
    asked += [[name, "RUN=runs/quick"] for name in make.OPTIONS["RUN"][0]]
    for arguments in asked:
        mark = f"Before {' '.join(arguments)}"
        with edited_notebook() as notebook:
            notebook.cells[0].source += f"\n\n{mark}."
        seen.clear()
        assert command(*arguments) == 0
        assert seen, arguments
        assert all(seen), arguments


def test_two_reports_at_once_are_refused_before_anything_is_done(command, monkeypatch):
    monkeypatch.setattr(build, "report", lambda *_: pytest.fail("it began"))
    Path("build").mkdir()
    with filelock.FileLock(Path("build", ".lock")):
        for name in make.MAKERS:
            with pytest.raises(SystemExit, match="is at work here: wait"):
                command(name)


def test_lab_starts_as_a_module_or_says_why_it_cannot(command, monkeypatch):
    started = []
    monkeypatch.setattr(make, "run", lambda words: started.append(words) or 0)
    command("lab")
    assert started == [[sys.executable, "-m", "jupyterlab", "attention.ipynb"]]
    error = PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "utime", mock.Mock(side_effect=error))
    with pytest.raises(SystemExit, match=r"^error: attention.py .*Permission denied"):
        command("lab")


@pytest.mark.slow
@pytest.mark.fault("files and variables that mislead")
@pytest.mark.parametrize("name", ["report", "verify"])
def test_no_file_or_variable_leads_python_elsewhere(folder, name):
    (folder / "tokenize.py").touch()  # which torch would import
    (folder / "other").mkdir()
    (folder / "other" / "torch.py").write_text("raise SystemExit('not this one')")
    settings = {"PYTHONOPTIMIZE": "2", "PYTHONSAFEPATH": "1"}
    settings["PYTHONPATH"] = str(folder / "other")
    done = run_make(name, "RUN=nowhere", folder=folder, **settings)
    assert "there is no finished run in nowhere" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


@pytest.mark.slow
@pytest.mark.fault("Ctrl-C")
def test_an_interruption_before_training_begins_is_one_sentence(folder):
    (folder / "train.py").write_text("raise KeyboardInterrupt")
    done = run_make("train", folder=folder)
    assert done.returncode == 130
    assert done.stderr.strip() == "Interrupted: type the same again."


def test_the_readme_shows_what_the_records_say():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    expected = []
    for folder in (records.RECORD, records.QUICK_RECORD):
        history = records.read_history(ROOT / folder)
        first = records.first_epoch_at(history["val_accs"], 0.7)
        last = [f"{100 * history[k][-1]:.2f} %" for k in ("val_accs", "val_accs_eval")]
        row = [*last, str(first), f"{records.hours(history):.1f} h"]
        expected.append(f"| {' | '.join(row)} |")
    costs = json.loads((ROOT / "bench" / "commands.json").read_text("utf-8"))
    cost = {entry["command"]: entry for entry in costs["commands"]}
    setup, report, test = (cost[f"make {name}"] for name in ("setup", "report", "test"))
    expected.append(
        f"set-up takes {setup['seconds']} s and {setup['megabytes'] / 1000:.1f} GB of "
        f"disk, `make report` {report['seconds']} s and `make test` "
        f"{test['seconds'] / 60:.0f} min"
    )
    assert len(expected) == 3
    readme = " ".join(text.split())
    assert [part for part in expected if part not in readme] == []


def test_without_data_the_report_takes_recorded_outputs(
    project, executed, monkeypatch, capsys
):
    Path("data").mkdir()
    Path("data", dataset.ARCHIVE_NAME).write_bytes(b"not the archive")
    # No source: the network of a machine that reaches nothing
    monkeypatch.setattr(dataset.fetch, "__defaults__", ((),))
    stored = Path("vision_transformer.ipynb").read_bytes()
    build.report(shown())
    said = capsys.readouterr().out
    assert f"MD5 {dataset.ARCHIVE_MD5}" in said
    assert "vision_transformer.ipynb is taken with the outputs it has" in said
    assert Path("vision_transformer.ipynb").read_bytes() == stored
    assert executed == ["attention.ipynb"]
    assert "not at hand" in " ".join(text_of(shown().pdf, last=1)[0].split())
    assert "is not executed" not in said

    replace_in("vision_transformer.py", "p, n = ", "q, p, n = 0, ")
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
    assert "failed unit tests: single head, multi head" in str(caught.value)
    assert "run_unit_tests(test_single_head, test_multi_head)" in str(caught.value)
    assert sum(a != b for a, b in zip(before, cells(), strict=True)) == 1
    assert "math.sqrt" not in Path("attention.py").read_text(encoding="utf-8")
    assert shown().pdf.read_bytes() == pdf_before


@pytest.mark.slow
@pytest.mark.fault("project in another folder")
def test_the_demo_works_and_touches_nothing_tracked(project):
    def files():
        paths = [Path(name) for name in only_files(project) if name[-4:] != ".pyc"]
        return {path: path.read_bytes() for path in paths}

    before = files()
    done = run_make("demo", folder=project, SURNAME="Meier", MATRICULATION="1234567")
    assert done.returncode == 0, done.stderr
    after = files()
    assert {path: after[path] for path in before} == before
    assert {path.parts[0] for path in after.keys() - before.keys()} == {"build"}
    folder = Path("build", "demo")
    first, *others = text_of(folder / "DEMO-Meier-1234567.pdf")
    assert "DEMO DATA" in first
    assert "Figure 5. " in "".join(others)
    assert "The run above" not in "".join(others), "no caption without its picture"
    history = records.read_history(folder / "run")
    assert history["val_accs"][-1] > 0.5, "it visibly learns"
    outputs = (folder / "vision_transformer.ipynb").read_text(encoding="utf-8")
    assert "Not shown (patches" not in outputs
