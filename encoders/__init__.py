"""Images to codes: the network's description, the model folder and the archive of codes."""
