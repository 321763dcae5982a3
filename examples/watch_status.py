"""Watch what happens to agents with nothing but pyzmq: the wire is two frames, a topic and JSON.

    python examples/watch_status.py PUB_ENDPOINT [COUNT]

`agentserver health` shows the endpoint. Ends after COUNT changes of status (default: never).
"""
from __future__ import annotations

import json
import sys

import zmq


def main() -> int:
    """Print one line per change of status."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: watch_status.py PUB_ENDPOINT [COUNT]")
    endpoint, left = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else -1
    with zmq.Context() as context, context.socket(zmq.SUB) as updates:
        updates.setsockopt(zmq.LINGER, 0)
        updates.setsockopt(zmq.IPV6, int("[" in endpoint))
        updates.setsockopt(zmq.SUBSCRIBE, b"status.")
        updates.setsockopt(zmq.SUBSCRIBE, b"server")
        updates.connect(endpoint)
        while left:
            _topic, body = updates.recv_multipart()
            update = json.loads(body)
            if update["type"] == "server_update":
                print(f"the server is {update['state']} with {update['active_agents']} agents", flush=True)
            elif update["update_type"] not in ("heartbeat", "output_available"):
                print(f"{update['sequence']:6d} {update['agent_id'][:8]} {update['status']}", flush=True)
                left -= 1
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
