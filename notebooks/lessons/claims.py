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

# Each verdict, and what it says.
VERDICTS = {
    "right": "holds as written",
    "imprecise": "right in part or under conditions",
    "wrong": "does not hold",
    "undecidable here": "needs machines or models that a laptop lacks: what can be recomputed is, the rest is cited",
}


@dataclass(frozen=True)
class Claim:
    """One sentence of the notes, in our words and in theirs.

    Attributes:
        number: 1…70.
        documents: where it stands, "000"…"004".
        says: what the notes say.
        notebook: the one lesson that tests it, "01"…"12".
        verdict: one of VERDICTS.
        original: their words, or line of code, behind the number of each document: 000「…」「…」 001「…」.
    """

    number: int
    documents: tuple[str, ...]
    says: str
    notebook: str
    verdict: str
    original: str


def _claims(rows) -> dict[int, Claim]:
    return {
        number: Claim(number, tuple(documents.split()), says, notebook, verdict, original)
        for number, notebook, documents, verdict, says, original in rows
    }


# fmt: off
# ruff: noqa: E501
CLAIMS: dict[int, Claim] = _claims([
    # Mixed precision
    (1, "01", "000", "imprecise", "A float is a sign, an exponent that sets the range and a mantissa that sets the precision; losing precision hardly hurts a model.",
     "000「exp 的大小决定了浮点数范围，digits 的大小决定了浮点数的精度」「实际上精度损失影响很小」"),
    (2, "01", "000", "imprecise", "What is too small for FP16 becomes 0, what is too large becomes NaN.",
     "000「如果参数小于 FP16 的表示范围就会变成 0，大于就会变成 NAN」"),
    (3, "01", "000", "imprecise", "Close to half of the gradients become 0 in FP16.",
     "000「在 FP16 中这些梯度接近一半都会直接设为 0」"),
    (4, "01", "000", "wrong", "With w = 1e-7, x = 1 and y = 1.03e-7 the gradient is -3e-8, which FP16 rounds to 0.",
     "000「计算梯度 $g=(wx-y)*x=(0.0000001*1-000000103)*0.0000001=-3e-8$，超过 FP16 的表示范围，会直接表示为 0」"),
    (5, "01", "000 002", "imprecise", "FP32 master weights alone still lose tiny FP16 gradients; scaling the loss saves them, by borrowing bits of precision (002).",
     "000「这个想法没有解决根本问题」「给他乘一个缩放因子」 002「我们可以借位精度，这样range就可以变大了」"),
    (6, "03", "000", "wrong", "The training loop is auto_cast(device=\"cuda\", …), scaler(loss).backward(), scaler.step(optimizer), scaler.update().",
     "000「scaler(loss).backward()」"),
    (7, "01", "000 001 002", "imprecise", "BF16 gives up precision for range, so it needs no loss scaling, and it reaches the same accuracy (002); a V100 does not have it.",
     "000「它牺牲了精度提高了表示范围」 001「BF16 范围更大,不需要 scaling」 002「居然能达到相同的准确度」「如v100这些机器不支持」"),
    (8, "04", "001 002", "wrong", "Mixed precision halves the memory.",
     "001「一行代码减半显存」 002「显存占用能够降低一倍」"),
    (9, "03", "001", "right", "A step is scale, backward, unscale, clip, step, update; the smallest positive FP16 number is about 6e-8.",
     "001「先 unscale 梯度,然后裁剪」「FP16 的最小正数是 ~6e-8」"),
    (10, "03", "001", "wrong", "A hand-written GradScaler doubles its scale whenever the count of successful steps is a multiple of growth_interval.",
     "001「定期增大 scale」「if self.step_count % self.growth_interval == 0」"),
    (11, "03", "001", "imprecise", "A hand-written GradScaler has scale_loss, unscale_grads, a step that checks for inf and NaN, and an update that does nothing.",
     "001「手动实现 Gradient Scaler」「在 step 中已处理」"),
    (12, "03", "001", "right", "Softmax, LayerNorm and the loss are computed in FP32.",
     "001「哪些操作用 FP32 | Softmax, LayerNorm, Loss」"),
    # LoRA
    (13, "07", "000", "imprecise", "LoRA writes the increment as a product of low rank, like Q, K and V in self-attention; then: the weight is decomposed, W = BA.",
     "000「用低秩矩阵表示增量矩阵，类似自注意力机制里面的 Q、K、V」「W = BA」"),
    (14, "07", "000 001 003 004", "imprecise", "The low-rank path is multiplied by alpha (000, 004), by alpha/r (the code of 000 and 001) or by nothing (003).",
     "000「Y = Wx + BAx \\times alpha」「self.scaling = alpha / r」 001「self.scaling = lora_alpha / rank」 003「h = W @ x + (B @ A) @ x」 004「h += x @ (W_A @ W_B) * alpha」"),
    (15, "07", "000 001 003 004", "imprecise", "A is [r, in] and B is [out, r] (000, 001, 003); B is [in, r] and A is [r, out] (004).",
     "000「$B \\in m \\times r$ 和 $A \\in r \\times n$」 001「A: [rank, in_features] - 降维」「B: [out_features, rank] - 升维」 003「下投影矩阵，维度为 `[r, d_in]`」 004「B 是一个 $d \\times r$ 的矩阵， A 是一个 $r \\times k$ 的矩阵」"),
    (16, "07", "000", "wrong", "In the SVD ΔW = UΣVᵀ of an m×n matrix U is n×n and V is m×n.",
     "000「$U \\in n \\times n$」「$V \\in m \\times n$」"),
    (17, "07", "000 001 002 004", "right", "B = 0 and a random A start training at the pretrained model; with both at 0 no gradient would ever flow.",
     "000「如果 A 也初始化为 0 → 永远都是0，梯度更新不了」 001「如果 A 也是 0,梯度为 0」 002「用随机高斯分布生成 $A$，用零矩阵初始化 $B$」 004「使用随机高斯分布来初始化矩阵A，同时使用零矩阵初始化矩阵B」"),
    (18, "07", "000", "imprecise", "A is initialised by kaiming_normal_(lora_A, a=0.001).",
     "000「nn.init.kaiming_normal_(self.lora_A, a=0.001)」"),
    (19, "07", "004", "wrong", "A, stored as (in, r), is initialised by kaiming_uniform_(W_A, a=√5).",
     "004「nn.init.kaiming_uniform_(W_A, a=math.sqrt(5))」"),
    (20, "07", "000", "wrong", "A LoRALinear class that wraps a linear layer and freezes its weight and bias.",
     "000「class LoRALinear(nn.Module)」"),
    (21, "07", "000 001 003", "imprecise", "Dropout goes on the sum of base and LoRA (000), on LoRA's input (001), or behind BA (003).",
     "000「return self.dropout(output)」 001「lora_out = self.dropout(x)」 003「在 `B @ A` 计算后、加回主路径前应用」"),
    (22, "07", "000 004", "imprecise", "The low-rank path is computed as x times the product BA.",
     "000「x @ (self.lora_B @ self.lora_A).T」 004「x @ (W_A @ W_B)」"),
    (23, "08", "001", "wrong", "LoRALayer holds its own frozen weight, and merge_weights adds the scaled BA to it for inference.",
     "001「合并 LoRA 权重到原始权重(推理时使用)」"),
    (24, "08", "001", "right", "LoRALinear keeps the original layer, freezes it, and adds (alpha/r)·B(Ax).",
     "001「完整的 LoRA Linear 层(包含 bias)」"),
    (25, "08", "001", "wrong", "apply_lora_to_model makes a model ready for LoRA by replacing every linear layer whose name contains a target.",
     "001「将 LoRA 应用到模型的指定层」"),
    (26, "08", "004", "imprecise", "To switch tasks, subtract BA from the weight and add the other task's B′A′.",
     "004「只需在切换过程中减去 BA，然后使用另一个任务的训练好的参数 B’ 和 A’ 来替代就可以了」"),
    (27, "08", "004", "wrong", "LoRA saves in training, but costs something at inference.",
     "004「在推理上会带来一定的开销增长」"),
    (28, "07", "001 003", "imprecise", "At 4096×4096 and r = 8, LoRA trains 65,536 of 16.8 million parameters, 0.4 %; of a whole model, 0.1 %.",
     "001「(d+k)r / dk,r=8 时约 0.4%」「只训练 0.1% 参数」 003「参数量从原始的 16M → LoRA 仅 65K（减少99.6%）」"),
    (29, "08", "000 001", "imprecise", "LoRA works best on Q and V; K does worse, perhaps because it changes every query's attention pattern (001).",
     "000「实验证明将 LoRA 应用于 Q、V 矩阵效果最好」 001「对 K 效果较差。原因可能是 K 的变化会影响所有 Q 的 attention pattern」"),
    (30, "12", "001 003", "imprecise", "The rank should be 8–64 (001), 4–32, or 4–16 for most tasks (003).",
     "001「通常 8-64,任务越复杂 rank 越大」 003「推荐范围4-32」「`r=4~16` 对大多数任务已足够」"),
    (31, "08", "004", "undecidable here", "With Adam, LoRA takes up to 2/3 off the memory; training GPT-3 175B fell from 1.2 TB to 350 GB.",
     "004「可以将VRAM使用量减少多达2/3」「从1.2TB减少到350GB」"),
    (32, "08", "004", "imprecise", "With r = 4 on Q and V the checkpoint of GPT-3 shrinks 10,000 times, from 350 GB to 35 MB, and training is 25 % faster.",
     "004「checkpoint大小减少了10000倍（从350GB减少到35MB）」「训练速度提高了25%」"),
    (33, "08", "003", "imprecise", "In the backward pass gradients flow through B and A only, which saves the memory.",
     "003「反向传播时梯度只流经 B 和 A → 显存占用大幅降低」"),
    (34, "08", "003 004", "undecidable here", "Fine-tuning needs only a low intrinsic dimension, and that is why LoRA works.",
     "003「微调过程主要在低维子空间中完成」 004「可能仅仅依赖于较低的“内在维度”」"),
    (35, "07", "003", "imprecise", "The feed-forward part is W_down(SiLU(gate)·up), each matrix with its own BA added; SiLU is smooth and responds to negative inputs too.",
     "003「比ReLU平滑，在负区间有输出」"),
    # Checkpointing
    (36, "05", "001", "imprecise", "Checkpointing lowers the memory of activations from O(n) to O(√n).",
     "001「只保存检查点,其他重算 → 内存 O(√n)」"),
    (37, "05", "001", "imprecise", "Checkpointing costs about 30 % more time.",
     "001「约增加 30% 训练时间」"),
    (38, "05", "001", "wrong", "32 layers of width 4096 at 4 × 2048 tokens keep 3.00 GB of activations, 0.53 GB with checkpointing.",
     "001「估算每层的激活内存(简化)」"),
    (39, "05", "001", "right", "CheckpointedTransformerLayer computes with torch's checkpoint what it computes without.",
     "001「使用 Gradient Checkpointing 的 Transformer 层」「不保存中间激活值,反向传播时重新计算」"),
    (40, "05", "001", "imprecise", "Checkpointing by hand is one autograd Function: run under no_grad, keep the inputs, run again in backward.",
     "001「手动实现 Gradient Checkpointing」「前向时不保存中间结果(使用 no_grad)」"),
    (41, "05", "002", "imprecise", "Activation checkpointing is not recommended: it is very slow, values are computed again twice.",
     "002「激活检查点：不推荐，非常耗时」「重新计算这些值两次的时间成本」"),
    # Accumulation
    (42, "06", "001", "imprecise", "Dividing each loss by accumulation_steps and stepping once in so many batches, and once more for the rest, gives the gradients of the big batch.",
     "001「每 accumulation_steps 步更新一次」「处理最后不足 accumulation_steps 的 batch」"),
    (43, "06", "001", "imprecise", "The mean of the mini-batches' mean losses is the loss of the big batch.",
     "001「除以累积步数,保证梯度量级正确」"),
    # Memory, ZeRO
    (44, "04", "001", "right", "A 7B model in FP32 with Adam takes 28 GB for weights, 28 GB for gradients and 56 GB for Adam's two moments.",
     "001「7B * 4 bytes = 28 GB」「7B * 2 * 4 bytes = 56 GB (m + v)」"),
    (45, "11", "002", "right", "A 7B model in mixed precision takes 16 bytes per parameter, 112 GB; over 8 GPUs ZeRO-1, 2 and 3 take 38.5, 26.25 and 14 GB each.",
     "002「则共需要：2A + 2A + (4A + 4A + 4A) = 16A 字节存储」「降低到 16 *7/8=14GB」"),
    (46, "04", "002", "imprecise", "A 7B Qwen 1.5 at batch 1 and 2048 tokens in bf16 takes another 28.5 G, so 42.5 GB even with ZeRO-3.",
     "002「所需显存为 28.5G（粗略估计）」「都需要 28.5+14=42.5GB 显存」"),
    (47, "11", "002", "imprecise", "Memory: DDP < ZeRO-1 < ZeRO-2 < ZeRO-2 + offload < ZeRO-3 < ZeRO-3 + offload; 2 + offload is as far as one should go.",
     "002「显存： Zero 0 (DDP) < Zero 1 < Zero 2 < Zero 2 + offload < Zero 3 < Zero 3 + offload」「推荐最多试到 Zero2 + offload」"),
    (48, "04", "002", "imprecise", "When memory runs out, first drop compute_metrics, which keeps batch × vocabulary × length numbers, then take 16 bits, flash attention, a smaller batch with accumulation, a shorter context, ZeRO, a smaller model.",
     "002「优先级从高到低排列」「去掉compute_metrics： 有些代码会在输出层后计算rouge分等」"),
    # Quantization
    (49, "10", "003", "imprecise", "Fine-tuning 1.5B parameters takes about 18 GB in full and about 1 GB with QLoRA, 95 % less.",
     "003「总计: ~18GB」「总计: ~1GB ⬇️ 降低95%」"),
    (50, "09", "003", "wrong", "4-bit quantization stores round((W − zero_point)/scale) with scale = (max − min)/15, so [0.123, −0.456, 0.789, −0.234] becomes [7, 2, 15, 4].",
     "003「W_quantized = round((W - zero_point) / scale)」「[7, 2, 15, 4, ...]」"),
    (51, "10", "003", "imprecise", "1.5B weights need 23 million constants, 93.75 MB; double quantization leaves 23.44 MB and 1 KB and saves about 70 MB.",
     "003「量化参数: 23M × 4 bytes = 93.75 MB」「~256 组 × 4 bytes = 1 KB」「节省~70MB」"),
    (52, "09", "003", "imprecise", "Double quantization costs hardly any accuracy, because the scale shrinks the error of the constants.",
     "003「量化参数的误差会被放大系数所缩小」"),
    (53, "09", "003", "imprecise", "NF4 is the 4-bit format made for the weights of neural networks.",
     "003「这是专门为神经网络权重设计的量化格式」"),
    (54, "10", "003", "wrong", "The QLoRA paper's table for LLaMA-65B: MMLU 63.4, 63.2, 63.1 % at 780, 48 and 41 GB; double quantization saves 7 GB.",
     "003「QLoRA原论文（Dettmers et al., 2023）进行了详细实验」「显存节省: 7 GB ⬇️ (约15%)」"),
    # Schedule
    (55, "06", "003", "imprecise", "The learning rate rises from 0 over the first 10 % of data/batch × epochs steps, then falls along a cosine.",
     "003「总步数 = (数据集大小 / 批次大小) × 训练轮数」「学习率从 `0` 线性增长到 `2e-4`」"),
    # Open questions of 004
    (56, "08", "004", "imprecise", "What can go wrong with LoRA? A reader: one adapter per task, so tasks that have no name get no adapter.",
     "004「分析一下在使用 LoRA 微调的过程中，可能会存在哪些问题？」「因为不知道该换上哪套BA参数了？」"),
    (57, "12", "004", "right", "Homework: automate the choice of LoRA's settings with AutoML.",
     "004「请通过 AutoML 的方法自动化 LoRA 的调参过程」"),
    (58, "09", "004", "imprecise", "LoRA and product quantization are related: both look at a part of the space only, divide and conquer (a reader).",
     "004「LORA和ANN都是只关注部分向量即可, 也就是分而治之」"),
    # The notes' words on quality, speed and cost
    (59, "04", "001", "right", "A 7B model with batch 1 and 2048 tokens keeps 10–50 GB of activations.",
     "001「激活值: 取决于 batch/seq,通常 10-50 GB」"),
    (60, "04", "002", "right", "Flash attention lowers the memory, and trains faster too.",
     "002「Flash attention：不仅能够降低显存，更能提高训练速度」"),
    (61, "05", "001", "imprecise", "Checkpointing saves another 30–50 %.",
     "001「再试 Gradient Checkpointing:再省 30-50%,但变慢」"),
    (62, "06", "001", "imprecise", "Gradient accumulation makes training slower.",
     "001「累积多次梯度再更新 | 训练变慢」"),
    (63, "03", "001", "undecidable here", "FP16 computes faster and takes less memory.",
     "001「前向/反向: FP16(快、省内存)」"),
    (64, "07", "003", "undecidable here", "In the feed-forward part SwiGLU does better than GELU, ReLU and SiLU.",
     "003「激活函数采用SwiGLU比GELU、ReLU、SiLU效果更佳」"),
    (65, "07", "000", "right", "Cutting ΔW by an SVD afterwards is no substitute for LoRA: ΔW must first be had by full fine-tuning, which costs more.",
     "000「因为还得通过 Fulltune 得到 $\\Delta W$ 然后再分解，虽然参数占用减少了，但是计算量还增加了」"),
    (66, "11", "002", "imprecise", "Speed: ZeRO-1 > ZeRO-2 > ZeRO-2 + offload > ZeRO-3 > ZeRO-3 + offload.",
     "002「速度： Zero 1 > Zero 2 > Zero 2 + offload > Zero 3 > Zero 3 + offload」"),
    (67, "08", "004", "undecidable here", "Alpaca took 8 A100s of 80 GB three hours; with LoRA one RTX 4090 gets an equal model in five.",
     "004「使用了 8 块 80GB 的 A100 显卡，进行了 3 小时的微调」「使用了一块RTX 4090显卡，仅用了5个小时」"),
    (68, "12", "001 002", "imprecise", "LoRA does slightly worse than full fine-tuning.",
     "001「只训练低秩增量 | 效果略差」 002「能跑全参就别跑 Lora 或 Qlora，一方面是麻烦，另一方面的确是效果差点」"),
    (69, "12", "000", "imprecise", "Alpha is usually 1; it may be larger if the model has to learn what it has not seen.",
     "000「alpha 的取值一般为 1」「如果需要新学习的知识原模型没见过可以设为大于 1 的值」"),
    (70, "12", "002", "right", "QLoRA is slower than LoRA, but takes less memory.",
     "002「Qlora 的速度比lora慢，但所需显存更少」"),
])
# fmt: on


