"""The page: its state in the address, its answers, its routes."""
