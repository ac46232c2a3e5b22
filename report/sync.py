"""Script and notebook of a pair: whichever of them was edited, nothing is lost.

A stored notebook remembers in its metadata, as ``provenance``, which cells it was made
from. So where the two differ, it can be told which of them was edited since.
"""

import ast
import base64
import difflib
import hashlib
import json
import re
import symtable
from pathlib import Path
from urllib.parse import quote

import jupytext

from report.notebooks import is_injected, read_notebook, read_script, store
from support.records import UserError, checksum, write_whole

SCRIPTS = (Path("attention.py"), Path("vision_transformer.py"))
# Which the notebooks import
LIBRARIES = tuple(
    Path("support", f"{name}.py")
    for name in ("analysis", "dataset", "figures", "records", "training")
)
KEPT = Path("build", "kept")  # copies of what had to give way
PICTURES = "pictures"  # beside the script: what was pasted into a notebook
SIDES = ("notebook", "script")
NOTEBOOK_ONLY = "active-ipynb"  # the tag of cells that are comments in the script
LIKE = 0.6  # how alike an edited cell and the one that it was have to be
DEFINITIONS = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
ASSIGNMENTS = (ast.Assign, ast.AnnAssign)


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
    cells = [cell for _, cell in handwritten(notebook)]
    return [[cell.cell_type, text_of(cell), tags_of(cell)] for cell in cells]


def text_of(cell):
    """Return the source of a cell; blanks at the end of a line may matter, so stay."""
    return cell.source.replace("\r\n", "\n").strip("\n")


def tags_of(cell):
    """Return the tags of a cell, sorted, without that of code where it is none."""
    tags = set(cell.metadata.get("tags", []))
    return sorted(tags - {NOTEBOOK_ONLY} if cell.cell_type != "code" else tags)


def _set_tags(cell, tags):
    cell.metadata.pop("tags", None)
    if tags:
        cell.metadata["tags"] = sorted(tags)


def digest(value):
    """Return a short checksum of plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def cell_checksums(notebook):
    """Return the checksums of all that is compared, one for each cell."""
    return [*map(digest, contents(notebook))]


def _edits(path, notebook, made_from):
    """Say in which cells a notebook, or script, is not what it was made from."""
    cells = zip(handwritten(notebook), cell_checksums(notebook), strict=True)
    found = [
        f'cell {number} of {path} ("{text_of(cell).splitlines()[0][:40]}")'
        for (number, cell), now in cells
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
    the code that they belong to, and pasted pictures become files.
    """
    if not notebook.is_file():
        return
    seen = checksum(script), checksum(notebook)
    ours, theirs = read_script(script), read_notebook(notebook)
    pictures = _take_pictures(theirs, notebook, script.parent / PICTURES)
    facts = provenance(theirs)
    made_from = facts.get("source")
    edited_notebook = made_from != cell_checksums(theirs)
    edited_script = made_from != cell_checksums(ours)
    are_same = contents(ours) == contents(theirs)
    if are_same and not (edited_notebook or edited_script):
        return
    use_notebook = edited_notebook
    if edited_notebook and edited_script and not are_same:
        if keep not in SIDES:
            # Where that is not known, each is compared with the other
            places = _edits(notebook, theirs, made_from or cell_checksums(ours))
            places += _edits(script, ours, made_from or cell_checksums(theirs))
            raise UserError(
                f"{notebook} and {script} were both edited, or were never the same "
                f"({', '.join(places[:4])}{' and more' * (len(places) > 4)}): type the "
                "same again with KEEP=notebook or KEEP=script; the other one is copied "
                f"into {KEPT.as_posix()} first"
            )
        use_notebook = keep == "notebook"
        _copy(script if use_notebook else notebook)
    text, dropped = None, []
    if use_notebook and not are_same:
        text, dropped = _script_with_cells(ours, theirs, script, notebook)
    elif not are_same:
        _use_cells(theirs, ours)
        pictures = {}
    if (checksum(script), checksum(notebook)) != seen:
        both = f"{script} or {notebook}"
        raise UserError(f"{both} was saved just now: type the same again")
    for path, content in pictures.items():
        write_whole(path, content)
        print(f"A picture pasted into {notebook} is {path.as_posix()} now.")
    if text is not None:
        if dropped:
            _copy(script)
        write_whole(script, text.encode())
        print(f"{notebook} was edited: its cells are in {script} now, too.")
    theirs.metadata["provenance"] = {**facts, "source": cell_checksums(theirs)}
    store(theirs, notebook)


