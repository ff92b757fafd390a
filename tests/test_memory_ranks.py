"""`--memory-budget` on several ranks: each comes to the same plan, and stays within the budget."""

import json

import pytest
from ranks import one_after_another
from tiny import make_model

pytest.importorskip("transformers")

# Each rank leaves word of the most bytes of tensors that were alive while it trained.
COUNTED = """
import pathlib
from handtuned.nn.live_memory import LiveMemory
from handtuned.training import loop

class Alive(LiveMemory):
    most = 0
    def __torch_dispatch__(self, *operation):  # ZeRO-3 empties storages, which no operation shows
        result = super().__torch_dispatch__(*operation)
        known = list(self._storages.values())  # at once: a thread that communicates may let go of one meanwhile
        storages = [reference() for _, reference, _ in known]
        self.most = max(self.most, sum(storage.nbytes() for storage in storages if storage is not None))
        return result

train = loop.train
def counted(training, *args):
    with Alive() as alive:
        rows = [*train(training, *args)]
    pathlib.Path("PLACE", f"{training.world.mode}-{training.world.rank}.peak").write_text(str(alive.most))
    yield from rows
loop.train = counted
"""


# In 16 bits a pass of one row is small beside the sums of gradients, which are in FP32.
SMALL = ["--dtype", "bfloat16", "--batch-size", "1", "--gradient-accumulation-steps", "2"]


@pytest.mark.parametrize(("method", "budget", "more"), [("lora", "3MB", []), ("full", "8MB", []),
                                                        ("full", "7MB", SMALL)])  # fmt: skip
def test_each_rank_stays_within_the_budget(method, budget, more, tmp_path):
    rows, model = tmp_path / "rows.jsonl", make_model(tmp_path / "model", num_hidden_layers=6, intermediate_size=192)
    chat = [{"role": "user", "content": " ".join(["w1"] * 40)}, {"role": "assistant", "content": "w2 w3"}]
    rows.write_text(f"{json.dumps({'messages': chat})}\n" * 16)
    flags = ["--model", model, "--data", str(rows), "--method", method, "--device", "cpu", "--max-steps", "2",
             "--eval-fraction", "0", "--batch-size", "4", "--learning-rate", "1e-3", "--max-seq-length", "64",
             "--dtype", "float32", "--memory-budget", budget, *more]  # fmt: skip
    modes = {mode: ["--parallel", mode] for mode in ("ddp", "zero1", "zero2", "zero3")}
    before = COUNTED.replace("PLACE", str(tmp_path))
    codes, printed = one_after_another(flags, tmp_path, modes, before=before)
    assert codes == {rank: ["0"] * len(modes) for rank in range(2)}, printed
    for mode in modes:
        plan = json.loads((tmp_path / mode / "results.json").read_text())["memory"]
        peaks = [int((tmp_path / f"{mode}-{rank}.peak").read_text()) for rank in range(2)]
        for peak in peaks:
            assert peak <= plan["budget"] and peak == pytest.approx(plan["peak"], rel=0.05), (mode, peak, plan)
