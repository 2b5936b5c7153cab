"""Labelled images, training with a teacher, and what a number in the card is."""
