"""What the texts of a node's files and tools say: pure parsers, each beside the frozen type that it gives.

A reading never fails on a text: what it cannot make out it leaves out, or gives as None. Sizes are bytes.
"""
