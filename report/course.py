"""The course's own notebooks, with our classes in place of theirs, executed.

The copies lie in ``build/course`` and say in their metadata what they ran with, so that
page 1 and the ZIP show one only while the classes are still the same.
"""

import ast
import contextlib
import functools
import io
import re
import textwrap
from pathlib import Path

from nbclient import NotebookClient
from torchvision.datasets import CIFAR10

from report.notebooks import execute, read_notebook, store
from report.sync import SCRIPTS, contents, digest
from support.dataset import fetch
from support.records import UserError

FOLDER = Path("build", "course")
BLOCKS = ("FeedForwardBlock", "SelfAttentionTransformerBlock")
# For each notebook: the classes that the sheet asks for, and what ours need in front
TASKS = (
    ((*BLOCKS, "VisionTransformer"), ("SelfAttention2d", "SelfAttention")),
    (("SelfAttention2d",), ()),
)
IMPORTS = """\
import math

import einops
import torch
from torch import nn
from torch.nn import functional as F"""
MAGIC = re.compile(r"^([ \t]*)(?:[%!?]|[\w.]+ *= *[%!])((?:.*\\\r?\n)*).*", re.M)
EPOCHS = re.compile(r"^(N_EPOCHS *(?::.*)?= *)(\d+)", re.M)


def run_course(path, epochs=None):
    """Fill in a notebook of the course, execute it and store it, also if it fails."""
    source = Path(path or "").expanduser()
    if not source.is_file():
        raise UserError(f"NOTEBOOK={path or ''}: there is no such file")
    try:
        notebook = read_notebook(source)
    except UserError as error:
        asked = "give the path of the course's notebook"
        raise UserError(f"NOTEBOOK={path or ''} is no notebook: {asked}") from error
    if {"course", "provenance"} & notebook.metadata.keys():
        raise UserError(f"{source} was made here: give the course's, as it came")
    changed, classes = fill(notebook, source)
    target = FOLDER / source.name
    if epochs:
        changed += f" and N_EPOCHS = {_set_epochs(notebook, source, epochs)}"
        if any(p == target and "N_EPOCHS" not in f["changed"] for p, f in executed()):
            raise UserError(f"{target} has run with all epochs: move it away first")
    if any("CIFAR10" in cell.source for cell in notebook.cells):
        fetch(CIFAR10, "data")  # which is the course's './data'
    print(f"{source.name}, unchanged but for {changed}:", flush=True)
    # Now, since the classes may be edited while it trains
    ran_with = {"classes": classes, "digest": _digest(notebook, classes)}
    # Whatever tags they have, all cells are executed, and none may fail
    strict = {"force_raise_errors": True, "skip_cells_with_tag": ""}
    try:
        execute(notebook, source.name, None, functools.partial(Watched, **strict))
        notebook.metadata["course"] = {"changed": changed, **ran_with}
    except UserError:  # not Ctrl-C, which leaves an earlier copy as it is
        store(notebook, target)
        raise
    store(notebook, target)
    print(f"All cells passed: see {target.as_posix()}.")


