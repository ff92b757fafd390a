"""The exercises, one module per lesson: `eNN.EXERCISES`."""
