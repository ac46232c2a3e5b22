"""From the percent scripts to executed notebooks.

The ``.py`` is the source. A notebook is built from it, executed in a fresh kernel, and
stored only when every cell succeeded.
"""

import datetime
import logging
import os
import platform
import re
import sys
import tempfile
import warnings
from pathlib import Path

import jupytext
import nbformat
import torch
from bs4 import BeautifulSoup
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbconvert.filters import strip_ansi
from tqdm import tqdm

from support.records import UserError, processor_name, write_whole

CELL_SECONDS = 1200  # a cell that takes longer hangs: no cell trains
INJECTED = "injected-parameters"  # papermill's name for it
MARK = "# injected"  # what such a cell begins with, since editors lose tags
FIRST = [
    "import matplotlib; matplotlib.rcdefaults()",  # whatever a matplotlibrc says
    # This folder, behind the standard library
    "import sys; sys.path.insert(['-packages' in p for p in sys.path].index(True), '')",
]
WIDGET = "application/vnd.jupyter.widget-view+json"
NO_TIME = {"SOURCE_DATE_EPOCH": "0"}  # in a figure: the same one is the same bytes


def read_script(path):
    """Read a percent script as a notebook without outputs, always the same."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata["language_info"] = {"name": "python"}
    for number, cell in enumerate(notebook.cells, 1):
        cell["id"] = f"cell-{number:02d}"
    return notebook


def read_notebook(path):
    """Read a stored notebook; cells that an editor left without an id get one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of cells without an id
            notebook = nbformat.read(path, as_version=4)
            _, notebook = nbformat.validator.normalize(notebook)
            nbformat.validate(notebook)
        return notebook
    except MemoryError:  # says nothing of the file
        raise
    except Exception as error:  # whatever no notebook makes a reader raise
        reason = str(error).split("\n")[0][:80]
        raise UserError(
            f"{path} cannot be read as a notebook ({reason}): restore it, or move it "
            "away, and the same command makes another one"
        ) from error


def is_injected(cell):
    """Return whether a cell was inserted by a command."""
    return INJECTED in cell.metadata.get("tags", []) or cell.source.startswith(MARK)


def execute(notebook, name, timeout=CELL_SECONDS, client=NotebookClient):
    """Execute a notebook in a fresh kernel, in place, and note when and on what."""
    manager = AsyncKernelManager(kernel_spec_manager=OwnKernel())
    # Not between the lines of a client that prints
    hidden = None if client is NotebookClient else True
    bar = tqdm(notebook.cells, name, unit="cell", disable=hidden, leave=False)
    client = client(
        notebook,
        km=manager,
        timeout=timeout,
        coalesce_streams=True,
        record_timing=False,
        shutdown_kernel="immediate",
        # Its own log warns at every start, and shows tracebacks at Ctrl-C
        extra_arguments=["--log-level=CRITICAL", f"--IPKernelApp.exec_lines={FIRST}"],
    )
    number, cell, traceback = 1, notebook.cells[0], ""
    try:
        # Not client.execute(), which replaces the handling of Ctrl-C
        with (
            tempfile.TemporaryDirectory() as settings,
            client.setup_kernel(cleanup_kc=True, env=_environment(settings)),
        ):
            for number, cell in enumerate(bar, 1):
                client.execute_cell(cell, number - 1)
    except KeyboardInterrupt:
        logging.getLogger("asyncio").disabled = True  # that a task was left undone
        raise
    except CellExecutionError as error:
        traceback = strip_ansi(error.traceback)
        why, cause = strip_ansi(f"{error.ename}: {error.evalue}"), error
    except CellTimeoutError as error:
        why, cause = f"it took longer than {timeout} s", error
    except RuntimeError as error:  # that it is dead, or did not answer in time
        why = "the kernel died, perhaps for lack of memory, or does not answer"
        cause = error
    else:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = _without_widgets(cell.outputs, client.widget_state)
        notebook.metadata["provenance"] = _where_and_when()
        return
    count = cell.get("execution_count")
    found = re.findall(rf"Cell In\[{count}\], line (\d+)", traceback)
    line = int(found[-1]) if found else 1
    text = cell.source.split("\n")[line - 1].strip()
    where = f"{name}, cell {number}, line {line}"
    raise UserError(f"{where}:\n    {text}\n{why}") from cause


class OwnKernel(KernelSpecManager):
    """The kernel of this environment, whichever ones the user has installed."""

    def get_kernel_spec(self, kernel_name):
        # Isolated: no variable decides what it imports, nor a file of a library's name
        command = [sys.executable, "-I", "-X", "utf8", "-m", "ipykernel_launcher"]
        return KernelSpec(argv=[*command, "-f", "{connection_file}"], language="python")


def _environment(settings):
    """Return the environment of the kernel, without the user's settings."""
    names = ("MPL", "MATPLOTLIB", "IPYTHON", "JUPYTER_", "PYTHON")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    kept["NO_TRAINING"] = "1"  # which takes hours
    return {**kept, **NO_TIME, "IPYTHONDIR": settings, "MPLCONFIGDIR": settings}


def _without_widgets(outputs, states):
    """Return outputs with what widgets show in place of these, which need a kernel.

    One without words, as a slider, stays.
    """

    def state_of(name):
        return states.get(name.removeprefix("IPY_MODEL_"), {})

    def inside(state):
        children = map(state_of, state.get("children", []))
        return [state, *(each for child in children for each in inside(child))]

    found = []
    for output in outputs:
        view = output.get("data", {}).get(WIDGET)
        widgets = inside(state_of(view["model_id"])) if view else []
        layout = state_of(widgets[0].get("layout") or "") if widgets else {}
        if layout.get("visibility") == "hidden":
            continue  # a bar that is not left
        values = [w["value"] for w in widgets if isinstance(w.get("value"), str)]
        words = BeautifulSoup(" ".join(values), "html.parser").get_text().split()
        if words:
            output["data"] = {"text/plain": " ".join(words)}
        if words or not any("outputs" in widget for widget in widgets):
            found.append(output)
        held = [one for widget in widgets for one in widget.get("outputs", [])]
        found += _without_widgets(map(nbformat.from_dict, held), states)
    return found


def _where_and_when():
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "executed": now.isoformat(" ", "minutes").replace("+00:00", " UTC"),
        "system": f"{platform.system()}, {processor_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def store(notebook, path):
    """Write a notebook, whole or not at all."""
    write_whole(path, (nbformat.writes(notebook) + "\n").encode())
