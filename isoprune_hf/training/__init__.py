"""The distillation training loop, with checkpoints from which a stopped run resumes bit for bit.

Entry points:
    `finetune.finetune` trains a model by a recipe; it builds a `trainer.Trainer` and its callbacks.
    `run.TrainingRun` owns the folder of a resumable run: its lock, snapshots, log and signals.

Nothing here knows about pruning, model folders or the command line: the caller saves checkpoints.
"""
