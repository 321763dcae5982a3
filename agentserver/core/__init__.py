"""The core: agents, their output and what is known of them. Standard library only.

Owns:    this map. Read in this order; each file uses only those above it:

    framing     messages cut from a stream                        pure
    lifecycle   the statuses and how they follow each other       pure
    backends    from a request to argv, environment, stdin        pure
    output      what an agent wrote, by absolute offset
    log         our own log
    counters    numbers that outlive us
    channel     the line between keeper and child
    reactor     the loop: descriptors, deadlines, signals
    process     start, signal and reap one child
    tree        who descends from whom, by /proc
    registry    everything that must be remembered: sqlite3
    feed        what is told to whoever listens
    agent       the record of one agent
    run         one attempt while its process exists: pipes, stdin
    family      which processes belong to which agent
    ending      the stop ladder, the exit, the exit record
    supervisor  policy: what is wanted against what is
    commands    what can be asked of one agent
    facts       what a health check tells of the server
    control     handle(): decode, dispatch, do once, encode
    connection  one connection to core.sock
    service     the core process
    notify      what is said to a service manager, and the descriptors that it keeps
    keeper      the keeper process
    link        the other end: how the shell and local clients talk to a core

Runs in: see each file.
Unaware: of the network, the client and the command line.

One request, from socket to process and back: connection -> control.handle -> commands -> supervisor
-> process -> (SIGCHLD) ending -> supervisor -> registry and feed -> connection.
"""
