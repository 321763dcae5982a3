"""Put on the PYTHONPATH of a server, so that its core dies at an exact moment: before or after a system call.

The file that AGENTSERVER_DIES names says when: `before posix_spawn`, `after kill`, … It is removed by who dies of it.
"""
import os
import signal

place = os.environ.get("AGENTSERVER_DIES", "")


def dies(moment):
    try:
        with open(place) as file:
            if file.read() != moment:
                return
        os.unlink(place)
    except OSError:
        return
    signal.pthread_kill(__import__("threading").get_ident(), signal.SIGKILL)


def deadly(name):
    call = getattr(os, name)

    def called(*given, **named):
        if name == "kill" and not given[1]:  # it only asks whether it may
            return call(*given, **named)
        dies("before " + name)
        try:
            return call(*given, **named)
        finally:
            dies("after " + name)
    setattr(os, name, called)


if place:
    deadly("posix_spawn")
    deadly("kill")
    deadly("sendfile")
