"""Flags that several stages share."""

from isoprune_hf.commands.stage import Flag

OVERWRITE = Flag("overwrite", bool, False, "Replace an existing OUTPUT.")
MODEL = Flag("model", str, None, "Folder of a model, or a name as for prune.model.", required=True)
BASE_MODEL = Flag("model", str | None, None, "Base model; replaces prune.model.")
SCORES = Flag("scores", str | None, None, "File of `isoprune score`: cut from these scores instead of scoring again.")
PRUNED_FOLDER = Flag("folder", str, None, "Folder of a pruned model.", required=True)
MOVED_BASE = Flag("base", str | None, None, "Current place of the dense base, if it has moved since the cut.")
PUSH_TO_HUB = Flag(
    "push_to_hub", str | None, None, "Hub repository (user/name) to upload the result to; needs a login."
)
PUSH_EVERY = Flag(
    "push_every",
    int | None,
    None,
    "Epochs between two checkpoints that are uploaded to the branch `training` of PUSH_TO_HUB during training.",
)


def output_flag(default: str) -> Flag:
    """Return the flag `output` with a stage's default place."""
    return Flag("output", str, default, "Where to write the result; it appears only when it is complete.")


def plan_flag(name: str) -> Flag:
    """Return a required flag that names a pruning plan."""
    return Flag(name, str, None, "A pruning_plan.json file, or the folder of a pruned model.", required=True)
