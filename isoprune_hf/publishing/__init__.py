"""What a pruned model is shown with: its card, tables and pictures, its speed, and the way to the Hub."""
