"""Turn a lesson's script into an executed notebook, and see that the two belong together.

`notebooks/NN_slug.py` (jupytext's py:percent) is the source. `build` writes `NN_slug.ipynb` with the
outputs of a fresh kernel; `check` runs the source again and writes nothing.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

CELL_SECONDS = 120
_UNSET = ("HANDTUNED_BACKEND", "TRITON_INTERPRET")
# tqdm looks for widgets; the interpreter's numpy remarks on every infinity, which a lesson may be about.
_QUIET = "ignore:IProgress not found,ignore::RuntimeWarning:triton.runtime.interpreter"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def notebooks_folder(folder=None) -> Path:
    """Where the lessons' scripts lie.

    Args:
        folder: a path; by default `notebooks` in the current directory, or that directory itself.

    Raises:
        ValueError: no scripts there: an installed package comes without them.
    """
    places = [Path(folder)] if folder else [Path("notebooks"), Path()]
    for place in places:
        if any(place.glob("[0-9][0-9]_*.py")):
            return place.resolve()
    tried = " or ".join(str(place.resolve()) for place in places)
    raise ValueError(f"no lessons (NN_….py) in {tried}: run this in a checkout of the repository, or give --notebooks")


def sources(folder: Path, lessons=()) -> list[Path]:
    """The scripts of the lessons asked for ("05", …), all of them by default.

    Raises:
        ValueError: a lesson has no script.
    """
    found = {path.name[:2]: path for path in sorted(folder.glob("[0-9][0-9]_*.py"))}
    missing = [lesson for lesson in lessons if lesson not in found]
    if missing:
        raise ValueError(f"no notebook {', '.join(missing)} in {folder}; there are {', '.join(found)}")
    return [found[lesson] for lesson in lessons] if lessons else list(found.values())


def read(script: Path):
    """The notebook that a script describes, not executed, with stable cell ids and bare metadata."""
    import jupytext

    notebook = jupytext.read(script)
    notebook.metadata = type(notebook.metadata)(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{script.name[:2]}-{number:02d}"
        cell["metadata"] = {}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def drift(script: Path) -> list[str]:
    """How the committed notebook differs from its script: empty if it does not.

    Raises:
        FileNotFoundError: there is no notebook beside the script.
    """
    import nbformat

    mine, theirs = read(script).cells, nbformat.read(script.with_suffix(".ipynb"), as_version=4).cells
    found = [] if len(mine) == len(theirs) else [f"{len(mine)} cells in the script, {len(theirs)} in the notebook"]
    for number, (ours, other) in enumerate(zip(mine, theirs, strict=False)):
        if ours.cell_type != other.cell_type or ours.source.strip() != other.source.strip():
            found.append(f"cell {number} differs")
    return found


def execute(script: Path):
    """Run a script's cells in a fresh kernel of this very interpreter, in the notebooks' folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
        nbclient.exceptions.CellTimeoutError: a cell took more than 120 s.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class ThisInterpreter(AsyncKernelManager):
        """Whatever kernels the user may have registered."""

        @property
        def kernel_spec(self):
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
            return KernelSpec(argv=command, display_name="Python 3", language="python")

    script = script.resolve()
    checkout = str(script.parent.parent)
    notebook = read(script)
    environment = {name: value for name, value in os.environ.items() if name not in _UNSET}
    # A reader's own IPython settings stay out of it.
    with tempfile.TemporaryDirectory() as settings:
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_manager_class=ThisInterpreter,
            resources={"metadata": {"path": str(script.parent)}},
            record_timing=False,
        )
        environment |= {"IPYTHONDIR": settings, "MPLBACKEND": "agg", "PYTHONWARNINGS": _QUIET}
        client.execute(env=environment)
    for cell in notebook.cells:
        cell["metadata"] = {}
        if cell.cell_type == "code":
            cell["outputs"] = [_normalized(output, checkout) for output in _joined(cell.outputs)]
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def _joined(outputs: list) -> list:
    """Text that arrived in several pieces becomes one output per stream."""
    joined: list = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
            joined[-1]["text"] += output.text
        else:
            joined.append(output)
    return joined


def _normalized(output, checkout: str):
    """Without what differs for no reason: a bar's earlier states, addresses, where things are installed."""
    if output.output_type == "stream":
        lines = [line.rsplit("\r", 1)[-1] for line in output.text.split("\n")]
        text = _ADDRESS.sub("", "\n".join(lines))
        for place in (sys.prefix, checkout, tempfile.gettempdir()):
            text = text.replace(place, "…")
        output["text"] = text
    return output


def build(script: Path) -> Path:
    """Execute a script and write the notebook beside it."""
    import nbformat

    notebook = execute(script)
    target = script.with_suffix(".ipynb")
    with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".part", delete=False, encoding="utf-8") as file:
        nbformat.write(notebook, file)
    os.chmod(file.name, 0o644)
    os.replace(file.name, target)
    return target
