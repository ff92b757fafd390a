"""What stands around a lesson: the way into Colab, length and difficulty, stored outputs, papers, what to read next.

Added to every notebook, in both languages, when it is made from its script (build.py).
"""

import re
from dataclasses import dataclass

# The one place that knows the address of the public repository.
REPOSITORY = "handtuned/handtuned"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"

SETUP = f"""\
# In Colab: fetch the project and install what the lesson needs. Elsewhere: work in the lessons' folder.
import os
import shutil
import subprocess
import sys
from pathlib import Path

if "google.colab" in sys.modules:
    home = Path("/content/handtuned")
    if not home.exists():
        address = "https://github.com/{REPOSITORY}"
        subprocess.run(["git", "clone", "-q", "--depth", "1", address, home], check=True)
    if not shutil.which("handtuned"):
        # The emulator knows certain versions of Triton; and Colab's torchvision fits no other torch than Colab's.
        needed = ["-c", home / "constraints.txt", f"{{home}}[finetune,tune]", "peft", "torchvision"]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *needed], check=True)
    os.chdir(home / "notebooks")
around = (Path.cwd(), *Path.cwd().parents)
os.chdir(next((place for place in around if (place / "00_start_here.py").exists()), Path.cwd()))"""

GUESSES = """\
from handtuned import lessons

lessons.guesses("{number}")  # your guesses beside what was measured; lessons.progress() shows how far you are"""


@dataclass(frozen=True)
class Sheet:
    """What is said about one lesson.

    Attributes:
        level: 0 easy, 1 medium, 2 hard.
        exercise: minutes that we allow for one exercise.
        papers: (title, address); abstracts are enough for a start.
        then: (title, address) of what to read next.
    """

    level: int
    exercise: int
    papers: tuple[tuple[str, str], ...]
    then: tuple[tuple[str, str], ...]


def _arxiv(number: str, title: str) -> tuple[str, str]:
    return title, f"https://arxiv.org/abs/{number}"


SHEETS = {
    "00": Sheet(0, 5, (_arxiv("2304.01373", "Biderman et al. 2023, Pythia"),),
                (("EleutherAI, Transformer Math 101", "https://blog.eleuther.ai/transformer-math/"),)),
    "01": Sheet(0, 10, (_arxiv("1710.03740", "Micikevicius et al. 2017, Mixed Precision Training"),
                        _arxiv("1905.12322", "Kalamkar et al. 2019, A Study of BFLOAT16 for Deep Learning Training")),
                (("Goldberg 1991, What Every Computer Scientist Should Know About Floating-Point Arithmetic",
                  "https://docs.oracle.com/cd/E19957-01/806-3568/ncg_goldberg.html"),)),
    "02": Sheet(1, 20, (("Tillet, Kung, Cox 2019, Triton", "https://doi.org/10.1145/3315508.3329973"),
                        _arxiv("2205.14135", "Dao et al. 2022, FlashAttention")),
                (("Triton's tutorials", "https://triton-lang.org/main/getting-started/tutorials/"),
                 ("NVIDIA, CUDA C++ Programming Guide", "https://docs.nvidia.com/cuda/cuda-c-programming-guide/"))),
    "03": Sheet(2, 20, (_arxiv("1710.03740", "Micikevicius et al. 2017, Mixed Precision Training"),
                        _arxiv("2209.05433", "Micikevicius et al. 2022, FP8 Formats for Deep Learning")),
                (("PyTorch, Automatic Mixed Precision examples",
                  "https://docs.pytorch.org/docs/stable/notes/amp_examples.html"),)),
    "04": Sheet(1, 10, (_arxiv("2205.05198", "Korthikanti et al. 2022, Reducing Activation Recomputation"),
                        _arxiv("1910.02054", "Rajbhandari et al. 2019, ZeRO")),
                (("EleutherAI, Transformer Math 101", "https://blog.eleuther.ai/transformer-math/"),
                 ("PyTorch, Understanding CUDA Memory Usage",
                  "https://docs.pytorch.org/docs/stable/torch_cuda_memory.html"))),
    "05": Sheet(1, 15, (_arxiv("1604.06174", "Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost"),
                        _arxiv("2205.05198", "Korthikanti et al. 2022, Reducing Activation Recomputation")),
                (("PyTorch, torch.utils.checkpoint", "https://docs.pytorch.org/docs/stable/checkpoint.html"),)),
    "06": Sheet(0, 10, (_arxiv("1706.02677", "Goyal et al. 2017, Accurate, Large Minibatch SGD"),
                        _arxiv("1608.03983", "Loshchilov, Hutter 2016, SGDR: cosine schedules")),
                (_arxiv("1812.06162", "McCandlish et al. 2018, An Empirical Model of Large-Batch Training"),)),
    "07": Sheet(2, 20, (_arxiv("2106.09685", "Hu et al. 2021, LoRA"),
                        _arxiv("2012.13255", "Aghajanyan et al. 2020, Intrinsic Dimensionality")),
                (_arxiv("2312.03732", "Kalajdzievski 2023, rsLoRA: scaling by √r"),
                 _arxiv("2405.09673", "Biderman et al. 2024, LoRA Learns Less and Forgets Less"))),
    "08": Sheet(1, 15, (_arxiv("2106.09685", "Hu et al. 2021, LoRA"),
                        _arxiv("1804.08838", "Li et al. 2018, Measuring the Intrinsic Dimension")),
                (_arxiv("2311.03285", "Sheng et al. 2023, S-LoRA: serving many adapters"),
                 ("PEFT's guides", "https://huggingface.co/docs/peft"))),
    "09": Sheet(2, 15, (_arxiv("2305.14314", "Dettmers et al. 2023, QLoRA"),
                        _arxiv("2306.06965", "Yoshida 2023, NF4 Isn't Information Theoretically Optimal")),
                (_arxiv("2210.17323", "Frantar et al. 2022, GPTQ"),
                 _arxiv("2208.07339", "Dettmers et al. 2022, LLM.int8()"))),
    "10": Sheet(2, 20, (_arxiv("2305.14314", "Dettmers et al. 2023, QLoRA"),),
                (_arxiv("2309.14717", "Xu et al. 2023, QA-LoRA: adapters that merge into low bits"),
                 _arxiv("2310.08659", "Li et al. 2023, LoftQ"))),
    "11": Sheet(1, 15, (_arxiv("1910.02054", "Rajbhandari et al. 2019, ZeRO"),
                        _arxiv("2101.06840", "Ren et al. 2021, ZeRO-Offload")),
                (_arxiv("2304.11277", "Zhao et al. 2023, PyTorch FSDP"),)),
    "12": Sheet(1, 15, (_arxiv("1603.06560", "Li et al. 2016, Hyperband"),
                        _arxiv("2106.09685", "Hu et al. 2021, LoRA")),
                (_arxiv("2405.09673", "Biderman et al. 2024, LoRA Learns Less and Forgets Less"),)),
}  # fmt: skip

