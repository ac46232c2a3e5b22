"""Script and notebook of a pair: whichever of them was edited, nothing is lost.

A stored notebook remembers in its metadata, as ``provenance``, which cells it was made
from. So where the two differ, it can be told which of them was edited since.
"""

import ast
import difflib
import hashlib
import json
from pathlib import Path

import jupytext

from report.notebooks import is_injected, read_notebook, read_script, store
from support.records import UserError, checksum, write_whole

SCRIPTS = (Path("attention.py"), Path("vision_transformer.py"))
# Which the notebooks import
LIBRARIES = tuple(
    Path("support", f"{name}.py")
    for name in ("dataset", "figures", "records", "training")
)
KEPT = Path("build", "kept")  # copies of what had to give way
NOTEBOOK_ONLY = "active-ipynb"  # the tag of cells that are comments in the script
LIKE = 0.6  # how alike an edited cell and the one that it was have to be
DEFINITIONS = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)


# --- What is compared -----------------------------------------------------------------


def handwritten(notebook):
    """Return number and cell of all cells that somebody wrote."""
    return [
        (number, cell)
        for number, cell in enumerate(notebook.cells, 1)
        if cell.source.strip() and not is_injected(cell)
    ]


def contents(notebook):
    """Return type, text and tags of every handwritten cell."""
    return [
        [cell.cell_type, text_of(cell), sorted(cell.metadata.get("tags", []))]
        for _, cell in handwritten(notebook)
    ]


