"""The two languages of a lesson: one code, one run, texts in step."""

import re

import pytest
from handtuned.lessons import build, course, index, paired
from handtuned.lessons.__main__ import main
from test_notebooks import FOLDER, SLUGS, broken_links, every

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("jupytext")

SCRIPT = """# %% [markdown]
# # 01. A try?
#
# See [two](02_two.ipynb), [the index](README.md#top), [docs](../docs/data.md), [web](https://example.org).

# %%
print(6 * 7)

# %% [markdown]
# ## What to remember
"""
CHINESE_TEXT = """<!-- cell 0 {} -->
# 01. 试一试？

见[二](02_two.ipynb)、[目录](README.md#top)、[文档](../docs/data.md)、[网](https://example.org)，`[x](README.md)`。

<!-- cell 1 {} -->
## 要点
"""


@pytest.fixture
def script(tmp_path):
    folder = tmp_path / "notebooks"
    (folder / "zh").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for place in (folder / "02_two.ipynb", folder / "README.md", tmp_path / "docs" / "data.md"):
        place.write_text("# Top\n", encoding="utf-8")
    path = folder / "01_try.py"
    path.write_text(SCRIPT, encoding="utf-8")
    marks = [paired.digest(text) for text in paired.english(path)]
    paired.text_file(path).write_text(CHINESE_TEXT.format(*marks), encoding="utf-8")
    return path


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def read(path):
    return nbformat.read(path, as_version=4)


def test_every_lesson_is_there_in_chinese():
    for ending in ("md", "ipynb"):
        assert sorted(path.stem for path in (FOLDER / "zh").glob(f"*.{ending}")) == SLUGS


@every
def test_a_chinese_lesson_is_whole(slug):
    """All cells in Chinese, in step with the English, its links right, outputs those of the English notebook."""
    script = FOLDER / f"{slug}.py"
    assert paired.trouble(script) == [] and paired.untranslated(script) == []
    assert build.drift(script) == []
    cells = read(paired.notebook_file(script)).cells
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert broken_links(text, FOLDER / "zh") == []
    assert cells[0].source.startswith(f"# {slug[:2]}")


def test_one_run_gives_both_languages(script, monkeypatch):
    runs = []
    monkeypatch.setattr(build, "execute", lambda path, run=build.execute: runs.append(path) or run(path))
    made = build.build(script)
    assert len(runs) == 1 and made == [script.with_suffix(".ipynb"), paired.notebook_file(script)]
    english, chinese = map(read, made)
    nbformat.validate(chinese)
    assert [cell.id for cell in english.cells] == [cell.id for cell in chinese.cells]
    code = [[cell for cell in notebook.cells if cell.cell_type == "code"] for notebook in (english, chinese)]
    assert code[0] == code[1] and any(cell.outputs and cell.outputs[0].text == "42\n" for cell in code[1])
    assert build.drift(script) == []


def test_links_lead_to_the_same_places(script):
    build.build(script)
    opening = read(paired.notebook_file(script)).cells[0].source
    for link in ("(../02_two.ipynb)", "(../README.md#top)", "(../../docs/data.md)", "(https://example.org)"):
        assert link in opening
    assert "`[x](README.md)`" in opening, "code is left alone"
    assert broken_links(opening, script.parent / "zh") == []
    (script.parent / "02_two.py").write_text("", encoding="utf-8")
    (script.parent / "zh" / "02_two.md").write_text("", encoding="utf-8")
    assert "](02_two.ipynb)" in paired.bent("[二](02_two.ipynb)", script), "Chinese leads to Chinese"


def test_a_lesson_without_chinese_is_built_with_a_remark(script, capsys):
    paired.text_file(script).unlink()
    assert main(["build", "01", "--notebooks", str(script.parent)]) == 0
    assert "no Chinese text yet" in capsys.readouterr().out
    assert build.drift(script) == [] and not paired.notebook_file(script).exists()


@pytest.mark.parametrize(
    ("old", "new", "cell", "says"),
    [
        (r"<!-- cell 1 \w+ -->\n## 要点\n", "", 1, "no Chinese text"),
        (r"<!-- cell 1 \w+ -->\n## 要点", "<!-- cell 0 00000000 -->\n## 要点", 0, "there 2 times"),
        (r"cell 1 ", "cell 7 ", 7, "has only 2"),
        (r"## 要点\n", "", 1, "is empty"),
        (r"cell 1 \w+", "cell 1 01234567", 1, "has changed since"),
        (r"<!-- cell 1 \w+ -->", "<!-- cell 1 -->", 1, "no Chinese text"),
    ],
)
def test_what_is_out_of_step_is_named_before_anything_runs(script, capsys, monkeypatch, old, new, cell, says):
    monkeypatch.setattr(build, "execute", None)
    path = paired.text_file(script)
    path.write_text(re.sub(old, new, path.read_text(encoding="utf-8")), encoding="utf-8")
    assert main(["build", "01", "--notebooks", str(script.parent)]) == 1
    told = capsys.readouterr().out
    assert "01_try: failed" in told and re.search(f"01_try, text cell {cell}: .*{says}", told)


def test_a_changed_english_cell_is_noticed_and_marked_again(script, capsys):
    build.build(script)
    edit(script, "What to remember", "What you should remember")
    assert "01_try, text cell 1: the English has changed since it was translated" in build.drift(script)
    folder = ["--notebooks", str(script.parent)]
    assert main(["text", "01", *folder]) == 1
    assert main(["paired", "01", *folder]) == 0
    assert "1 cells newly marked" in capsys.readouterr().out
    assert main(["text", "01", *folder]) == 0 and build.drift(script) == []


def test_cells_still_in_english_are_printed(script, capsys):
    edit(paired.text_file(script), "## 要点", "## What to remember")
    assert main(["paired", "01", "--notebooks", str(script.parent)]) == 0
    assert "text cell 1 is still English" in capsys.readouterr().out


def test_text_is_renewed_over_the_outputs_of_the_last_run(script, monkeypatch):
    build.build(script)
    monkeypatch.setattr(build, "execute", None)
    edit(script, "A try?", "A second try?")
    edit(paired.text_file(script), "试一试", "再试一次")
    before = read(script.with_suffix(".ipynb"))
    paired.mark(script)
    build.text(script)
    after, chinese = read(script.with_suffix(".ipynb")), read(paired.notebook_file(script))
    assert "A second try?" in after.cells[0].source and "再试一次" in chinese.cells[0].source
    assert after.cells[1:] == before.cells[1:] and chinese.cells[1:-1] == before.cells[1:-1]
    monkeypatch.setattr(course, "SETUP", "# another way into Colab")
    build.text(script)
    assert read(script.with_suffix(".ipynb")).cells[1].source == "# another way into Colab"
    edit(script, "6 * 7", "6 * 8")
    with pytest.raises(ValueError, match="01_try: the code has changed since it was run"):
        build.text(script)


def test_a_chinese_notebook_of_another_run_is_noticed(script):
    build.build(script)
    path = paired.notebook_file(script)
    edit(path, '"42\\n"', '"43\\n"')
    assert build.drift(script) == ["in Chinese: its outputs are of another run"]
    path.unlink()
    assert build.drift(script) == ["the Chinese notebook has not been written"]


def test_the_index_leads_to_the_chinese_lesson(script):
    build.build(script)
    (script.parent / "02_two.ipynb").unlink()
    assert "| [A try?](01_try.ipynb) | [试一试？](zh/01_try.ipynb) | 30 | easy | 3 |" in index.index(script.parent)
