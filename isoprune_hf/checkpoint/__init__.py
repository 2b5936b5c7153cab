"""How a pruned model is stored and rebuilt."""
