"""gRPC: one file per service, translating between the protocol and the domain.

Imports the protocol stubs, the supervisor and the facts of the served model; neither torch nor the
engine. Status codes are known in `errors` only, deserialising and error conversion happen in
`registration` only.
"""
