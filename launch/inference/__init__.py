"""Pipelined generation: requests, the groups that keep all stages busy, sampling."""
