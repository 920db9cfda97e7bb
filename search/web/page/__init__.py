"""The page: the state in its address, the answer to a state, and what is shown of it."""
