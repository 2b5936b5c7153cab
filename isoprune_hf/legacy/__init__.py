"""Convert old checkpoints, pickled by torch.save, without importing, calling or executing anything in them.

- `convert.convert_file`: turn a file with a pickled module into a model with a config.
- `tree.find_model`: find the module in the content of a checkpoint.
- `archive.LegacyArchive`: read content and tensors of the zip file.
- `pickle_reader.read_pickle`: parse a pickle into plain values and records.

Knows nothing of commands. No other folder reads pickles.
"""