_WORDS = {
    "en": {"levels": ("easy", "medium", "hard"), "badge": "Open in Colab", "minutes": "about {} minutes",
           "other": "中文", "papers": "Papers", "then": "Read next", "stop": ".", "comma": "; ",
           "real": "On a real model: ",
           "ran": "Cut short and run once, on a machine with other work to do (so its times are no measurement; … "
                  "marks lines left out):"},
    "zh": {"levels": ("容易", "中等", "较难"), "badge": "在 Colab 中打开", "minutes": "约 {} 分钟", "other": "English",
           "papers": "论文", "then": "接着读", "stop": "。", "comma": "；",
           "real": "在真实模型上：",
           "ran": "以下是缩短后运行一次的输出（机器当时还有别的工作，所以其中的时间不算测量；“…”表示略去的行）："},
}  # fmt: skip


def minutes(number: str, texts: list[str], exercises: int) -> int:
    """What a lesson takes: 150 words of its English text a minute, and each exercise's time; to the next 5 minutes."""
    words = sum(len(text.split()) for text in texts)
    return 5 * round((words / 150 + exercises * SHEETS[number].exercise) / 5)


def level(number: str, language: str = "en") -> str:
    """How hard a lesson is, in a word."""
    return _WORDS[language]["levels"][SHEETS[number].level]


def heading(name: str, language: str, takes: int, other: bool) -> str:
    """The line below a lesson's title.

    Args:
        name: of the notebook, without its ending.
        language: "en" or "zh".
        takes: minutes.
        other: whether the lesson is there in the other language too.
    """
    words = _WORDS[language]
    place = "notebooks/zh" if language == "zh" else "notebooks"
    colab = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/{place}/{name}.ipynb"
    parts = [f"[![{words['badge']}]({BADGE})]({colab})", words["minutes"].format(takes), level(name[:2], language)]
    if other:
        parts.append(f"[{words['other']}]({'../' if language == 'zh' else 'zh/'}{name}.ipynb)")
    return " · ".join(parts)


def reading(number: str, language: str) -> str:
    """The paragraph after a lesson's last words: papers, and what to read next."""
    words, sheet = _WORDS[language], SHEETS[number]

    def line(name, links):
        listed = words["comma"].join(f"[{title}]({address})" for title, address in links)
        return f"**{words[name]}{words['stop']}** {listed}{words['stop']}"

    return f"{line('papers', sheet.papers)}\n\n{line('then', sheet.then)}"


def dress(notebook, name: str, language: str, takes: int, other: bool, printed: str) -> None:
    """Add what stands around a lesson to a notebook's first and last cell.

    Args:
        name, language, takes, other: see `heading`.
        printed: the stored output of the commands for a real model, shown below the paragraph that has them.
    """
    number, first, last = name[:2], notebook.cells[0], notebook.cells[-1]
    if printed:
        words = _WORDS[language]
        before, real, rest = last.source.partition(words["real"])
        told, *further = rest.split("\n\n", 1)
        last["source"] = "\n\n".join([f"{before}{real}{told}", words["ran"], f"```text\n{printed}\n```", *further])
    line = heading(name, language, takes, other)
    first["source"] = re.sub(r"\A(# .+)", lambda title: f"{title[1]}\n\n{line}", first.source)
    last["source"] = f"{last.source}\n\n{reading(number, language)}"
