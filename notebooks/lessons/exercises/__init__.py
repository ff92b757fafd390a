"""The exercises, one module a lesson: `eNN.EXERCISES`."""
