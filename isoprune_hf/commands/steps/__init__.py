"""Work that stages share or that is too long for a stage's module: opening, cutting, training, comparing, writing.

Entry points: `opening.open_inputs` (base, images and scores of a stage), `cutting.cut_and_evaluate`,
`training.train_student`, `comparing.inspect_model`, `checking.examine_folder`, `results.write_folder`.

These modules know accelerate and the library, but no flag and no parser.
"""
