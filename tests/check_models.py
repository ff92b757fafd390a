"""Every causal architecture of the installed transformers, tiny and random, through the commands: docs/models.md.

    python tests/check_models.py                 # all that have no row in docs/models.md yet
    python tests/check_models.py --again         # all
    python tests/check_models.py mamba qwen3_vl  # these

Each model is built, trained for two steps with the default flags, gone on with from its first checkpoint, merged, read
by plain transformers, and its adapter put on the dense base here and by PEFT. A process of its own with a time limit
does that for each; its row replaces the one of the table.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical", "TOKENIZERS_PARALLELISM": "false"}

import peft
import tiny_architectures
import torch
import transformers
from handtuned.nn import load_adapter
from handtuned.nn.inject import lora_layers
from handtuned.nn.targets import share
from handtuned.quant import quantization_summary
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from handtuned import finetune, merge  # noqa: F401  (commands, imported before the processes fork)
from handtuned.cli import main as run_command
from handtuned.training.models import load_base

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
COLUMNS = ("architecture", "class", "adapted", "bytes each", "trains", "resume", "merge", "PEFT", "what is said")
SECONDS = 240
TOLERANCE = 1e-3  # of the largest logit: sums of the same numbers in another order; a lost layer changes more
# Need pictures, sounds or parts that are not made tiny here; a text half stands in a row of its own.
NOT_TEXT = {
    "blt", "dots3_note", "emu3", "fuyu", "gemma3n", "gemma4_assistant", "gemma4_unified", "gemma4_unified_assistant",
    "git", "got_ocr2", "moshi", "moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal",
    "qwen4_exp", "trocr", "whisper",
}  # fmt: skip


class Failed(Exception):
    """A command that ended with another exit code than 0: its last line."""


def command(*words) -> list[str]:
    """Run one command in this process; returns its warnings. Failed: it refuses. Other exceptions are tracebacks."""
    out = io.StringIO()
    with warnings.catch_warnings(record=True) as said, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        warnings.simplefilter("default", UserWarning)
        code = run_command([str(word) for word in words])
    if code:
        raise Failed(out.getvalue().strip().splitlines()[-1])
    return [str(w.message) for w in said if re.match("all-linear|left dense|PEFT|.*met no row", str(w.message))]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 36)[None], use_cache=False).logits.float()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


def check(name: str, place: Path) -> dict[str, str]:
    """The row of one architecture; a cell holds "yes", or why not."""
    row = dict.fromkeys(COLUMNS, "–") | {"architecture": f"`{name}`"}
    base, run = place / "base", place / "run"
    row["class"] = f"`{tiny_architectures.make(name, base)}`"
    rows = tiny_architectures.write_rows(place / "rows.jsonl")
    said = []

    def cell(column: str, work) -> bool:
        try:
            row[column] = work() or "yes"
        except Failed as refusal:
            row[column] = f"no: {refusal}".replace(str(base), name)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            row[column] = f"traceback: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return row[column] == "yes"

    def trains():
        said.extend(command("finetune", "--model", base, "--data", rows, "--output-dir", run, "--max-steps", 2,
                            "--save-steps", 1, "--batch-size", 2, "--max-seq-length", 48, "--learning-rate", 1e-2,
                            "--eval-fraction", 0.125))  # fmt: skip
        model, _ = load_base(str(base), "qlora")
        total = quantization_summary(model).total
        row["bytes each"] = f"{total.bytes_after / total.parameters:.2f}"
        load_adapter(model, run)
        adapted = [path for path, _ in lora_layers(model)]
        row["adapted"] = f"{share(model, adapted):.0%}"

    def resumes():
        before = (run / "adapter_model.safetensors").read_bytes()
        command("finetune", "--resume", run / "checkpoint-1")
        return "" if (run / "adapter_model.safetensors").read_bytes() == before else "no: other bits"

    def merges():
        model, _ = load_base(str(base), "qlora")
        load_adapter(model, run)
        want = logits(model)
        with mock.patch("handtuned.merge._read_back", return_value=0.0):  # done below, in this process
            command("merge", "--adapter", run, "--out", place / "merged", "--save-dtype", "float32")
        merged, found = transformers.AutoModelForCausalLM, None
        if name in tiny_architectures.MULTIMODAL:
            merged = transformers.AutoModelForImageTextToText
        merged, found = merged.from_pretrained(place / "merged", dtype=torch.float32, output_loading_info=True)
        wrong = {what: sorted(map(str, keys))[:2] for what, keys in found.items() if keys}
        error = apart(logits(merged), want)
        return f"no: {wrong}" if wrong else "" if error < TOLERANCE else f"no: logits {error:.0e} apart"

    def works_in_peft():
        here, _ = load_base(str(base), "lora")
        there = type(here).from_pretrained(base, dtype=torch.float32)
        bare = logits(there)
        load_adapter(here, run)
        with warnings.catch_warnings(record=True) as lost:
            warnings.simplefilter("always")
            there = peft.PeftModel.from_pretrained(there, str(run))
        lost = any("missing adapter keys" in str(w.message) for w in lost)
        error, effect = apart(logits(there), logits(here)), apart(logits(here), bare)
        if not lost and error < min(TOLERANCE, effect / 10):
            return ""
        told = any(text.startswith("PEFT") for text in said)
        return ("as said" if told else "no, and nothing says so") + f": {error:.0e} of {effect:.0e} apart"

    if cell("trains", trains):
        cell("resume", resumes)
        cell("merge", merges)
        cell("PEFT", works_in_peft)
        if row["PEFT"].startswith("as said"):
            with contextlib.suppress(Failed):  # no way of writing it helps
                command("finetune", "--model", base, "--data", rows, "--output-dir", place / "for-peft",
                        "--max-steps", 2, "--batch-size", 2, "--max-seq-length", 48, "--learning-rate", 1e-2,
                        "--eval-fraction", 0.125, "--save-for", "peft")  # fmt: skip
                run = place / "for-peft"
                cell("PEFT", works_in_peft)
                row["PEFT"] = row["PEFT"].replace("yes", "with `--save-for peft`")
    row["what is said"] = "; ".join(dict.fromkeys(said)) or "–"
    return row


def worker(name: str, answers) -> None:
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place, open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        try:
            answers.put(check(name, Path(place)))
        except Exception as error:  # the model itself cannot be built so small
            text = f"not built: {type(error).__name__}: {error}"
            answers.put(dict.fromkeys(COLUMNS, "–") | {"architecture": f"`{name}`", "what is said": text})


def in_a_process(name: str) -> dict[str, str]:
    """`check` in a fork of this process, which has imported everything, with a time limit."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=worker, args=(name, answers), daemon=False)
    process.start()
    try:
        return answers.get(timeout=SECONDS)
    except Exception:
        text = f"ended after {SECONDS} s" if process.is_alive() else f"killed (exit code {process.exitcode})"
        return dict.fromkeys(COLUMNS, "–") | {"architecture": f"`{name}`", "trains": "no", "what is said": text}
    finally:
        process.kill()
        process.join()


