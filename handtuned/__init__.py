"""handtuned: train big models on small memory, with kernels written by hand."""

__version__ = "0.1.0"
