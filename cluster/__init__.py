"""Two boxes become a pair. Knows hosts, links and files; knows nothing of models."""
