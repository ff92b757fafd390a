"""The notebooks as they are committed: paired with their scripts, executed, complete, readable."""

import base64
import re
from collections import Counter
from pathlib import Path

import pytest
from handtuned.lessons import CLAIMS, build, exercises_of, index
from handtuned.lessons.__main__ import main

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")

SLUGS = [
    "00_start_here",
    "01_how_floats_lose_gradients",
    "02_writing_a_kernel",
    "03_fp16_training",
    "04_where_memory_goes",
    "05_trading_time_for_memory",
    "06_faking_a_big_batch",
    "07_low_rank_updates",
    "08_lora_in_a_model",
    "09_four_bits",
    "10_qlora",
    "11_many_machines",
    "12_fit_a_budget",
]
KERNELS = ("02", "03", "07", "09", "10")  # climb in small steps, each an exercise
AROUND = ("setup", "guesses")  # cells that every lesson gets when it is built
FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
every = pytest.mark.parametrize("slug", SLUGS)


def cells(slug):
    return nbformat.read(FOLDER / f"{slug}.ipynb", as_version=4).cells


def outputs(slug):
    return [output for cell in cells(slug) if cell.cell_type == "code" for output in cell.outputs]


def prose(slug):
    return "\n\n".join(cell.source for cell in cells(slug) if cell.cell_type == "markdown")


def test_all_lessons_are_there():
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == SLUGS
    assert [path.stem for path in sorted(FOLDER.glob("[0-9]*.py"))] == SLUGS


@every
def test_notebook_and_script_say_the_same(slug):
    assert build.drift(FOLDER / f"{slug}.py") == []


