"""The folder of a model: its format, the code that opens it, and safe writing.

- `modeling_isoprune.IsoPruneForImageClassification`, `dense.IsoPruneConfig`: open and save a folder with transformers.
- `image_processor.IsoImageProcessor`, `image_processor.channels_of`: pixel values, and their number of channels.
- `structure.capture_structure`, `structure.meta_copy`: describe a cut model by its differences from the base.
- `target.open_target`, `folder.save_model_folder`: lock the place of a result, and write it whole or not at all.
- `snapshots.write_snapshot`, `snapshots.read_newest_snapshot`: saved states of training and scoring runs.
- `fingerprint.fingerprint`: hash of a model's weights.

Knows nothing of pruning, data or recipes. `modeling_isoprune` and the modules in its `PARTS` are saved with the
weights and import nothing from isoprune_hf but each other.
"""
