"""What a pruned model is shown with: its card, tables and pictures, and the way to the Hub."""
