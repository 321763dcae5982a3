"""The core: agents, their output and what is known of them. Standard library only.

Owns:    this map. Read in this order; each file uses only those above it:

    framing     messages cut from a stream                        pure
    lifecycle   the statuses and how they follow each other       pure
    backends    from a request to argv, environment, stdin        pure
    files       files where an agent may have put something else
    index       when it was written
    segments    where the bytes of one stream lie
    output      what an agent wrote, by absolute offset
    pending     a reply that is not there yet
    log         our own log
    lock        one process per job and state directory
    channel     the line between keeper and child; carries descriptors
    reactor     the loop: descriptors, deadlines, signals
    scheduler   large work in small steps, the loop's time shared fairly
    counters    numbers that outlive us
    inherited   what an agent inherits: limits, umask, the tag of its descendants
    terminal    a pseudo-terminal: its two sides, its size, the relay that outlives us
    refusal     why a program could not be executed
    privacy     what only root may see of our processes
    process     start, signal and reap one child
    literals    words without which a pattern cannot match        pure
    query       one question about output, in a process that a timer ends
    lastwords   how children ended, noted before they are reaped
    witness     whether a child began, when a core died in the middle of a spawn
    pidfd       how a process ended that is nobody's child of ours
    tree        who descends from whom, by /proc
    queries     such questions as the core has them: their processes, their turns
    facts       what a health check tells of the server
    backlog     what waits to be written into the registry        pure
    database    the registry's file: locked, full, damaged, gone; sqlite3
    registry    everything that must be remembered
    patience    requests that wait while another process locks the registry
    feed        what is told to whoever listens
    pushing     output on its way to who listens
    reading     a piece of output as a reply tells it
    names       which agents a name or the beginning of an id can mean
    agent       the record of one agent
    stdin       what goes to an agent's stdin: accepted once, written once
    rounds      one deed for many agents, in steps
    trash       directories of forgotten agents, deleted little by little
    run         one attempt while its process exists: output pipes, timers
    losses      output that is gone, told as events
    takeover    what a core before us left of each agent
    starting    how an attempt begins: its files, its pipes, its process
    unlisted    agents that run and that the registry does not know
    family      which processes belong to which agent
    standstill  a tree that is stopped, step by step
    ending      the stop ladder, the exit, the exit record
    supervisor  policy: what is wanted against what is
    adoption    going on with the agents that a core before us left
    commands    what can be asked of one agent
    batch       one command on many agents, in steps
    control     handle(): decode, dispatch, do once, encode
    inbox       what one peer asks on one connection, in its order
    connection  one connection to core.sock
    orphan      a shell whose keeper died, ended when another has come
    service     the core process
    audience    who listens on a connection, and to what              pure
    link        the other end: how clients talk to a core
    framelink   the same for the shell
    alink       the same for asynchronous clients
    ssh         the way to a server on another machine
    relay       what `agentserver stdio` does: between stdin, stdout and a core
    notify      the service manager: readiness, watchdog, its store of descriptors
    held        what the keeper holds for the next core
    renew       a keeper that becomes its own newer version, in place
    part        core or shell as the keeper sees them: start, pace, words
    keeper      the keeper process: start, watch, start again, reload
    serving     the ways in: in the foreground, detached, as its own newer version

Runs in: see each file.
Unaware: of the network, the client and the command line.

One request, from socket to process and back: connection -> control.handle -> commands -> supervisor
-> starting -> registry (commit) -> takeover (pipes or terminal to the keeper) -> witness -> process ->
registry (commit) -> connection.
Its end: SIGCHLD or the keeper's word -> ending -> supervisor -> registry and feed -> connection.
A new core, after whatever came before: takeover.inherit -> adoption.load -> service.
"""
