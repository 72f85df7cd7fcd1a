"""A model becomes stages: pruned and loaded (stage), joined to its neighbours (handoff)."""
