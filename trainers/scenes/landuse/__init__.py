"""Draw the land-use classes: one function for each class, which draws it on a canvas and returns its facts."""
