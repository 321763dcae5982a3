"""Say which signals come; exit on the Nth.

    catcher.py N CODE

Catches INT, TERM, HUP, USR1, USR2, QUIT and CONT (CONT does not count), one line each.
"""
import os
import signal
import sys

left, code = int(sys.argv[1]), int(sys.argv[2])
caught = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGCONT]
signal.pthread_sigmask(signal.SIG_BLOCK, caught)
os.write(1, b"ready\n")
while left:
    number = signal.sigwait(caught)
    os.write(1, signal.Signals(number).name.encode() + b"\n")
    left -= number != signal.SIGCONT
os.write(1, b"bye\n")
os._exit(code)
