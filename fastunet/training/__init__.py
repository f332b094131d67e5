"""Trainings from end to end on real data, as the command ``fastunet train`` runs them."""
