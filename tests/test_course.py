"""The course's notebooks, filled in with our classes; these ones are made up."""

import json
import re
import textwrap
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from report import bundle, course, tables
from support.records import UserError

MODULES = """\
# The building blocks
%matplotlib inline
files = !ls \\
    {folder}
import torch, einops; from torch import nn

class ResidualModule(nn.Module):  # stays
    def __init__(self, inner_module: nn.Module):
        super().__init__()
        self.inner_module = inner_module

    def forward(self, x):
        return x + self.inner_module(x)

"""
BLOCK = '''\
@torch.no_grad
class SelfAttentionTransformerBlock(nn.Module):
    """In two
lines."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x  # (2 P)
'''
PARTS = (
    MODULES,
    "class FeedForwardBlock(nn.Module):  # 1P\n    def forward(self, x):\n",
    "        # to be written\n\n# Between ``classes``, 100 %\n",
    BLOCK,
    "\n\ndef helper():\n    class Other: pass\n\nif True:\n",
    "    class VisionTransformer(nn.Module): pass  # 5P",
    "\n    print('é', VisionTransformer)\n  # after the class\n",
)
TRAINING = """\
assert VisionTransformer()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
assert ResidualModule(nn.ReLU())(torch.ones(1)) == 2
print(f"{N_EPOCHS} epochs", end="")
"""
GRID = """\
import torch
from torch import nn

class SelfAttention2d(nn.Module):
    pass

with torch.no_grad():
    layer = SelfAttention2d(8, 4, 4, 2)
    assert layer(torch.randn(2, 8, 3, 5)).shape == (2, 8, 3, 5), "shape"
print("single head passed")
"""


def store(path, *sources):
    """Store a notebook as the course may, in a format without ids of cells."""
    cells = [{"cell_type": "markdown", "metadata": {}, "source": "# Task"}]
    for source in sources:
        lines = source.splitlines(keepends=True)
        cell = {"cell_type": "code", "metadata": {}, "source": lines}
        cells.append({**cell, "outputs": [], "execution_count": 7})
    metadata = {"kernelspec": {"name": "my-env", "display_name": "x"}}
    book = {"nbformat": 4, "nbformat_minor": 2, "metadata": metadata, "cells": cells}
    Path(path).write_text(json.dumps(book, indent=1), "utf-8", newline="\r\n")


def sources(path):
    return [cell.source for cell in nbformat.read(path, as_version=4).cells]


@pytest.fixture
def folder(workplace):
    for name in ("attention.py", "vision_transformer.py"):
        Path(name).write_bytes((ROOT / name).read_bytes())
    return workplace


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_nothing_but_the_classes_changes(folder, line_end):
    parts = [part.replace("\n", line_end) for part in PARTS]
    store("v.ipynb", "%%bash\nls", "".join(parts))
    book = nbformat.read("v.ipynb", as_version=4)
    assert course.fill(book, "v.ipynb")[0] == (
        "FeedForwardBlock, SelfAttentionTransformerBlock, VisionTransformer"
    )
    stays = "(.*)".join(re.escape(part) for part in parts[::2])
    found = re.fullmatch(stays, book.cells[2].source, re.DOTALL)
    assert found[0].count("\n") == found[0].count(line_end)
    first, second, third = (text.replace(line_end, "\n") for text in found.groups())
    ours = (ROOT / "vision_transformer.py").read_text(encoding="utf-8")
    assert second in ours
    assert third.startswith("    class VisionTransformer(")
    assert textwrap.dedent(third) in ours
    assert first.startswith(f"{course.IMPORTS}\n\n\nclass SelfAttention2d(nn.Module):")
    assert first.index("class SelfAttention(") < first.index("class FeedForwardBlock(")
    assert book.cells[1].source == "%%bash\nls"


def test_what_was_executed_is_shown_while_the_classes_stay(folder, capsys, monkeypatch):
    source = "".join(PARTS).replace("print('é'", "assert 1; print('é'")
    store("v.ipynb", "N_EPOCHS: int = 50  # 50", source, TRAINING)
    course.run_course("v.ipynb", epochs="3")
    said = capsys.readouterr().out
    assert "VisionTransformer and N_EPOCHS = 3 instead of 50:" in said
    assert "3 epochs\ncell 4: passed\nAll cells passed" in said
    copy = Path("build", "course", "v.ipynb")
    first, parameter, _, training = sources(copy)
    assert (first, parameter) == ("# Task", "N_EPOCHS: int = 3  # 50")
    assert training == TRAINING
    [(path, facts)] = course.executed()
    assert path == copy
    assert "VisionTransformer and N_EPOCHS = 3" in facts["changed"]

    module = Path("vision_transformer.py")
    text = module.read_text(encoding="utf-8")
    module.write_text(text.replace("0.65 *", "0.7 *"), encoding="utf-8")
    assert not course.executed(), "the classes are others now"
    module.write_text(text.replace('"""Return ``x', '"""Give ``x'), encoding="utf-8")
    assert course.executed(), "ResidualModule is the course's"
    copy.write_text(copy.read_text("utf-8").replace("== 2", "== 9"), encoding="utf-8")
    assert not course.executed(), "the copy was edited"


def test_what_ran_is_on_page_1_and_in_the_zip(project):
    store("a.ipynb", GRID)
    course.run_course("a.ipynb")
    from test_report import shown

    submission = shown()
    books = [nbformat.read(path, as_version=4) for path in submission.notebooks]
    rows = dict(tables.origin(submission, books))
    assert "but for SelfAttention2d: all its" in rows["the course's a.ipynb"]
    members = bundle._members(submission, False, [])
    assert members["course/a.ipynb"] == Path("build/course/a.ipynb").read_bytes()
    store("a.ipynb", GRID + "assert False")
    with pytest.raises(UserError, match=r"a.ipynb, cell 2, line \d+:\n    assert F"):
        course.run_course("a.ipynb")
    assert sources("build/course/a.ipynb")[1].endswith("assert False"), "it stays"
    assert not course.executed()


A, B = "class SelfAttention2d: pass", "class VisionTransformer: pass"


@pytest.mark.parametrize(
    ("source", "epochs", "said"),
    [
        ("class Other: pass", None, "it is neither of them"),
        (B, None, "it lacks FeedForwardBlock, SelfAttentionTransformerBlock,"),
        (A + "\nx = (", None, "a.ipynb, cell 2, line 2: "),
        (A, "1", "a.ipynb sets no N_EPOCHS"),
        ("N_EPOCHS = 5\n" + A, "0", "EPOCHS=0 is no positive number"),
        (None, None, "NOTEBOOK=a.ipynb: there is no such file"),
    ],
)
def test_what_is_not_the_course_s_is_refused(folder, source, epochs, said):
    if source is not None:
        store("a.ipynb", source)
    with pytest.raises(UserError, match=re.escape(said)):
        course.run_course("a.ipynb", epochs)
    with pytest.raises(UserError, match=r"attention.ipynb was made here"):
        course.run_course(str(ROOT / "attention.ipynb"))
    assert not Path("build").exists()
