"""What training takes: `estimate` works it out from sizes, `measure` counts it while a function runs.

The two agree within 5 % (`tests/test_memory_estimate.py`). Read `estimate.py` first: it says what a training step
holds, and when. `handtuned memory` is `command.py`.
"""

from .analyses import analyze_lora_params, analyze_memory_savings, korthikanti
from .estimate import estimate
from .tracker import Measurement, measure

__all__ = ["Measurement", "analyze_lora_params", "analyze_memory_savings", "estimate", "korthikanti", "measure"]
