#!/bin/sh
# Starts the Node Engine in the foreground.
#
#   ./start-up.sh amd64|arm64|arm-7 [OPTION...]
#
# The cluster is named by CLUSTER_MANAGER_IP (and CLUSTER_MANAGER_PORT), by an option of node-engine such as --cluster, or in
# /etc/node-engine/config.toml. The superuser password will be asked. With nohup it goes on after logging out:
#
#   nohup ./start-up.sh amd64 >/dev/null 2>&1 &
#
# (then sudo must not need to ask: run `sudo -v` before, or start it as root).
set -eu

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
usage() {
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
[ $# -ge 1 ] || usage
architecture=$1
shift
case $architecture in
    amd64) target_name=amd64 targets="x86_64-unknown-linux-musl x86_64-unknown-linux-gnu"; machines="x86_64" ;;
    arm64) target_name=arm64 targets="aarch64-unknown-linux-musl aarch64-unknown-linux-gnu"; machines="aarch64" ;;
    arm-7)
        target_name=armv7 targets="armv7-unknown-linux-musleabihf armv7-unknown-linux-gnueabihf"
        machines="armv7l armv8l"
        # A 64-bit kernel may carry a 32-bit system, as today's 32-bit Raspberry Pi OS does.
        [ "$(getconf LONG_BIT)" != 32 ] || machines="$machines aarch64"
        ;;
    *) echo "start-up.sh: $architecture is not an architecture: amd64, arm64 or arm-7" >&2; usage ;;
esac

# A build for this architecture, the newest kind first: named, beside this script, cross-built, or built on this machine.
find_binary() {
    for candidate in "${NODE_ENGINE_BINARY:-}" "$here/node-engine-$architecture"; do
        [ -n "$candidate" ] && [ -x "$candidate" ] && echo "$candidate" && return
    done
    for target in $targets; do
        for directory in "cross/$target/dist" "$target/release"; do
            candidate=$here/../target/$directory/node-engine
            [ -x "$candidate" ] && echo "$candidate" && return
        done
    done
    case " $machines " in
        *" $(uname -m) "*)
            [ -x "$here/../target/release/node-engine" ] && echo "$here/../target/release/node-engine" && return
            command -v node-engine && return
            ;;
    esac
    return 1
}

if ! binary=$(find_binary); then
    case " $machines " in
        *" $(uname -m) "*) ;;
        *)
            echo "start-up.sh: this machine is $(uname -m), and there is no build for $architecture; elsewhere it is made by" >&2
            echo "    cargo xtask build --release --target $target_name" >&2
            exit 1
            ;;
    esac
    if ! command -v cargo >/dev/null; then
        echo "start-up.sh: there is no build for $architecture, and no cargo to make one: see https://rustup.rs" >&2
        exit 1
    fi
    echo "start-up.sh: building node-engine for $architecture" >&2
    (cd "$here/.." && cargo build --release --package node-engine)
    binary=$(find_binary)
fi

# sudo forgets the environment: what configures the node is handed over by name.
set -- "$binary" "$@"
for name in $(env | sed -n 's/^\(CLUSTER_MANAGER_IP\|CLUSTER_MANAGER_PORT\|MY_PORT\|PUBLIC_WORKER_IP\|PUBLIC_WORKER_PORT\|DOCKER_HOST\|NODE_ENGINE_[A-Z0-9_]*\)=.*/\1/p'); do
    eval "set -- \"$name=\${$name-}\" \"\$@\""
done
if [ "$(id -u)" -eq 0 ]; then
    exec env "$@"
fi
exec sudo -- env "$@"
