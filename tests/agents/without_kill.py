"""Run a program without the right to signal other users' processes: what root may and other users may not.

    without_kill.py PROGRAM [ARGUMENT...]

Only root can be without CAP_KILL and start what it then may not signal (capabilities(7)).
"""
import ctypes
import os
import sys

PR_CAPBSET_DROP, CAP_KILL = 24, 5
if ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_KILL, 0, 0, 0) != 0:
    sys.exit("CAP_KILL cannot be dropped")
os.execv(sys.argv[1], sys.argv[1:])
