"""The examples of docs/emulator.md print what the page shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

PAGE = (Path(__file__).parents[1] / "docs" / "emulator.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n([^`]*)```\s+```text\n([^`]*)```", PAGE)


@pytest.mark.skipif(not triton.__version__.startswith("3.7"), reason="machine code of Triton 3.7 is shown")
@pytest.mark.parametrize("n", range(3))
def test_an_example(n, tmp_path):
    code, shown = EXAMPLES[n]
    named = re.search(r"(\w+\.py):\d+", shown)
    file = tmp_path / (named[1] if named else "example.py")
    file.write_text(code, encoding="utf-8")
    environment = os.environ | {"TRITON_INTERPRET": "0", "HANDTUNED_BACKEND": ""}
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    printed = re.sub(r"0x[0-9a-f]{8,}", "0x…", done.stdout.replace(f"{tmp_path}{os.sep}", ""))
    assert printed.strip() == shown.strip()


def test_the_page_has_three_examples():
    assert len(EXAMPLES) == 3
