"""Everything that touches Ray, and the command line."""