def read_table(text: str) -> dict[str, list[str]]:
    lines = re.findall(r"^\| (`[\w-]+` \|.*) \|$", text, re.M)
    return {line.split("`")[1]: line.split(" | ") for line in lines}


def write_table(rows: dict[str, list[str]]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    good = sum(row[4] == "yes" and row[5] == "yes" and row[6] == "yes" for row in rows.values())
    head = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines = [f"| {' | '.join(rows[name])} |" for name in sorted(rows)]
    versions = f"transformers {transformers.__version__}, PEFT {peft.__version__}, torch {torch.__version__}"
    counted = f"{good} of {len(rows)} rows train, resume to the bit and merge ({versions})."
    begin, end = "<!-- table -->", "<!-- end -->"
    before, after = text[: text.index(begin)], text[text.index(end) :]
    PAGE.write_text("\n".join([before + begin, counted, "", *head, *lines, after]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures (default: all that have no row yet)")
    parser.add_argument("--again", action="store_true", help="also those that have a row")
    options = parser.parse_args()
    rows = read_table(PAGE.read_text(encoding="utf-8"))
    everything = sorted(({*CAUSAL, *tiny_architectures.MULTIMODAL}) - NOT_TEXT)
    for name in options.names or [n for n in everything if options.again or n not in rows]:
        begun = time.monotonic()
        row = in_a_process(name)
        cells = [" ".join(row[column].split()).replace("|", "/")[:400] for column in COLUMNS]
        rows[name] = cells
        write_table(rows)
        print(f"{time.monotonic() - begun:5.1f} s", " | ".join(cells), flush=True)


if __name__ == "__main__":
    sys.exit(main())