class Watched(NotebookClient):
    """Shows what cells print as it comes, and which passed of those with an assert."""

    def output(self, outs, msg, display_id, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
        return super().output(outs, msg, display_id, cell_index)

    def execute_cell(self, cell, index):
        super().execute_cell(cell, index)
        printed = "".join(output.get("text", "") for output in cell.get("outputs", []))
        if printed or (cell.cell_type == "code" and "assert" in cell.source):
            print("\n" * (printed[-1:] not in "\n") + f"cell {index + 1}: passed")


def executed():
    """Return path and facts of each copy that ran with the classes as they are now."""
    found = []
    for path in sorted(FOLDER.glob("*.ipynb")):
        with contextlib.suppress(UserError, KeyError):  # damaged, or failed
            book = read_notebook(path)
            facts = {**book.metadata.get("provenance", {}), **book.metadata["course"]}
            if facts["digest"] == _digest(book, facts["classes"]):
                found.append((path, facts))
    return found


def fill(notebook, path):
    """Replace the definitions of the course's classes by ours, and clear all outputs.

    Returns the names of those replaced, as text, and of those of ours in it.
    """
    ours, cells, replaced = our_classes(), [], []
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cells.append((cell, _tree(cell.source, f"{path}, cell {number}")))
    found = {node.name for _, tree in cells for node in _classes(tree)}
    asked, front = next((task for task in TASKS if found & {*task[0]}), ((), ()))
    missing = ", ".join(sorted({*asked} - (found & ours.keys())))
    if missing or not asked:
        wrong = f"lacks {missing}, or our modules do" if asked else "is neither of them"
        raise UserError(f"{path} is not as the course's two notebooks are: it {wrong}")
    front = [name for name in front if name in ours]
    for cell, tree in cells:
        lines = [*io.StringIO(cell.source, newline="")]
        for node in _classes(tree):
            first = min(part.lineno for part in (*node.decorator_list, node)) - 1
            last = lines[node.end_lineno - 1]
            # Not what is asked for, or inside a class that is replaced
            if node.name not in {*asked, *front} or not last:
                continue
            parts = [ours[node.name]]
            if not replaced:
                parts = [IMPORTS, *(ours[name] for name in front), *parts]
            replaced.append(node.name)
            text = textwrap.indent("\n\n\n".join(parts), " " * node.col_offset)
            line_end = last[len(last.rstrip("\r\n")) :]
            text = text.replace("\n", line_end or "\n") + line_end
            blanks = [""] * (node.end_lineno - first - 1)  # other lines stay in place
            lines[first : node.end_lineno] = [text, *blanks]
        cell.source = "".join(lines)
    return ", ".join(dict.fromkeys(replaced)), [*front, *asked]


def our_classes():
    """Return the source of every class of the graded modules, by its name."""
    texts = [path.read_text(encoding="utf-8-sig") for path in SCRIPTS]
    pairs = [(text, c) for text in texts for c in _classes(_tree(text, "our modules"))]
    return {node.name: ast.get_source_segment(text, node) for text, node in pairs}


def _digest(notebook, names):
    """Return a checksum of the cells of a copy, and of our classes as they are now."""
    return digest([contents(notebook), [*map(our_classes().get, names)]])


def _classes(tree):
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return sorted(nodes, key=lambda node: node.lineno)


def _tree(source, where):
    """Return a syntax tree with the line numbers of the source.

    In it, magics and the empty bodies of what is still to be written are ``pass``.
    """
    with contextlib.suppress(SyntaxError):
        return ast.parse(source)
    text = MAGIC.sub(lambda m: m[1] + "pass" + "\n" * m[2].count("\n"), source)
    lines = [*re.split(r"\r\n?|\n", text), "pass"]
    while True:
        try:
            return ast.parse("\n".join(lines))
        except SyntaxError as error:
            header = re.search(r"expected an indented block .* line (\d+)", error.msg)
            if not header and re.search(r"^\s*class\s+\w+", source, re.M):
                where += f", line {error.lineno}"
                raise UserError(f"{where}: {error.msg}: correct it first") from error
            if not header:
                return ast.Module([], [])  # of another language
            place = int(header[1]) - 1
            while not re.search(r":\s*(#.*)?$", lines[place]):
                place += 1
            lines[place] = re.sub(r":\s*(#.*)?$", ": pass", lines[place])


def _set_epochs(notebook, path, epochs):
    """Set the parameter; return what it is now, and was."""
    for cell in notebook.cells:
        then = cell.cell_type == "code" and EPOCHS.search(cell.source)
        if then and re.fullmatch(r"[1-9]\d{0,5}", epochs):
            cell.source = EPOCHS.sub(rf"\g<1>{epochs}", cell.source)
            return f"{epochs} instead of {then[2]}"
    raise UserError(
        f"EPOCHS={epochs} is no positive number, or {path} sets no N_EPOCHS"
    )
