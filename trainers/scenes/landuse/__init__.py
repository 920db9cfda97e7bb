"""Land-use classes: one function for each, which draws it on a canvas and returns the facts of the scene."""
