"""Turn a lesson's script into an executed notebook, and see that the two belong together.

`notebooks/NN_slug.py` (jupytext's py:percent) is the source. `build` writes `NN_slug.ipynb` with the
outputs of a fresh kernel, and of the same run `zh/NN_slug.ipynb` with the Chinese text (paired.py);
`text` writes both anew from changed texts over the outputs that are there; `check` runs the source again
and writes nothing.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

from . import course, paired, record
from .exercise import exercises_of

CELL_SECONDS = 900  # a hung cell ends; lesson 00 fine-tunes for a minute or two, on a slow machine for several
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
    """The notebook that a script describes, not executed, with stable cell ids and bare metadata.

    What stands around every lesson is added: the line below the title, the cell that sets up Colab, the reader's
    guesses, what the commands at its end printed, papers.
    """
    import jupytext
    from nbformat.v4 import new_code_cell

    notebook = jupytext.read(script)
    notebook.metadata = type(notebook.metadata)(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    lesson = script.name[:2]
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{lesson}-{number:02d}"
        cell["metadata"] = {}
    notebook.cells.insert(1, new_code_cell(course.SETUP, id=f"{lesson}-setup"))
    notebook.cells.insert(-1, new_code_cell(course.GUESSES.format(number=lesson), id=f"{lesson}-guesses"))
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    course.dress(notebook, script.stem, "en", takes(script), paired.text_file(script).exists(), record.printed(script))
    return notebook


def takes(script: Path) -> int:
    """Minutes that a lesson takes."""
    return course.minutes(script.name[:2], paired.english(script), len(exercises_of(script.name[:2])))


def drift(script: Path) -> list[str]:
    """How the committed notebooks differ from their sources: empty if they do not.

    Raises:
        FileNotFoundError: there is no notebook beside the script.
    """
    import nbformat

    made = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    found = _differences(read(script), made)
    if not paired.text_file(script).exists():
        return found
    if wrong := paired.trouble(script):
        return found + wrong
    if not paired.notebook_file(script).exists():
        return [*found, "the Chinese notebook has not been written"]
    theirs, ours = nbformat.read(paired.notebook_file(script), as_version=4), in_chinese(made, script)
    if not found and theirs != ours:
        found = _differences(ours, theirs) or ["its outputs are of another run"]
        found = [f"in Chinese: {line}" for line in found]
    return found


def _differences(ours, theirs) -> list[str]:
    mine, other = ours.cells, theirs.cells
    found = [] if len(mine) == len(other) else [f"{len(mine)} cells in the source, {len(other)} in the notebook"]
    for number, (one, two) in enumerate(zip(mine, other, strict=False)):
        if one.cell_type != two.cell_type or one.source.strip() != two.source.strip():
            found.append(f"cell {number} differs")
    return found


def execute(script: Path):
    """Run a script's cells in a fresh kernel of this very interpreter, in the notebooks' folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
        nbclient.exceptions.CellTimeoutError: a cell took more than `CELL_SECONDS`.
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
    # A reader's own IPython settings and guesses stay out of it.
    with tempfile.TemporaryDirectory() as settings:
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_manager_class=ThisInterpreter,
            resources={"metadata": {"path": str(script.parent)}},
            record_timing=False,
        )
        environment |= {
            "IPYTHONDIR": settings,
            "MPLBACKEND": "agg",
            "PYTHONWARNINGS": _QUIET,
            "XDG_DATA_HOME": settings,
        }
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


def in_chinese(notebook, script: Path):
    """An executed notebook with the Chinese text: the same code, outputs and ids.

    Raises:
        ValueError: the Chinese text is not of this English one.
    """
    chinese = paired.translated(notebook, script)
    course.dress(chinese, script.stem, "zh", takes(script), True, record.printed(script))
    return chinese


def copies(script: Path) -> list[Path]:
    """Write a lesson without outputs into `mine/` and `mine/zh/`, to be worked in; what is there already stays.

    Returns:
        the copies that were written.
    """
    notebook, mine = read(script), script.parent / "mine"
    targets = {mine / f"{script.stem}.ipynb": notebook}
    if paired.text_file(script).exists():
        targets[mine / "zh" / f"{script.stem}.ipynb"] = in_chinese(notebook, script)
    new = {target: content for target, content in targets.items() if not target.exists()}
    for target, content in new.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        write(content, target)
    return list(new)


def build(script: Path) -> list[Path]:
    """Execute a script and write the notebook beside it, and the Chinese one where there is a Chinese text.

    Raises:
        ValueError: the Chinese text is not of this English one; before anything is run.
    """
    if paired.text_file(script).exists() and (wrong := paired.trouble(script)):
        raise ValueError("\n  ".join(wrong))
    return _write(execute(script), script)


def text(script: Path) -> list[Path]:
    """Write both notebooks with the texts of today over the outputs of their last run.

    Raises:
        FileNotFoundError: there is no notebook yet.
        ValueError: the code has changed since it was run, or the Chinese text is not of this English one.
    """
    import nbformat

    fresh, made = read(script), nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    code = [[cell for cell in notebook.cells if cell.cell_type == "code"] for notebook in (fresh, made)]
    # The first sets up Colab, and does nothing where lessons are built.
    if [cell.source for cell in code[0][1:]] != [cell.source for cell in code[1][1:]]:
        raise ValueError(f"{script.stem}: the code has changed since it was run; build it")
    for cell, run in zip(*code, strict=True):
        cell["outputs"], cell["execution_count"] = run.outputs, run.execution_count
    return _write(fresh, script)


def _write(notebook, script: Path) -> list[Path]:
    targets = {script.with_suffix(".ipynb"): notebook}
    if paired.text_file(script).exists():
        targets[paired.notebook_file(script)] = in_chinese(notebook, script)
    for target, content in targets.items():
        write(content, target)
    return list(targets)


def write(notebook, target: Path) -> None:
    """Write a notebook whole or not at all."""
    import nbformat

    with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".part", delete=False, encoding="utf-8") as file:
        nbformat.write(notebook, file)
    os.chmod(file.name, 0o644)
    os.replace(file.name, target)
