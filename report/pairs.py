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

from report.notebooks import INJECTED, read_notebook, read_script, store
from training import UserError, checksum, write_whole

SCRIPTS = (Path("attention.py"), Path("vision_transformer.py"))
LIBRARIES = (Path("figures.py"), Path("training.py"))  # which the notebooks import
KEPT = Path("build", "kept")  # copies of what had to give way
NOTEBOOK_ONLY = "active-ipynb"  # the tag of cells that are comments in the script
LIKE = 0.6  # how alike an edited cell and the one that it was have to be
DEFINITIONS = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Import,
    ast.ImportFrom,
)


# --- What is compared -----------------------------------------------------------------


def handwritten(notebook):
    """Return the cells that somebody wrote: not empty, and not injected."""
    return [
        cell
        for cell in notebook.cells
        if cell.source.strip() and INJECTED not in cell.metadata.get("tags", [])
    ]


def contents(notebook):
    """Return type, text and tags of every handwritten cell."""
    return [
        [cell.cell_type, _text(cell), sorted(cell.metadata.get("tags", []))]
        for cell in handwritten(notebook)
    ]


def _text(cell):
    lines = cell.source.replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def digest(value):
    """Return a short checksum of plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def differences(script, notebook):
    """Compare the cells of a script and a stored notebook, by content.

    Returns where they differ, in words; an empty list when they agree.
    """
    ours, theirs = contents(read_script(script)), contents(read_notebook(notebook))
    matcher = difflib.SequenceMatcher(
        None, [*map(digest, ours)], [*map(digest, theirs)], autojunk=False
    )
    found = []
    for kind, start, end, their_start, their_end in matcher.get_opcodes():
        name, places = Path(notebook).name, range(their_start + 1, their_end + 1)
        if kind == "delete":
            name, places = Path(script).name, range(start + 1, end + 1)
        if kind != "equal":
            found += [f"cell {number} of {name}" for number in places]
    return found


def source_of(notebook):
    """Return the checksum of all that is compared."""
    return digest(contents(notebook))


def code():
    """Return checksums of the code here, by file; of a script, one for each cell."""
    found = {path.name: [checksum(path)] for path in LIBRARIES}
    for path in SCRIPTS:
        cells = contents(read_script(path))
        found[path.name] = [digest(text) for kind, text, _ in cells if kind == "code"]
    return found


def edited_since(notebook):
    """Return the files of which the code was edited since a notebook was executed."""
    then = notebook.metadata.get("provenance", {}).get("code", {})
    return [name for name, now in code().items() if now != then.get(name)]


def not_executed(notebook, script):
    """Return the numbers of the code cells that were edited or cleared since."""
    then = notebook.metadata.get("provenance", {}).get("code", {}).get(script.name, [])
    return [
        number
        for number, cell in enumerate(notebook.cells, 1)
        if cell.cell_type == "code" and cell.source.strip()
        if INJECTED not in cell.metadata.get("tags", [])
        if not cell.get("execution_count") or digest(_text(cell)) not in then
    ]


# --- What is done ---------------------------------------------------------------------


def bring_together(script, notebook, keep=None):
    """Bring the cells of an edited notebook into its script, and say so.

    Where only the script was edited, nothing has to be done: the notebook is made of it
    again. Where both were, ``keep``, "notebook" or "script", says which one stays, and
    the other is copied first; without it a ``UserError`` names the cells.
    """
    if not notebook.is_file():
        return
    if keep == "script":
        if not _agree(script, notebook):
            _copy(notebook)
        return
    theirs, ours = read_notebook(notebook), read_script(script)
    made_from = theirs.metadata.get("provenance", {}).get("source")
    if contents(ours) != contents(theirs):
        was_edited = made_from != source_of(theirs), made_from != source_of(ours)
        if keep is None and was_edited == (False, True):
            return
        if keep is None and was_edited == (True, True):
            places = differences(script, notebook)
            raise UserError(
                f"{notebook} and {script} were both edited, or were never the same "
                f"({', '.join(places[:5])}{' and more' * (len(places) > 5)}): type the "
                "same again with KEEP=notebook or KEEP=script; the other one is copied "
                f"into {KEPT.as_posix()} first"
            )
        text, dropped = _script_with_cells(ours, theirs, notebook)
        if was_edited[1] or dropped:
            _copy(script)
        write_whole(script, text.encode())
        print(f"{notebook} was edited: its cells are in {script} now, too.")
    if made_from != source_of(theirs):
        theirs.metadata.setdefault("provenance", {})["source"] = source_of(theirs)
        store(theirs, notebook)


def _agree(script, notebook):
    try:
        return not differences(script, notebook)
    except UserError:  # it is no notebook
        return False


def _copy(path):
    copy = KEPT / f"{path.stem}-{checksum(path)[:8]}{path.suffix}"
    write_whole(copy, path.read_bytes())
    print(f"{path} as it was is kept as {copy.as_posix()}.")


def _script_with_cells(ours, theirs, notebook):
    """Return the text of a script with the cells of a notebook, and what that drops.

    Editors drop tags, so the cells of the notebook get those of the script back.
    """
    left, cells, origin = handwritten(ours), handwritten(theirs), {}
    for cutoff in (1.0, LIKE):  # first the cells that are as they were
        for number, cell in enumerate(cells):
            if number in origin:
                continue
            texts = {_text(c): c for c in left if c.cell_type == cell.cell_type}
            best = difflib.get_close_matches(_text(cell), texts, 1, cutoff)
            if best:
                origin[number] = texts[best[0]]
                left.remove(origin[number])
    for number, cell in enumerate(cells):
        name = f"{notebook}, cell {number + 1}"
        if cell.get("attachments"):
            raise UserError(
                f"{name} holds a pasted picture, which a script cannot hold: save it "
                "as a file, and name the file in the cell"
            )
        tags = set(origin.get(number, cell).metadata.get("tags", []))
        is_action = cell.cell_type == "code" and not _only_defines(cell)
        if is_action and number not in origin:
            tags.add(NOTEBOOK_ONLY)
        elif is_action and NOTEBOOK_ONLY not in tags and _only_defines(origin[number]):
            print(f"{name} does something now whenever its script is imported.")
        cell.metadata.pop("tags", None)
        if tags:
            cell.metadata["tags"] = sorted(tags)
    merged = ours.copy()
    merged["cells"] = cells
    text = jupytext.writes(merged, fmt="py:percent")
    read_again = contents(jupytext.reads(text, fmt="py:percent"))
    for number, cell in enumerate(contents(merged)):
        if cell not in read_again[number : number + 1]:
            raise UserError(
                f"{notebook}, cell {number + 1} cannot be written as part of a script: "
                "does it hold a line that begins with %%, or a control character?"
            )
    return text, left


def _only_defines(cell):
    try:
        nodes = ast.parse(cell.source).body
    except SyntaxError:  # or a magic of the notebook
        return False
    return all(
        isinstance(node, DEFINITIONS)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in nodes
    )
