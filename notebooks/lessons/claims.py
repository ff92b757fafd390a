"""What the study documents claim: one entry per claim, the lesson that tests it, and what came out.

A lesson measures, then calls `claim(number, measured, holds)`. That shows the note's sentence beside
the measurement, fails the notebook if the measurement does not bear the verdict out, and leaves a
record in the cell's output, from which the index of claims is made.
"""

from dataclasses import dataclass
from html import escape

MIMETYPE = "application/vnd.handtuned.claim+json"

DOCUMENTS = {
    "000": "CS224N lecture 12",
    "001": "Efficient training",
    "002": "Efficient neural network training",
    "003": "QLoRA diary",
    "004": "LoRA lesson",
}

# right: holds as written. imprecise: right in part or under conditions. wrong: does not hold.
# from the literature: a quoted result that needs machines we lack; what can be recomputed is.
VERDICTS = ("right", "imprecise", "wrong", "from the literature")


@dataclass(frozen=True)
class Claim:
    """One sentence of the notes, in our words.

    Attributes:
        number: 1…58.
        documents: where it stands, "000"…"004".
        says: what the notes say.
        notebook: the one lesson that tests it, "01"…"12".
        verdict: one of VERDICTS.
    """

    number: int
    documents: tuple[str, ...]
    says: str
    notebook: str
    verdict: str


def _claims(rows) -> dict[int, Claim]:
    return {
        number: Claim(number, tuple(documents.split()), says, notebook, verdict)
        for number, notebook, documents, verdict, says in rows
    }


