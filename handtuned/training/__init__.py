"""Training, stage by stage: settings → data → models → loop → evaluation, with checkpoints, logging and ranks.

The commands `finetune`, `tune`, `merge` and `generate` are put together from these; nothing here imports a command.
"""
