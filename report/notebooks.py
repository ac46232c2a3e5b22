"""From the percent scripts to executed notebooks.

The ``.py`` is the source. A notebook is built from it, executed in a fresh kernel, and
stored only when every cell succeeded.
"""

import asyncio
import datetime
import hashlib
import os
import platform
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.kernelspec import NoSuchKernel
from nbclient import NotebookClient
from nbclient.exceptions import (
    CellExecutionError,
    CellTimeoutError,
    DeadKernelError,
)

from training import processor_name, write_whole

KERNEL = "python3"
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
INJECTED = "injected-parameters"  # papermill's name for it
MAX_OUTPUT = 20_000_000  # characters of a cell; our largest figure has half a million
# For the kernel, so that the same figure is the same bytes: SVG without the time,
# and with ids that are not random
PLOTTING = {
    "SOURCE_DATE_EPOCH": "0",
    "MATPLOTLIBRC": str(Path(__file__).resolve().with_name("matplotlibrc")),
}
# Neither text nor the colours and bars of a terminal; what could not be decoded
BINARY = re.compile("[\x00-\x07\x0e-\x1a\x1c-\x1f\x7f\ufffd]")


class NotebookError(RuntimeError):
    """A notebook that could not be built; the message says where and why."""


def read_script(path):
    """Read a percent script as a notebook without outputs.

    Args:
        path: the ``.py`` file.

    Returns:
        The notebook; its cell ids follow from the order, so that building it twice
        gives the same file.
    """
    notebook = jupytext.read(path, fmt="py:percent")
    for number, cell in enumerate(notebook.cells, 1):
        cell["id"] = f"cell-{number:02d}"
    return notebook


def differences(script, notebook):
    """Compare the cells of a script with those of a stored notebook, by content.

    Args:
        script: the ``.py`` file.
        notebook: the ``.ipynb`` file.

    Returns:
        A list of sentences, empty when the two agree.
    """

    def content(cell):
        tags = cell.metadata.get("tags", [])
        return cell.cell_type, cell.source.rstrip(), sorted(tags)

    expected = [content(cell) for cell in read_script(script).cells]
    stored = [content(cell) for cell in nbformat.read(notebook, as_version=4).cells]
    found = [
        f"cell {number} differs"
        for number, (a, b) in enumerate(zip(expected, stored, strict=False), 1)
        if a != b
    ]
    if len(expected) != len(stored):
        found.append(f"{len(expected)} cells in the script, {len(stored)} stored")
    return found


def inject(notebook, source):
    """Insert a code cell after the one tagged ``switch``, the last of the settings.

    Args:
        notebook: changed in place.
        source: the code of the new cell, tagged ``injected-parameters``.
    """
    where = next(
        number
        for number, cell in enumerate(notebook.cells)
        if "switch" in cell.metadata.get("tags", [])
    )
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": [INJECTED]})
    cell["id"] = INJECTED
    notebook.cells.insert(where + 1, cell)


def remove_injected(notebook):
    """Take the cells of ``inject`` out again, in place."""
    notebook.cells = [
        cell for cell in notebook.cells if INJECTED not in cell.metadata.get("tags", [])
    ]


class _Client(NotebookClient):
    """Executes a notebook; knows the cell it is at and shows what a run displays."""

    current = 0
    finished_lines = 0
    received = 0
    problem = ""  # of an output that nobody could read
    interrupting = None

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        self.current, self.finished_lines, self.received = cell_index, 0, 0
        result = await super().async_execute_cell(cell, cell_index, *args, **kwargs)
        if self.problem:
            raise CellExecutionError("", "", self.problem)
        return result

    def process_message(self, msg, cell, cell_index):
        content = msg["content"]
        size = len(str(content))
        if msg["header"]["msg_type"] != "update_display_data":  # that replaces another
            self.received += size
        if max(size, self.received) > MAX_OUTPUT:
            if not self.interrupting:  # nbclient waits for the cell, perhaps forever
                self.interrupting = asyncio.ensure_future(self.km.interrupt_kernel())
            self.problem = f"its output is larger than {MAX_OUTPUT / 1e6:.0f} MB"
            return None
        text = content.get("text") or content.get("data", {}).get("text/plain") or ""
        if BINARY.search(text):
            self.problem = "it prints binary data, which is no text to show"
        if msg["header"]["msg_type"] == "update_display_data":
            self._show(content["data"].get("text/plain", ""))
        return super().process_message(msg, cell, cell_index)

    def _show(self, text):
        """Print new lines of a display that is replaced again and again.

        The last line is a progress bar while it holds one: only for terminals.
        """
        lines = text.split("\n")
        bar = lines.pop() if "step/s" in lines[-1] or "s/step" in lines[-1] else ""
        for line in filter(None, lines[self.finished_lines :]):
            print(f"\r  {line:<86}", flush=True)
        self.finished_lines = max(self.finished_lines, len(lines))
        if bar and sys.stdout.isatty():
            print(f"\r  {bar:<86}", end="", flush=True)


def execute(notebook, name, folder, timeout):
    """Execute a notebook in a fresh kernel, in place.

    Args:
        notebook: the notebook.
        name: its name, for messages.
        folder: working directory of the kernel.
        timeout: seconds that a cell may take; None for no limit.

    Raises:
        NotebookError: a cell failed, took too long, printed what cannot be shown, or
            its kernel died.
    """
    client = _Client(
        notebook,
        timeout=timeout,
        kernel_name=KERNEL,
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
        store_widget_state=False,
        record_timing=False,
        # Its own log warns at every start, and shows tracebacks at Ctrl-C
        extra_arguments=["--log-level=CRITICAL"],
    )
    try:
        client.execute(env={**os.environ, **PLOTTING})
        notebook.metadata["provenance"] = _provenance()
        return
    except AssertionError:
        # nbclient answers Ctrl-C by ending the kernel, and then trips over that
        raise KeyboardInterrupt from None
    except NoSuchKernel as error:
        raise NotebookError(f"{name}: there is no Jupyter kernel {KERNEL!r}") from error
    except CellExecutionError as error:
        line, text = _failed_line(notebook.cells[client.current], error.traceback)
        why = client.problem or ANSI.sub("", f"{error.ename}: {error.evalue}")
        cause = error
    except CellTimeoutError as error:
        line, text = _failed_line(notebook.cells[client.current], "")
        why, cause = f"it took longer than {timeout} s", error
    except DeadKernelError as error:
        line, text = _failed_line(notebook.cells[client.current], "")
        why, cause = "the kernel died, perhaps for lack of memory", error
    raise NotebookError(
        f"{name}, cell {client.current + 1}, line {line}:\n    {text}\n{why}"
    ) from cause


def _failed_line(cell, traceback):
    """Return number and text of the line of a cell that raised, else the first."""
    lines = cell.source.splitlines()
    pattern = rf"Cell In\[{cell.execution_count}\], line (\d+)"
    found = re.findall(pattern, ANSI.sub("", traceback))
    number = int(found[-1]) if found else 1
    return number, lines[number - 1].strip() if number <= len(lines) else ""


def checksum(path):
    """Return the SHA-256 of a file, empty if there is none."""
    path = Path(path)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _provenance():
    """Say when and on what a notebook was executed."""
    import torch

    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "executed": now.isoformat(" ", "minutes").replace("+00:00", " UTC"),
        "system": f"{platform.system()}, {processor_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def store(notebook, path):
    """Write a notebook, whole or not at all."""
    text = nbformat.writes(notebook) + "\n"
    write_whole(Path(path), text.encode())
