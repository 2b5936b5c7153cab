"""From a base model to a smaller one: groups, scores, plan, cut."""