def text_of(cell):
    """Return the source of a cell without what no reader sees."""
    lines = cell.source.split("\n")  # each perhaps with a \r of Windows
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def digest(value):
    """Return a short checksum of plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def cell_checksums(notebook):
    """Return the checksums of all that is compared, one for each cell."""
    return [*map(digest, contents(notebook))]


def _edits(path, notebook, made_from):
    """Say in which cells a notebook, or script, is not what it was made from."""
    found = [
        f'cell {number} of {path} ("{text_of(cell).splitlines()[0][:40]}")'
        for (number, cell), now in zip(
            handwritten(notebook), cell_checksums(notebook), strict=True
        )
        if now not in made_from
    ]
    return found or [f"cells of {path}, moved or deleted"]


def code_checksums():
    """Return checksums of the code here, by file; of a script, one for each cell."""
    found = {path.as_posix(): [checksum(path)] for path in LIBRARIES}
    for path in SCRIPTS:
        cells = contents(read_script(path))
        found[path.name] = [digest(text) for kind, text, _ in cells if kind == "code"]
    return found


def provenance(notebook):
    """Return what a notebook remembers of its making, a dict, perhaps empty."""
    found = notebook.metadata.get("provenance")
    return found if isinstance(found, dict) else {}


def edited_since(notebook):
    """Return the files of which the code was edited since a notebook was executed."""
    then = provenance(notebook).get("code", {})
    return [
        name for name, now in code_checksums().items() if now != then.get(name, now)
    ]


def first_not_executed(notebook, script):
    """Return the number of the first code cell that has not the outputs of its code.

    None if all were executed by a command, as they are now and in this order, and none
    has failed since.
    """
    then = provenance(notebook).get("code", {}).get(script.name, [])
    cells = [(n, c) for n, c in handwritten(notebook) if c.cell_type == "code"]
    for place, (number, cell) in enumerate(cells):
        was_executed = then[place : place + 1] == [digest(text_of(cell))]
        has_failed = any(output.output_type == "error" for output in cell.outputs)
        if not was_executed or not cell.get("execution_count") or has_failed:
            return number
    return len(notebook.cells) if len(then) > len(cells) else None


# --- What is done ---------------------------------------------------------------------


def bring_together(script, notebook, keep=None):
    """Give script and notebook the same cells, those of the one that was edited.

    Where both were, ``keep``, "notebook" or "script", says which one stays, and the
    other is copied first; without it a ``UserError`` names the cells. Outputs stay with
    the code that they belong to.
    """
    if not notebook.is_file():
        return
    seen = checksum(script), checksum(notebook)
    ours, theirs = read_script(script), read_notebook(notebook)
    made_from = provenance(theirs).get("source")
    was_edited = made_from != cell_checksums(theirs), made_from != cell_checksums(ours)
    if contents(ours) == contents(theirs):
        if any(was_edited):  # saved by JupyterLab in both, or the checksum is gone
            _store(theirs, notebook)
        return
    if was_edited == (True, True):
        if keep is None:
            # Where that is not known, each is compared with the other
            places = _edits(notebook, theirs, made_from or cell_checksums(ours))
            places += _edits(script, ours, made_from or cell_checksums(theirs))
            raise UserError(
                f"{notebook} and {script} were both edited, or were never the same "
                f"({', '.join(places[:4])}{' and more' * (len(places) > 4)}): type the "
                "same again with KEEP=notebook or KEEP=script; the other one is copied "
                f"into {KEPT.as_posix()} first"
            )
        was_edited = keep == "notebook", keep == "script"
        _copy(script if keep == "notebook" else notebook)
    text, dropped = None, []
    if was_edited[0]:
        text, dropped = _script_with_cells(ours, theirs, notebook)
    else:
        _use_cells(theirs, ours)
    if (checksum(script), checksum(notebook)) != seen:
        raise UserError(
            f"{script} or {notebook} was saved just now: type the same again"
        )
    if text is not None:
        if dropped:
            _copy(script)
        write_whole(script, text.encode())
        print(f"{notebook} was edited: its cells are in {script} now, too.")
    _store(theirs, notebook)


def _store(notebook, path):
    facts = {**provenance(notebook), "source": cell_checksums(notebook)}
    notebook.metadata["provenance"] = facts
    store(notebook, path)


def _copy(path):
    copy = KEPT / f"{path.stem}-{checksum(path)[:8]}{path.suffix}"
    write_whole(copy, path.read_bytes())
    print(f"{path} as it was is kept as {copy.as_posix()}: copy from it what you miss.")


def _use_cells(notebook, ours):
    """Give a notebook the cells of a script, in place; equal code keeps its outputs."""
    executed = {text_of(c): c for c in notebook.cells if c.cell_type == "code"}
    injected = [
        (cell, notebook.cells[place - 1].source)
        for place, cell in enumerate(notebook.cells)
        if is_injected(cell)
    ]
    for cell in ours.cells:
        if cell.cell_type == "code" and text_of(cell) in executed:
            same = executed[text_of(cell)]
            cell.update(outputs=same.outputs, execution_count=same.execution_count)
    notebook.cells = ours.cells
    for cell, before in injected:
        sources = [other.source for other in notebook.cells]
        place = sources.index(before) + 1 if before in sources else len(sources)
        notebook.cells.insert(place, cell)


def _script_with_cells(ours, theirs, notebook):
    """Return the text of a script with the cells of a notebook, and the cells it loses.

    Editors drop metadata, so cells of the notebook get back what the script knows of
    them. A new cell that does more than define becomes a comment in the script, which
    has to be imported without doing anything.
    """
    left, cells, origin = [c for _, c in handwritten(ours)], handwritten(theirs), {}
    for cutoff in (1.0, LIKE):  # first the cells that are as they were
        for number, cell in cells:
            if number in origin:
                continue
            texts = {text_of(c): c for c in left if c.cell_type == cell.cell_type}
            best = difflib.get_close_matches(text_of(cell), texts, 1, cutoff)
            if best:
                origin[number] = texts[best[0]]
                left.remove(origin[number])
    for number, cell in cells:
        name = f"{notebook}, cell {number}"
        if cell.get("attachments"):
            raise UserError(
                f"{name} holds a pasted picture, which a script cannot hold: save it "
                "as a file, and name the file in the cell"
            )
        is_new = number not in origin
        known = {} if is_new else origin[number].metadata
        cell.metadata.update({**known, **cell.metadata})
        tags = cell.metadata.get("tags", [])
        if cell.cell_type != "code" or NOTEBOOK_ONLY in tags:
            continue
        if is_new and not _only_defines(cell.source):
            cell.metadata["tags"] = sorted([*tags, NOTEBOOK_ONLY])
            continue
        try:
            ast.parse(cell.source)
        except SyntaxError as error:
            raise UserError(
                f"{name} could not be imported ({error.msg}, line {error.lineno}): put "
                "it right, or move a magic into a cell of its own"
            ) from error
    merged = ours.copy()
    merged["cells"] = [cell for _, cell in cells]
    text = jupytext.writes(merged, fmt="py:percent")
    read_again = contents(jupytext.reads(text, fmt="py:percent"))
    for place, (number, _) in enumerate(cells):
        if read_again[place : place + 1] != contents(merged)[place : place + 1]:
            raise UserError(
                f"{notebook}, cell {number} cannot be written as part of a script: "
                "perhaps it holds a control character, or a line begins with # %% or %%"
            )
    return text, left


def _only_defines(source):
    """Return whether code has no effect, in a script that is imported."""
    try:
        nodes = ast.parse(source).body
    except SyntaxError:  # perhaps a magic of the notebook
        return False
    return all(isinstance(node, DEFINITIONS) or _is_constant(node) for node in nodes)


def _is_constant(node):
    """Return whether a statement is a docstring, or gives a literal a name."""
    try:
        ast.literal_eval(node.value)
    except (AttributeError, ValueError):
        return False
    return True
