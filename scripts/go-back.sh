#!/bin/sh
# After the daemon has ended (ExecStopPost of node-engine.service): one that could not carry on what the version before it did has left
# that at work and says so by ending with 75. Then the binary before is put in its place, and systemd starts it.
set -eu

[ "${EXIT_STATUS:-}" = 75 ] || exit 0
directory=${DESTDIR:-}/usr/local/bin
if [ ! -x "$directory/node-engine.previous" ]; then
    echo "go-back.sh: there is no version before this one" >&2
    exit 0
fi
mv -f "$directory/node-engine" "$directory/node-engine.refused"
mv -f "$directory/node-engine.previous" "$directory/node-engine"
echo "node-engine: this version could not take over; the one before is started again, and this one is kept as node-engine.refused"
