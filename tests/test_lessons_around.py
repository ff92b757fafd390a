"""What stands around the lessons: guesses, progress, solutions, Colab, copies to work in, drawings."""

import json
import re
import subprocess
import sys
from itertools import combinations
from types import ModuleType

import pytest
from handtuned.lessons import build, course, drawings, exercise, reader
from source_tree import ROOT
from test_notebooks import FOLDER, SLUGS, cells, every, outputs

from handtuned import lessons
from handtuned.gpu.driver import WRITTEN_FOR

pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """As in a reader's notebook, with a folder of its own; answers to `input` are put into the list."""
    answers, asked = [], []

    def answer(prompt):
        asked.append(prompt)
        if not answers:
            raise EOFError
        return answers.pop(0)

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(reader, "in_notebook", lambda: True)
    monkeypatch.setattr("builtins.input", answer)
    return answers, asked


def test_the_guess_comes_first_and_is_asked_for_once(notebook, capsys):
    answers, asked = notebook
    answers.append(" 3 times ")
    lessons.guess("07.d", "how many times?")
    assert asked == ["07.d guess first: how many times? "]
    lessons.measured("07.d", "16 ×")
    assert "07.d measured: 16 ×  (you guessed: 3 times)" in capsys.readouterr().out
    answers.append("16")
    lessons.guess("07.d", "how many times?")
    assert len(asked) == 1 and "You guessed: 3 times" in capsys.readouterr().out, "no second guess after the result"
    assert json.loads(reader.kept_in().read_text(encoding="utf-8"))["guesses"] == {
        "07.d": {"question": "how many times?", "guess": "3 times", "measured": "16 ×"}
    }


def test_the_page_of_guesses(notebook, capsys):
    answers, _ = notebook
    lessons.guesses()
    assert capsys.readouterr().out == "no guesses yet\n"
    answers.append("a | b")
    lessons.guess("07.a", "what?")
    lessons.measured("07.a", "b")
    lessons.guess("08.a", "and here?")
    capsys.readouterr()
    lessons.guesses()
    page = capsys.readouterr().out.splitlines()
    assert [line.split() for line in page] == [
        ["question", "your", "guess", "measured"],
        ["07.a", "what?", "a", "|", "b", "b"],
        ["08.a", "and", "here?", "–", "–"],
    ]
    lessons.guesses("08")
    assert "07.a" not in capsys.readouterr().out


@pytest.mark.parametrize("error", [EOFError, OSError, NotImplementedError])
def test_where_nobody_can_answer_nothing_stops(notebook, monkeypatch, capsys, error):
    def nobody(prompt):
        raise error

    monkeypatch.setattr("builtins.input", nobody)
    lessons.guess("07.a", "what?")
    lessons.measured("07.a", "b")
    assert capsys.readouterr().out == "07.a guess first: what?\n07.a measured: b\n"
    assert "guess" not in reader.recall()["guesses"]["07.a"]


@pytest.mark.parametrize(
    ("key", "question"),
    [("7.a", "what?"), ("07.1", "what?"), ("07", "what?"), ("13.a", "what?"), (7, "what?"), ("07.a", " "), ("07.a", 3)],
)
def test_a_guess_needs_a_key_and_a_question(notebook, key, question):
    with pytest.raises(ValueError, match=r"key must be|question must say"):
        lessons.guess(key, question)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: lessons.measured("7", "3"), "key must be a lesson and a letter"),
        (lambda: lessons.guesses("7"), 'lesson must be one of "00"…"12", got \'7\''),
        (lambda: lessons.check(2.1, print), 'key must be a lesson and a number, such as "07.1", got 2.1'),
        (lambda: lessons.solution("07"), "key must be a lesson and a number"),
        (lambda: lessons.hint(None), "key must be a lesson and a number"),
        (lambda: lessons.hint("02.1", "1"), "n must be 1…2, got '1'"),
    ],
)
def test_a_bad_key_is_said_in_one_line(notebook, call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_outside_of_a_notebook_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda prompt: "3")
    lessons.guess("07.a", "what?")
    lessons.check("00.1", lambda count: count / 2**30)
    assert not reader.kept_in().exists()


