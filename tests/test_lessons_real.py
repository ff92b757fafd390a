"""The commands for a real model at a lesson's end: their stored output; lesson 00 where the model cannot be had."""

import importlib
import json
import re
import shlex

import pytest
from handtuned.lessons import build, paired, record
from handtuned.lessons.__main__ import main
from test_notebooks import FOLDER, SLUGS, cells, every

from handtuned.cli import COMMANDS, Parser, hyphenated

nbformat = pytest.importorskip("nbformat")


def stored(slug):
    return record.printed(FOLDER / f"{slug}.py")


@every
def test_the_stored_output_stands_below_the_command_in_both_languages(slug):
    block = f"```text\n{stored(slug)}\n```"
    chinese = nbformat.read(paired.notebook_file(FOLDER / f"{slug}.py"), as_version=4).cells
    for last, begins in ((cells(slug)[-1].source, "On a real model: "), (chinese[-1].source, "在真实模型上：")):
        assert re.search(rf"^{begins}.+\n\n.+\n\n{re.escape(block)}", last, re.M)


@every
def test_the_stored_output_names_its_machine_and_nobodys_files(slug):
    first, *lines = stored(slug).splitlines()
    assert re.fullmatch(r"\(a CPU with \d+ cores, PyTorch [\d.]+\)", first)
    for place, line in enumerate(lines):
        assert not line.startswith("$ ") or lines[place + 1 : place + 2] not in ([], [""]), f"nothing below {line}"
    assert not re.search(r"(?<![\w.…])/(?:home|root|tmp|work|Users|usr)/", stored(slug))


@every
def test_the_stored_commands_are_still_understood(slug):
    commands = re.findall(r"^\$ (?:torchrun --nproc-per-node \d -m )?handtuned ([^|\n]+)", stored(slug), re.M)
    assert len(commands) == stored(slug).count("$ handtuned") + stored(slug).count("$ torchrun") > 0
    for command in commands:
        name, *words = shlex.split(command)
        parser = Parser()
        importlib.import_module(f"handtuned.{COMMANDS[name][0]}").add_arguments(parser)
        parser.parse_args(hyphenated(words))


def test_record_runs_the_commands_one_after_the_other(tmp_path, monkeypatch, capsys):
    script, kept = tmp_path / "07_try.py", tmp_path / "runs" / "07.txt"
    script.write_text("# %%\n", encoding="utf-8")
    kept.parent.mkdir()
    assert record.printed(script) == ""
    with pytest.raises(ValueError, match="has no commands"):
        record.record(script)
    kept.write_text("$ echo one > here; pwd\n$ cat here; seq 50\nold\n", encoding="utf-8")
    assert main(["record", "07", "--notebooks", str(tmp_path)]) == 0
    first, *lines = record.printed(script).splitlines()
    assert first.startswith("(a CPU with ")
    assert lines[0] == "$ echo one > here; pwd" and lines[2:5] == ["", "$ cat here; seq 50", "one"]
    numbers = [str(number) for number in range(1, 51)]
    assert lines[5:] == [*numbers[: record.FIRST - 1], "…", *numbers[-record.LAST :]]
    before = kept.read_text(encoding="utf-8")
    kept.write_text(before + "\n$ cat nothing\n", encoding="utf-8")
    assert main(["record", "07", "--notebooks", str(tmp_path)]) == 1
    assert "nothing: No such file" in capsys.readouterr().out
    assert kept.read_text(encoding="utf-8") == before + "\n$ cat nothing\n", "a command failed: nothing is written"


def first_cells(monkeypatch):
    """Lesson 00 from its imports to the picture of its run, without its other measurements."""
    code = [cell.source for cell in build.read(FOLDER / f"{SLUGS[0]}.py").cells if cell.cell_type == "code"]
    monkeypatch.chdir(FOLDER)
    return [source for source in code if re.search(r"^import numpy|fetched|told", source, re.M)]


def test_lesson_00_shows_the_stored_output_where_the_model_cannot_be_fetched(monkeypatch, capsys):
    def offline(model):
        raise ValueError("could not fetch SmolLM2")

    monkeypatch.setattr("handtuned.training.sources.resolve", offline)
    namespace = {}
    for source in first_cells(monkeypatch):
        exec(source, namespace)
    told = capsys.readouterr().out
    assert "could not fetch SmolLM2" in told and stored(SLUGS[0]) in told and "no run here" in told
    assert re.search(r"^00\.a measured: \S+ % and \S+ %$", told, re.M) and "00.d measured: 10.80, " in told


def test_lesson_00_runs_the_command_whose_output_is_stored(monkeypatch):
    (run,) = [source for source in first_cells(monkeypatch) if "def handtuned_command" in source]
    (words,) = re.findall(r'handtuned_command\(\s*("finetune".+?),\s*cwd=', run, re.S)
    words = json.loads(f"[{words}]")
    assert f"$ handtuned {' '.join(words)}\n" in stored(SLUGS[0])
