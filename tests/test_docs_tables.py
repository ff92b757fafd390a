"""The tables of docs/from-peft.md and docs/from-torch.md: every row says one of four words, and a test holds it."""

import ast
import re

import pytest
from source_tree import ROOT

PAGES = ["from-peft", "from-torch"]
WORDS = {"same", "better", "refused", "absent"}


def rows(page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (.+) \| (.+) \| (test_\w+\.py)::(\w+) \|$", text, re.M)


@pytest.mark.parametrize("page", PAGES)
def test_every_row_is_held_by_a_test(page):
    found = rows(page)
    assert len(found) > 30
    for behaviour, verdict, file, name in found:
        assert re.match(r"\w+", verdict)[0] in WORDS, behaviour
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{behaviour}: {file} has no {name}"


@pytest.mark.parametrize("page", PAGES)
def test_no_row_is_said_twice(page):
    behaviours = [behaviour for behaviour, *_ in rows(page)]
    assert len(set(behaviours)) == len(behaviours)


@pytest.mark.parametrize("page", PAGES)
def test_a_table_of_behaviour_has_no_other_rows(page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    tables = re.findall(r"\| behaviour \| here \| test \|\n\|---\|---\|---\|\n((?:\|.*\n?)+)", text)
    assert sum(table.count("\n") for table in tables) == len(rows(page))
