"""Define what a client and a gateway exchange: queries, changes, descriptions, errors, and their conversion to
protobuf messages.

The client needs this room and nothing below it but `orbithash.v1`, so nothing here imports numpy-heavy or native
libraries.
"""
