"""The commands of make.py, as they are typed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import nbformat
import pytest
from conftest import ROOT, edited_notebook, only_files, replace_in, run_script
from test_report import shown, text_of

import make
from report import build, bundle
from support import dataset, records
from support.records import UserError


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
    assert "Figure 7. " not in "".join(others), "no caption without its picture"
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