def test_progress(notebook, capsys):
    stub = exercise.exercises_of("00")["00.1"].stub
    lessons.check("00.1", stub)
    assert reader.recall()["answers"] == {}, "an untouched stub is not a try"
    lessons.check("00.1", lambda count: count)
    lessons.check("00.1", lambda count: count / 2**30)
    lessons.check("00.1", lambda count: count)
    lessons.check("03.1", lambda *_: None)
    assert reader.recall()["answers"]["00.1"] == {"tries": 3, "right": True}, "once right is right"
    capsys.readouterr()
    lessons.progress()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 14
    assert rows[1].split() == ["00", "1", "of", "2", "–", "0"] and rows[4].split() == [
        "03",
        "0",
        "of",
        "5",
        "03.1",
        "0",
    ]


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_file_that_is_not_ours_is_left_alone(notebook, text):
    reader.kept_in().parent.mkdir(parents=True)
    reader.kept_in().write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="does not hold a reader's guesses"):
        lessons.progress()
    assert reader.kept_in().read_text(encoding="utf-8") == text


def test_a_solution_is_shown_after_a_try_or_on_demand(notebook, capsys):
    lessons.solution("07.2")
    assert "try it first" in capsys.readouterr().out
    lessons.check("07.2", lambda *_: None)
    capsys.readouterr()
    lessons.solution("07.2")
    assert "def lora_forward" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"key must be one of 07\.1"):
        lessons.solution("07.99")


def test_every_solution_can_be_shown_with_its_kernels(notebook, capsys):
    for lesson in reader.LESSONS:
        for key in exercise.exercises_of(lesson):
            lessons.solution(key, now=True)
            shown = capsys.readouterr().out
            assert "def " in shown or "lambda" in shown, key
            for kernel in re.findall(r"^\s*(_\w+_kernel)\[", shown, re.M):
                assert f"def {kernel}(" in shown, f"{key} shows the kernel that it launches"


@every
def test_every_prompt_asks_for_its_guess(slug):
    """Where the text says to write a guess down, the code that follows asks for it, in one wording."""
    asked, waiting = [], False
    for cell in cells(slug):
        if cell.cell_type == "markdown":
            assert not re.search(r"\*\*(Prediction|Guess)", cell.source)
            waiting = waiting or bool(re.search(r"\*\*Write down your\s+guess", cell.source))
        elif "lessons.guess(" in cell.source:
            assert waiting and cell.source.startswith("lessons.guess("), "before anything is measured"
            waiting = False
            asked += re.findall(r'lessons\.guess\(\s*"([^"]+)"', cell.source)
    assert not waiting
    assert asked == [f"{slug[:2]}.{letter}" for letter in "abcdefghijklmnop"[: len(asked)]] and asked
    said = "".join(output.text for output in outputs(slug) if output.output_type == "stream")
    assert all(f"{key} guess first: " in said for key in asked)
    told = re.findall(r"^(\d\d\.\w) measured: .+", said, re.M)
    assert set(asked) - set(told) <= {"02.b"}, "what is measured is revealed; 02.b is a table"


@every
def test_the_way_around_a_lesson(slug):
    first, last = cells(slug)[0].source, cells(slug)[-1].source
    address = f"https://colab.research.google.com/github/{course.REPOSITORY}/blob/main/notebooks/{slug}.ipynb"
    assert f"]({address})" in first and re.search(r"about \d+ minutes · (easy|medium|hard)", first)
    assert "**Papers.** [" in last and "**Read next.** [" in last
    assert cells(slug)[1].source == course.SETUP
    assert f'lessons.guesses("{slug[:2]}")' in cells(slug)[-2].source


