"""The shell: the network side. pyzmq lives here and nowhere else.

Owns:    this map. Read in this order; each file uses only those above it:

    endpoints   socket options, whether anybody is there, refusals of our own
    cutting     cutting off one connection
    connections the connections of a socket, and what they sent that is not whole
    descriptors how many connections there may be
    zap         who may come in: the thread that libzmq asks before each handshake
    listening   the listening sockets: bound, and handed on to the next shell
    link        the ZeroMQ end for clients
    alink       the same for asynchronous clients
    crowd       what subscribers cost, and who is cut off
    monitor     the monitor thread: the core's events to subscribers
    envelope    the envelope of a request
    peers       whose request is next
    owed        replies on their way out
    loop        the request loop
    server      AgentServer: the shell as a Python object
    child       the shell as a process of the keeper

Runs in: see each file. Nothing is imported here, so that looking at the package does not load pyzmq.
Unaware: of agents. It passes bytes between the network and the core, and decides nothing.
"""
