"""Speed and memory, as ratios measured in one run beside a peer or a ceiling. `make bench` runs them; no test depends on them."""
