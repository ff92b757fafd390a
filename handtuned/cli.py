"""The `handtuned` command. Each subcommand's module is imported when it is called."""

import argparse
import difflib
import importlib
import os
import re
import sys
import warnings

from . import __version__

COMMANDS = {
    "finetune": ("finetune", "train LoRA adapters on a (4-bit) model"),
    "generate": ("generate", "answer a prompt with a trained adapter"),
    "tune": ("tune", "search for the settings of LoRA within a budget"),
    "merge": ("merge", "write base + adapter as one plain model directory"),
    "memory": ("memory.command", "estimate what training will take, and what would make it fit"),
    "bench": ("bench", "time the kernels against their rivals"),
    "xray": ("xray", "compile the kernels without a GPU and count their instructions"),
    "doctor": ("doctor", "say what is installed and what will run where"),
}

ADVICE = {"finetune": "; what takes less: --gradient-checkpointing, a lower --per-device-train-batch-size with more "
          "--gradient-accumulation-steps, a lower --max-seq-length (`handtuned memory` tells how much)"}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse with one clear line for a mistake, and exit code 2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        # Python before 3.14 takes -1e-3 for a flag, and then misses the value of the one before it.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            word = unknown.group(1).split("=")[0]
            flags = [name for name in self._option_string_actions if name.startswith("--")]
            near = difflib.get_close_matches(word, flags, n=1)
            message = f"unknown argument {word}" + (f"; did you mean {near[0]}?" if near else "")
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def hyphenated(words: list[str]) -> list[str]:
    """`--learning_rate=1e-3` → `--learning-rate=1e-3`: both spellings are in people's fingers."""
    split = (word.partition("=") if word.startswith("--") else ("", "", word) for word in words)
    return [name.replace("_", "-") + equals + value for name, equals, value in split]


def main(words: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0; 2 for bad input, 1 for too little memory, with one line of why."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # lines appear as they are printed, in a pipe too; no character stops it
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    warnings.formatwarning = lambda message, *place: f"note: {message}\n"
    words = hyphenated(sys.argv[1:] if words is None else list(words))
    if not words or words[0] in ("-h", "--help"):
        print(f"handtuned {__version__}: train big models on small memory\n\nusage: handtuned COMMAND [flags]\n")
        print("\n".join(f"  {name:9} {text}" for name, (_, text) in COMMANDS.items()))
        print("\n`handtuned COMMAND --help` lists a command's flags.")
        return 0
    if words[0] == "--version":
        print(f"handtuned {__version__}")
        return 0
    command = words[0]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f" (one of {', '.join(COMMANDS)})"
        print(f"handtuned: error: unknown command {command!r}{hint}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f".{COMMANDS[command][0]}", __package__)
        parser = Parser(prog=f"handtuned {command}", description=COMMANDS[command][1] + ".")
        module.add_arguments(parser)
        return module.run(parser.parse_args(words[1:])) or 0
    except SystemExit as stop:
        return int(stop.code or 0)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(__package__):
            raise
        extra = {"optuna": "tune", "datasets": "data", "pyarrow": "data"}.get(error.name, "finetune")
        return _fail(command, f'{error.name} is not installed; pip install "handtuned[{extra}]" brings it', error)
    except BrokenPipeError:  # `handtuned … | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell says SIGPIPE
    except (ValueError, TypeError, OSError) as error:
        return _fail(command, str(error), error)
    except (RuntimeError, MemoryError) as error:
        from .training.loading import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        first_sentence = re.split(r"(?<=[a-zB])\. |\n", str(error))[0]
        _fail(command, f"out of memory: {first_sentence}{ADVICE.get(command, '')}", error)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _fail(command: str, message: str, error: Exception) -> int:
    if os.environ.get("HANDTUNED_DEBUG"):
        raise error
    print(f"handtuned {command}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
