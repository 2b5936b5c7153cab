"""Checkpoints that torch.save has pickled, read as data: nothing in them is imported, called or executed."""