# fmt: off
# ruff: noqa: E501
CLAIMS: dict[int, Claim] = _claims([
    # Mixed precision
    (1, "01", "000", "imprecise", "A float is a sign, an exponent that sets the range and a mantissa that sets the precision; losing precision hardly hurts a model."),
    (2, "01", "000", "imprecise", "What is too small for FP16 becomes 0, what is too large becomes NaN."),
    (3, "01", "000", "imprecise", "Close to half of the gradients become 0 in FP16."),
    (4, "01", "000", "wrong", "With w = 1e-7, x = 1 and y = 1.03e-7 the gradient is -3e-8, which FP16 rounds to 0."),
    (5, "01", "000 002", "imprecise", "FP32 master weights alone still lose tiny FP16 gradients; scaling the loss saves them, by borrowing bits of precision (002)."),
    (6, "03", "000", "wrong", "The training loop is auto_cast(device=\"cuda\", …), scaler(loss).backward(), scaler.step(optimizer), scaler.update()."),
    (7, "01", "000 001 002", "imprecise", "BF16 gives up precision for range, so it needs no loss scaling, and it reaches the same accuracy (002); a V100 does not have it."),
    (8, "04", "001 002", "wrong", "Mixed precision halves the memory."),
    (9, "03", "001", "right", "A step is scale, backward, unscale, clip, step, update; the smallest positive FP16 number is about 6e-8."),
    (10, "03", "001", "wrong", "A hand-written GradScaler doubles its scale whenever the count of successful steps is a multiple of growth_interval."),
    (11, "03", "001", "wrong", "A GradScaler is complete with scale_loss, unscale_grads, a step that checks for inf and NaN, and an update that does nothing."),
    (12, "03", "001", "right", "Softmax, LayerNorm and the loss are computed in FP32."),
    # LoRA
    (13, "07", "000", "wrong", "LoRA decomposes the weight, W = BA, like Q, K and V in self-attention."),
    (14, "07", "000 001 003 004", "imprecise", "The low-rank path is multiplied by alpha (000, 004), by alpha/r (the code of 000 and 001) or by nothing (003)."),
    (15, "07", "000 001 003 004", "imprecise", "A is [r, in] and B is [out, r] (000, 001, 003); B is [in, r] and A is [r, out] (004)."),
    (16, "07", "000", "wrong", "In the SVD ΔW = UΣVᵀ of an m×n matrix U is n×n and V is m×n."),
    (17, "07", "000 001 002 004", "right", "B = 0 and a random A start training at the pretrained model; with both at 0 no gradient would ever flow."),
    (18, "07", "000", "imprecise", "A is initialised by kaiming_normal_(lora_A, a=0.001)."),
    (19, "07", "004", "wrong", "A, stored as (in, r), is initialised by kaiming_uniform_(W_A, a=√5)."),
    (20, "07", "000", "wrong", "A LoRALinear class that wraps a linear layer and freezes its weight and bias."),
    (21, "07", "000 001 003", "imprecise", "Dropout goes on the sum of base and LoRA (000), on LoRA's input (001), or behind BA (003)."),
    (22, "07", "000 004", "imprecise", "The low-rank path is computed as x times the product BA."),
    (23, "08", "001", "wrong", "LoRALayer holds its own frozen weight, and merge_weights adds the scaled BA to it for inference."),
    (24, "08", "001", "right", "LoRALinear keeps the original layer, freezes it, and adds (alpha/r)·B(Ax)."),
    (25, "08", "001", "wrong", "apply_lora_to_model makes a model ready for LoRA by replacing every linear layer whose name contains a target."),
    (26, "08", "004", "imprecise", "To switch tasks, subtract BA from the weight and add the other task's B′A′."),
    (27, "08", "004", "wrong", "LoRA saves in training, but costs something at inference."),
    (28, "07", "001 003", "imprecise", "At 4096×4096 and r = 8, LoRA trains 65,536 of 16.8 million parameters, 0.4 %; of a whole model, 0.1 %."),
    (29, "08", "000 001", "imprecise", "LoRA works best on Q and V; K does worse, perhaps because it changes every query's attention pattern (001)."),
    (30, "12", "001 003", "imprecise", "The rank should be 8–64 (001), 4–32, or 4–16 for most tasks (003)."),
    (31, "08", "004", "from the literature", "With Adam, LoRA takes up to 2/3 off the memory; training GPT-3 175B fell from 1.2 TB to 350 GB."),
    (32, "08", "004", "imprecise", "With r = 4 on Q and V the checkpoint of GPT-3 shrinks 10,000 times, from 350 GB to 35 MB, and training is 25 % faster."),
    (33, "08", "003", "imprecise", "In the backward pass gradients flow through B and A only, which saves the memory."),
    (34, "08", "003 004", "from the literature", "Fine-tuning needs only a low intrinsic dimension, and that is why LoRA works."),
    (35, "07", "003", "imprecise", "The feed-forward part is W_down(SiLU(gate)·up), each matrix with its own BA added; SiLU is smooth and responds to negative inputs too."),
    # Checkpointing
    (36, "05", "001", "imprecise", "Checkpointing lowers the memory of activations from O(n) to O(√n)."),
    (37, "05", "001", "imprecise", "Checkpointing costs about 30 % more time."),
    (38, "05", "001", "wrong", "32 layers of width 4096 at 4 × 2048 tokens keep 3.00 GB of activations, 0.53 GB with checkpointing."),
    (39, "05", "001", "right", "CheckpointedTransformerLayer computes with torch's checkpoint what it computes without."),
    (40, "05", "001", "imprecise", "Checkpointing by hand is one autograd Function: run under no_grad, keep the inputs, run again in backward."),
    (41, "05", "002", "wrong", "Activation checkpointing is not recommended: it is very slow, values are computed again twice."),
    # Accumulation
    (42, "06", "001", "imprecise", "Dividing each loss by accumulation_steps and stepping once in so many batches, and once more for the rest, gives the gradients of the big batch."),
    (43, "06", "001", "imprecise", "The mean of the mini-batches' mean losses is the loss of the big batch."),
    # Memory, ZeRO
    (44, "04", "001", "right", "A 7B model in FP32 with Adam takes 28 GB for weights, 28 GB for gradients and 56 GB for Adam's two moments."),
    (45, "11", "002", "right", "A 7B model in mixed precision takes 16 bytes per parameter, 112 GB; over 8 GPUs ZeRO-1, 2 and 3 take 38.5, 26.25 and 14 GB each."),
    (46, "04", "002", "imprecise", "A 7B Qwen 1.5 at batch 1 and 2048 tokens in bf16 takes another 28.5 G, so 42.5 GB even with ZeRO-3."),
    (47, "11", "002", "wrong", "Memory: DDP < ZeRO-1 < ZeRO-2 < ZeRO-2 + offload < ZeRO-3 < ZeRO-3 + offload; 2 + offload is as far as one should go."),
    (48, "04", "002", "right", "When memory runs out, first drop compute_metrics, which keeps batch × vocabulary × length numbers, then lower batch and context length."),
    # Quantization
    (49, "10", "003", "imprecise", "Fine-tuning 1.5B parameters takes about 18 GB in full and about 1 GB with QLoRA, 95 % less."),
    (50, "09", "003", "wrong", "4-bit quantization stores round((W − zero_point)/scale) with scale = (max − min)/15, so [0.123, −0.456, 0.789, −0.234] becomes [7, 2, 15, 4]."),
    (51, "10", "003", "imprecise", "1.5B weights need 23 million constants, 93.75 MB; double quantization leaves 23.44 MB and 1 KB and saves about 70 MB."),
    (52, "09", "003", "imprecise", "Double quantization costs hardly any accuracy, because the scale shrinks the error of the constants."),
    (53, "09", "003", "imprecise", "NF4 is the 4-bit format made for the weights of neural networks."),
    (54, "10", "003", "wrong", "The QLoRA paper's table for LLaMA-65B: MMLU 63.4, 63.2, 63.1 % at 780, 48 and 41 GB; double quantization saves 7 GB."),
    # Schedule
    (55, "06", "003", "imprecise", "The learning rate rises from 0 over the first 10 % of data/batch × epochs steps, then falls along a cosine."),
    # Open questions of 004
    (56, "08", "004", "imprecise", "What can go wrong with LoRA? A reader: one adapter per task, so tasks that have no name get no adapter."),
    (57, "12", "004", "right", "LoRA's settings can be searched automatically (AutoML)."),
    (58, "09", "004", "imprecise", "LoRA and product quantization are related: both look at a part of the space only, divide and conquer (a reader)."),
])
# fmt: on


def claim(number: int, measured: str, holds: bool) -> None:
    """Show what the notes say beside what was measured, and fail if the measurement does not bear the verdict out.

    Args:
        number: 1…58.
        measured: one or two sentences with the figures, made from the cell's variables.
        holds: whether the verdict in `CLAIMS` is what the measurement shows.

    Raises:
        KeyError: no such claim.
        AssertionError: `holds` is false.
    """
    entry = CLAIMS[number]
    names = ", ".join(f"{key} {DOCUMENTS[key]}" for key in entry.documents)
    lines = [
        (f"Claim {number}. The notes say ({names})", entry.says),
        ("We measure", measured),
        ("Verdict", entry.verdict),
    ]
    text = "\n".join(f"{label}: {what}" for label, what in lines)
    assert holds, f"the measurement does not bear this out\n{text}"
    from .notebook import display

    html = "<br>".join(f"<b>{escape(label)}:</b> {escape(what)}" for label, what in lines)
    record = {"claim": number, "verdict": entry.verdict, "measured": measured}
    display({"text/plain": text, "text/html": f"<blockquote>{html}</blockquote>", MIMETYPE: record})
