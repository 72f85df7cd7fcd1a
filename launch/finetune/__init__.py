"""One loop over strategies; a strategy only prepares, steps, clips, saves and loads."""
