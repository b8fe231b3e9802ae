#!/bin/sh
# Installs node-engine on this machine: the binary, the service, and a configuration to fill in. Repeatable; an existing
# configuration is left as it is.
#
#   ./install-node.sh [BINARY] [--cluster HOST[:PORT]] [--start]
#
# Without BINARY the release build of this checkout is taken.
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
binary= cluster= start=no
while [ $# -gt 0 ]; do
    case $1 in
        --cluster) cluster=${2:?--cluster needs HOST[:PORT]}; shift ;;
        --start) start=yes ;;
        -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) echo "install-node.sh: there is no option $1 (try --help)" >&2; exit 2 ;;
        *) binary=$1 ;;
    esac
    shift
done
binary=${binary:-$here/../target/release/node-engine}

# DESTDIR puts everything under another root, for packages and tests; nothing is started there.
root=${DESTDIR:-}
if [ -z "$root" ] && [ "$(id -u)" -ne 0 ]; then
    echo "install-node.sh: run it as root, for example with sudo" >&2
    exit 1
fi
if [ ! -x "$binary" ]; then
    echo "install-node.sh: there is no binary at $binary: build it with \`cargo build --release\`, or name it" >&2
    exit 1
fi
case $cluster in
    *[!]A-Za-z0-9.:_/[-]*) echo "install-node.sh: $cluster is not HOST[:PORT]" >&2; exit 2 ;;
esac

install -d -m 755 "$root/usr/local/bin" "$root/usr/local/lib/node-engine" "$root/etc/node-engine" "$root/etc/systemd/system"
# What is replaced is kept: it is started again where this version cannot take over from it (go-back.sh).
installed=$root/usr/local/bin/node-engine
if [ -x "$installed" ] && ! cmp -s "$binary" "$installed"; then
    cp -p "$installed" "$installed.previous"
fi
# Beside and renamed: a running daemon keeps its own binary, and no half of one is ever started.
install -m 755 "$binary" "$root/usr/local/bin/node-engine.new"
mv -f "$root/usr/local/bin/node-engine.new" "$root/usr/local/bin/node-engine"
install -m 755 "$here/go-back.sh" "$root/usr/local/lib/node-engine/go-back.sh"
install -m 644 "$here/node-engine.service" "$root/etc/systemd/system/node-engine.service"
config=$root/etc/node-engine/config.toml
if [ ! -e "$config" ]; then
    install -m 644 "$here/config.toml" "$config"
fi
if [ -n "$cluster" ]; then
    # In the table [cluster], wherever that is; a port of before would win over the one that is named now.
    awk -v host="$cluster" '
        /^[ \t]*\[/ { header = 1; inside = ($0 ~ /^[ \t]*\[[ \t]*cluster[ \t]*\][ \t\r]*(#.*)?$/) }
        inside && /^[ \t]*(host|port)[ \t]*=/ { next }
        { print }
        inside && header && !named { print "host = \"" host "\""; named = 1 }
        { header = 0 }
        END { if (!named) print "\n[cluster]\nhost = \"" host "\"" }
    ' "$config" >"$config.new"
    # Written into, so that owner and mode stay.
    cat "$config.new" >"$config"
    rm -f "$config.new"
fi
echo "installed $("$root/usr/local/bin/node-engine" version 2>/dev/null || echo node-engine) to $root/usr/local/bin; configuration in $config"

if [ -n "$root" ] || [ ! -d /run/systemd/system ]; then
    [ "$start" = no ] || echo "systemd does not run here: start it with \`node-engine\`"
    exit 0
fi
systemctl daemon-reload
if [ "$start" = yes ]; then
    systemctl enable node-engine
    if grep -aq FDSTOREREMOVE=1 "$root/usr/local/bin/node-engine"; then
        systemctl restart node-engine
    else
        # Over a restart systemd keeps what the version before reads from, and this one would find that in use.
        systemctl stop node-engine
        systemctl start node-engine
    fi
    echo "started: \`node-engine status\` says how it is"
elif systemctl is-active --quiet node-engine; then
    echo "the version before runs until: systemctl restart node-engine"
elif [ -n "$cluster" ]; then
    echo "start it, now and with the machine: systemctl enable --now node-engine"
else
    echo "name the cluster in $config, then: systemctl enable --now node-engine"
fi
