"""Benchmarks: providers of one result are checked first, then timed in turns; the scripts of a folder are run."""

from .timing import Case, compare, table

__all__ = ["Case", "compare", "table"]
