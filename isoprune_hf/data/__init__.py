"""Labelled images: data sets, decoding, augmentation, and the batches of each rank.

Entry points:
    `dataset.load_data` opens a data set as an `ImageData` with two splits.
    `loading.eval_loader` and `loading.CalibrationBatches` load images in the model's evaluation transform.
    `streaming.epoch_batches` loads one rank's share of a training epoch, from a data set or from a stream.
    `augmentation.train_transform` builds the training transform of a recipe.

Nothing here knows about models, pruning or optimizers; an image processor is all that it takes from a model.
"""