@every
def test_every_cell_was_run_in_order_without_error(slug):
    counts = [cell.execution_count for cell in cells(slug) if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert all(output.output_type != "error" for output in outputs(slug))


@every
def test_length_and_shape(slug):
    assert 20 <= len(cells(slug)) - len(AROUND) <= (70 if slug[:2] in KERNELS else 41)
    text = prose(slug)
    number = slug[:2]
    assert re.findall(r"^# (.+)$", text, re.M) and len(re.findall(r"^# .+$", text, re.M)) == 1, "one title"
    assert cells(slug)[0].source.startswith(f"# {number}. "), "the title is a question with the lesson's number"
    last = cells(slug)[-1].source
    assert "## What to remember" in last
    assert re.search(r"^On a real model: .*`handtuned [a-z]+", last, re.M), "the command that uses the technique"
    if slug != SLUGS[-1]:
        assert f"({SLUGS[SLUGS.index(slug) + 1]}.ipynb)" in last, "a link to the next lesson"
    assert any(lesson.number == number and len(lesson.terms) >= 3 for lesson in index.lessons(FOLDER)), "Terms: …"


def test_each_claim_is_asserted_once_in_its_lesson():
    records = [(record, lesson.number) for lesson in index.lessons(FOLDER) for record in lesson.claims]
    made = [(record["claim"], number, record["verdict"]) for record, number in records]
    assert Counter(number for number, _, _ in made) == Counter(list(CLAIMS))
    for number, lesson, verdict in made:
        assert (lesson, verdict) == (CLAIMS[number].notebook, CLAIMS[number].verdict), f"claim {number}"


@every
def test_claims_are_predicted_first(slug):
    claims = any(CLAIMS[number].notebook == slug[:2] for number in CLAIMS)
    assert not claims or re.search(r"predict|guess", prose(slug), re.I)


@every
def test_every_exercise_is_posed_and_still_open(slug):
    exercises = exercises_of(slug[:2])
    code = "\n".join(cell.source for cell in cells(slug) if cell.cell_type == "code")
    told = "\n".join(output.text for output in outputs(slug) if output.output_type == "stream")
    for key, exercise in exercises.items():
        assert re.search(rf'check\("{re.escape(key)}", ', code), f"{key} is not checked"
        assert f"{key} {exercise.title}: not yet." in told, f"{key}: the stub fails"
        assert key in prose(slug), f"{key} has a specification"


@every
def test_pictures_are_small_and_have_alt_text(slug):
    for output in outputs(slug):
        data = output.get("data", {})
        if "image/png" in data:
            assert len(base64.b64decode(data["image/png"])) <= 100_000
            assert output.metadata["image/png"]["alt"].strip()
        for tag in re.findall(r"<img[^>]*>", data.get("text/html", "")):
            assert re.search(r'alt="[^"]+"', tag)
    assert (FOLDER / f"{slug}.ipynb").stat().st_size < 1_000_000


@every
def test_no_traces_of_the_machine(slug):
    text = (FOLDER / f"{slug}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.…])/(?:home|root|tmp|work|Users|usr)/", text)
    assert " at 0x" not in text


def anchors(text):
    """GitHub's names of a Markdown file's headings."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}


def broken_links(text, folder):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (folder / path) if path else None
        found = place is None or place.exists()
        if found and anchor:
            found = anchor in anchors(place.read_text(encoding="utf-8") if place else text)
        if not found:
            broken.append(target)
    return broken


@every
def test_links_of_a_lesson_resolve(slug):
    assert broken_links(prose(slug), FOLDER) == []


@pytest.mark.parametrize(
    "name", ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", "notebooks/README.md", "notebooks/GLOSSARY.md"]
)
def test_links_of_the_readmes_resolve(name):
    path = FOLDER.parent / name
    assert broken_links(path.read_text(encoding="utf-8"), path.parent) == []


def test_the_chinese_readme_has_the_figures_of_the_english_one():
    """Row by row of every table; whoever changes one changes both."""

    def figures(name):
        lines = (FOLDER.parent / name).read_text(encoding="utf-8").splitlines()
        return [re.findall(r"\d[\d,.]*", line.replace("，", ", ")) for line in lines if line.startswith("|")]

    assert figures("README.zh-CN.md") == figures("README.md")


def test_index_and_glossary_are_up_to_date():
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == index.index(FOLDER)
    assert (FOLDER / "GLOSSARY.md").read_text(encoding="utf-8") == index.glossary(FOLDER)


SCRIPT = """# %% [markdown]
# # 01. A try?
#
# Terms: loss scaling 损失缩放, LayerNorm 层归一化, out of bounds 越界, k-means k 均值聚类, update ΔW 增量

# %%
import os, sys
from handtuned import lessons
print(sys.executable, "TRITON_INTERPRET" in os.environ, "HANDTUNED_BACKEND" in os.environ)

# %%
lessons.claim(1, "a | b", holds={holds})
fig, ax = lessons.figure(2, 1)
lessons.show(fig, alt="Nothing.")

# %% [markdown]
# ## What to remember
"""


def test_a_script_becomes_an_executed_notebook(tmp_path):
    """In this interpreter, without the tests' settings; the claim and the picture leave their records."""
    import sys

    script = tmp_path / "01_try.py"
    script.write_text(SCRIPT.format(holds=True), encoding="utf-8")
    with pytest.raises(FileNotFoundError):
        build.drift(script)
    build.build(script)
    assert build.drift(script) == []
    made = nbformat.read(tmp_path / "01_try.ipynb", as_version=4)
    nbformat.validate(made)
    assert made.cells[2].outputs[0].text == f"{sys.executable.replace(sys.prefix, '…')} False False\n"
    assert index.lessons(tmp_path)[0].terms == {
        "loss scaling": "损失缩放", "LayerNorm": "层归一化", "out of bounds": "越界", "k-means": "k 均值聚类",
        "update ΔW": "增量",
    }  # fmt: skip
    assert "| 1 | 000 |" in index.index(tmp_path) and CLAIMS[1].original in index.index(tmp_path)
    assert "a \\| b" in index.index(tmp_path)
    assert "| loss scaling | 损失缩放 | [01](01_try.ipynb) |" in index.glossary(tmp_path)
    assert made.cells[3].outputs[1].metadata == {"image/png": {"alt": "Nothing."}}

    script.write_text(SCRIPT.format(holds="1 == 1"), encoding="utf-8")
    assert build.drift(script) == ["cell 3 differs"]


def test_a_claim_that_does_not_hold_fails_the_build(tmp_path):
    script = tmp_path / "01_try.py"
    script.write_text(SCRIPT.format(holds=False), encoding="utf-8")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="does not bear this out"):
        build.build(script)
    assert not Path(tmp_path, "01_try.ipynb").exists() and not list(tmp_path.glob("*.part"))


def test_a_lesson_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["check", "77", "--notebooks", str(FOLDER)])
    assert stop.value.code == 2 and "no notebook 77" in capsys.readouterr().err


def test_the_folder_of_the_lessons(tmp_path, monkeypatch):
    """`notebooks` in the current directory, or that directory; nothing is looked for above it."""
    (tmp_path / "notebooks" / "lessons").mkdir(parents=True)
    (tmp_path / "notebooks" / "01_try.py").write_text(SCRIPT, encoding="utf-8")
    for place in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(place)
        assert build.notebooks_folder() == tmp_path / "notebooks"
    monkeypatch.chdir(tmp_path / "notebooks" / "lessons")
    with pytest.raises(ValueError, match=r"no lessons .* in .*lessons/notebooks or .*: run this in a checkout"):
        build.notebooks_folder()
    assert build.notebooks_folder("..") == tmp_path / "notebooks"


@pytest.mark.slow
@every
def test_notebook_runs(slug):
    build.execute(FOLDER / f"{slug}.py")