def test_one_constant_holds_the_address_of_the_repository():
    files = subprocess.run(["git", "ls-files", "*.py", "*.md", "*.toml"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a checkout of git")
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in files.stdout.split()]
    assert len(texts) > 100 and sum(text.count(course.REPOSITORY) for text in texts) == 1


@pytest.fixture
def colab(monkeypatch):
    """As in a notebook of Colab, in whose setup nothing is run: what it would run, and where it goes."""
    ran, went = [], []
    monkeypatch.setattr(subprocess, "run", lambda words, check: ran.append([str(word) for word in words]))
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    monkeypatch.setattr("os.chdir", lambda place: went.append(str(place)))
    monkeypatch.setattr("shutil.which", lambda name: None)
    return ran, went


def test_outside_of_colab_nothing_is_installed(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda words, check: ran.append(words))
    monkeypatch.chdir(FOLDER / "lessons")
    exec(course.SETUP, {})
    assert ran == [] and FOLDER.samefile("."), "from notebooks/mine and notebooks/zh to notebooks"
    monkeypatch.chdir(tmp_path)
    exec(course.SETUP, {})
    assert tmp_path.samefile(".") and ran == []


def test_colab_gets_the_versions_that_the_lessons_were_made_with(colab):
    """The newest torch brings a Triton that the emulator refuses, and leaves a torchvision that cannot be imported."""
    ran, went = colab
    exec(course.SETUP, {})
    assert ran[0][:2] == ["git", "clone"] and ran[0][-2:] == [
        f"https://github.com/{course.REPOSITORY}",
        "/content/handtuned",
    ]
    assert ran[1][1:4] == ["-m", "pip", "install"] and ran[1][-3:] == [
        "/content/handtuned[finetune,tune]",
        "peft",
        "torchvision",
    ]
    assert ran[1][ran[1].index("-c") + 1] == "/content/handtuned/constraints.txt"
    assert went[0] == "/content/handtuned/notebooks"
    triton = re.search(r"^triton==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)[1]
    assert triton.startswith(WRITTEN_FOR)


def test_a_restarted_kernel_of_colab_finds_its_folder(colab, monkeypatch):
    ran, went = colab
    monkeypatch.setattr("pathlib.Path.exists", lambda path: True)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/local/bin/{name}")
    exec(course.SETUP, {})
    assert ran == [] and went[0] == "/content/handtuned/notebooks"


def test_an_installation_that_failed_is_tried_again(colab, monkeypatch):
    ran, _ = colab
    monkeypatch.setattr("pathlib.Path.exists", lambda path: True)
    exec(course.SETUP, {})
    assert [words[1:4] for words in ran] == [["-m", "pip", "install"]]


def test_copies_have_no_outputs_and_work_is_never_overwritten(tmp_path):
    script = tmp_path / SLUGS[0]
    script = script.with_suffix(".py")
    script.write_bytes((FOLDER / script.name).read_bytes())
    made = build.copies(script)
    assert made == [tmp_path / "mine" / f"{SLUGS[0]}.ipynb"]
    code = [cell for cell in nbformat.read(made[0], as_version=4).cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)
    made[0].write_text("my work", encoding="utf-8")
    assert build.copies(script) == [] and made[0].read_text(encoding="utf-8") == "my work"


@pytest.mark.parametrize("name", ["lora_path", "memory_levels", "mixed_precision_loop", "adapter_life"])
def test_drawings_have_no_colliding_labels(name, monkeypatch):
    """Texts lie inside the picture, apart from each other, and in or outside of a box, never across its edge."""
    found = []
    monkeypatch.setattr(drawings, "show", lambda fig, alt: found.append((fig, alt)))
    getattr(drawings, name)()
    fig, alt = found[0]
    fig.canvas.draw()
    (ax,) = fig.axes
    texts = [text.get_window_extent() for text in ax.texts if text.get_text()]
    boxes = [patch.get_window_extent() for patch in ax.patches if patch.get_window_extent().width]
    assert len(texts) >= len(boxes) > 3 and len(alt) > 80
    for text in texts:
        assert text.x0 >= 0 and text.x1 <= fig.bbox.width and text.y0 >= 0 and text.y1 <= fig.bbox.height
        for box in boxes:
            inside = box.x0 <= text.x0 and text.x1 <= box.x1 and box.y0 <= text.y0 and text.y1 <= box.y1
            assert inside or not text.overlaps(box)
    assert not any(one.overlaps(other) for one, other in combinations(texts, 2))
    assert any(f"drawings.{name}()" in cell.source for slug in SLUGS for cell in cells(slug)), "shown in a lesson"
