"""The benchmark harness: providers of one result are checked first, then timed in turns (`timing.py`).

`runner.py` runs the scripts of a folder within a time limit, and says on which machine.
"""

from .timing import Case, compare, table

__all__ = ["Case", "compare", "table"]
