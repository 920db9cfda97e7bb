"""Talk to a gateway: the synchronous and the asyncio client. Needs grpcio and protobuf only."""