def claim(number: int, measured: str, holds: bool) -> None:
    """Show what the notes say beside what was measured, and fail if the measurement does not bear the verdict out.

    Args:
        number: 1…70.
        measured: one or two sentences with the figures, made from the cell's variables.
        holds: whether the verdict in `CLAIMS` is what the measurement shows.

    Raises:
        KeyError: no such claim.
        AssertionError: `holds` is false.
    """
    bundle = _bundle(CLAIMS[number], measured)
    assert holds, f"the measurement does not bear this out\n{bundle['text/plain']}"
    from .notebook import display

    display(bundle)


def _bundle(entry: Claim, measured: str) -> dict:
    names = ", ".join(f"{key} {DOCUMENTS[key]}" for key in entry.documents)
    lines = [
        (f"Claim {entry.number}. The notes say ({names})", entry.says),
        ("In their words", entry.original),
        ("We measure", measured),
        ("Verdict", entry.verdict),
    ]
    html = "<br>".join(f"<b>{escape(label)}:</b> {escape(what)}" for label, what in lines)
    return {
        "text/plain": "\n".join(f"{label}: {what}" for label, what in lines),
        "text/html": f"<blockquote>{html}</blockquote>",
        MIMETYPE: {"claim": entry.number, "verdict": entry.verdict, "measured": measured},
    }
