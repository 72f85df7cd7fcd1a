"""On a node, outliving the command: starts the job's ranks, watches them, ends them."""
