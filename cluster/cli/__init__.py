"""Define the command line: a thin function for each verb, shared options, and the verbs that only need a client."""
