"""The network side (pyzmq); it decides nothing about agents.

Reading order: `endpoints` (addresses, socket options), `server` (AgentServer: the REP loop),
`child` (the same as a process of the keeper), `monitor` (events to subscribers), `link` (the client's end).
This package imports nothing by itself, so that looking at it does not load pyzmq.
"""
