"""The tables of benchmarks/README.md are what the JSON files beside it say."""

import json
import sys
from pathlib import Path

from handtuned.harness.runner import load

ROOT = Path(__file__).resolve().parents[1]
tables = load(ROOT / "benchmarks" / "tables.py")


def test_the_tables_are_what_the_json_files_say():
    """`python benchmarks/tables.py` would change nothing, and every result file has its table."""
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert tables.updated(page, ROOT / "benchmarks") == page
    marked = {found["file"] for found in tables.MARKED.finditer(page)}
    results = set()
    for path in (ROOT / "benchmarks").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "ceilings" in content:
            results.add(path.name)
    assert results == marked


def test_a_changed_figure_is_noticed(tmp_path, monkeypatch):
    report = json.loads((ROOT / "benchmarks" / "cpu.json").read_text(encoding="utf-8"))
    page = "# x\n<!-- cpu.json -->\n<!-- end of cpu.json -->\nbelow\n"
    (tmp_path / "README.md").write_text(page, encoding="utf-8")
    (tmp_path / "cpu.json").write_text(json.dumps(report), encoding="utf-8")

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["tables.py", "--folder", str(tmp_path), *words])
        return tables.main()

    assert command("--check") == 1 and command() == 0 and command("--check") == 0
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert written.startswith("# x\n<!-- cpu.json -->\n`") and written.endswith("<!-- end of cpu.json -->\nbelow\n")
    record = report["results"]["nf4"][0]
    assert f"{record['contestants']['bitsandbytes']['ratio']:.2f} |" in written
    record["contestants"]["handtuned"]["median"] *= 1.5
    (tmp_path / "cpu.json").write_text(json.dumps(report), encoding="utf-8")
    assert tables.updated(written, tmp_path) != written


def test_the_shipped_cpu_results_compare_parts_a_to_c():
    """Quantizing, dequantizing, the LoRA layer, the NF4 layer and the whole step, each beside its rival."""
    report = json.loads((ROOT / "benchmarks" / "cpu.json").read_text(encoding="utf-8"))
    assert report["device"]["kind"] == "cpu" and "bench" in report["command"]
    rivals = {"nf4": "bitsandbytes", "lora": "peft", "qlora": "peft + bitsandbytes", "finetune": "peft + bitsandbytes"}
    for name, rival in rivals.items():
        for record in report["results"][name]:
            assert record["failed"] == {} and record["contestants"][rival]["rounds"] >= 5