def _copy(path):
    copy = KEPT / f"{path.stem}-{checksum(path)[:8]}{path.suffix}"
    write_whole(copy, path.read_bytes())
    print(f"{path} as it was is kept as {copy.as_posix()}: copy from it what you miss.")


def _take_pictures(notebook, name, folder):
    """Let cells name files instead of their pasted pictures; return the files."""
    files = {}
    for number, cell in enumerate(notebook.cells, 1):
        pasted = cell.pop("attachments", {})
        for title in sorted(pasted, key=len, reverse=True):
            try:
                [(kind, data), *_] = pasted[title].items()
                content = base64.b64decode(data)
            except ValueError as error:
                raise UserError(
                    f"{name}, cell {number}: the picture {title[:40]!r} cannot be read "
                    f"({error}): delete it, or paste it again"
                ) from error
            stem = re.sub(r"\W+", "-", Path(title).stem)[:40]
            ending = re.sub(r"\W.*", "", kind.rpartition("/")[2])  # of svg+xml, too
            # Its checksum in its name, no other file is ever overwritten
            sum_ = hashlib.sha256(content).hexdigest()[:8]
            path = folder / f"{stem}-{sum_}.{ending}"
            files[path] = content
            for written in (title, quote(title)):
                link = f"attachment:{written}"
                cell.source = cell.source.replace(link, path.as_posix())
    return files


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


def _script_with_cells(ours, theirs, script, notebook):
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
    code, rest = [], {}
    for number, cell in cells:
        known = origin[number].metadata if number in origin else {}
        cell.metadata.update({**known, **cell.metadata})
        _set_tags(cell, tags_of(cell))
        if cell.cell_type != "code":
            continue
        given = {"": True} if number in origin else _given(cell.source)
        if given is None or not all(given.values()) or NOTEBOOK_ONLY in tags_of(cell):
            rest[number] = cell
            continue
        code.append(cell.source)
        try:
            compile(cell.source, "cell", "exec")
        except SyntaxError as error:
            raise UserError(
                f"{notebook}, cell {number} could not be imported ({error.msg}, line "
                f"{error.lineno}): put it right, or move a magic into a cell of its own"
            ) from error
    _tag(rest, code, script, notebook)
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


# --- What is code in the script, too --------------------------------------------------


def _tag(rest, code, script, notebook):
    """Make comments of cells, by number, unless they give values that code reads.

    A computed value may take long, or draw, so it stays one until code needs it.
    """
    given = {number: set(_given(cell.source) or ()) for number, cell in rest.items()}
    inner = [_reads(rest[number].source, 1) for number in given if given[number]]
    read, said = set().union(*map(_reads, code), *inner), []
    for number, cell in reversed(rest.items()):  # what is read comes before
        tags = set(tags_of(cell))
        if given[number] & read:
            read |= _reads(cell.source)
            _set_tags(cell, tags - {NOTEBOOK_ONLY})
        elif NOTEBOOK_ONLY not in tags:
            _set_tags(cell, tags | {NOTEBOOK_ONLY})
            first = text_of(cell).splitlines()[0][:40]
            said.append(f"cell {number} ({first})")
    if said:
        print(
            f"Only in {notebook}, and comments in {script}, as they do more than "
            f"define: {', '.join(reversed(said))}. To import a function, give it a "
            "cell of its own."
        )


def _given(source):
    """Return which names code gives to values, and whether those are literals.

    None if it does more than that, define and import.
    """
    given = {}
    try:
        compile(source, "cell", "exec")
    except (SyntaxError, ValueError):  # perhaps a magic of the notebook
        return None
    for node in ast.parse(source).body:
        try:
            ast.literal_eval(getattr(node, "value", None))
            is_literal = True
        except (TypeError, ValueError):
            is_literal = False
        names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        names = [n.id for n in names if isinstance(n.ctx, ast.Store)]
        if isinstance(node, ASSIGNMENTS) and names:
            given.update(dict.fromkeys(names, is_literal))
        elif not isinstance(node, DEFINITIONS) and not (
            isinstance(node, ast.Expr) and is_literal  # a docstring
        ):
            return None
    return given


def _reads(source, depth=0):
    """Return the global names that code reads; with depth 1, functions and classes."""
    tables = [symtable.symtable(source, "cell", "exec")]
    for table in tables:
        tables += table.get_children()
    symbols = [symbol for table in tables[depth:] for symbol in table.get_symbols()]
    return {s.get_name() for s in symbols if s.is_global() and s.is_referenced()}
