"""Define what a client and a gateway exchange: queries, rows, descriptions, errors, and their conversion to protobuf
messages.

The client imports this room, so nothing here needs more than grpcio and protobuf.
"""
