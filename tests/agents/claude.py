"""Stand in for an agent CLI: print how it was called, then a stream of JSON lines as `claude -p` does.

Installed by a test under the name of the CLI in a directory on PATH.
"""
import json
import os
import sys

stdin = os.readlink("/proc/self/fd/0")
print("ready", flush=True)
print(json.dumps({"type": "system", "subtype": "init", "session_id": "s-1", "argv": sys.argv[1:], "stdin": stdin,
                  "name": os.path.basename(sys.argv[0]), "environment": dict(os.environ)}), flush=True)
print(json.dumps({"type": "result", "subtype": "success", "is_error": False, "result": "done"}), flush=True)
