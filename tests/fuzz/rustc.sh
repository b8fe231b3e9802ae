#!/bin/sh
# rustc for `cargo xtask fuzz`: counts what is reached in the crates that take foreign bytes apart, and in no other. All that is
# counted is looked at after each input: with every crate counted, that takes longer than what is tried. Build scripts and macros,
# which are built without a target named, have no fuzzer to count for.
set -eu

rustc=$1
shift
crate=
target=
before=
for word; do
    case $before in
    --crate-name) crate=$word ;;
    --target) target=$word ;;
    esac
    before=$word
done
if [ -n "$target" ]; then
    case $crate in
    node_engine | node_engine_fuzz | netmanager_common | serde | serde_core | serde_json | serde_path_to_error | toml | toml_parser | \
        hickory_proto | tar | data_encoding | base64 | httparse | tungstenite | percent_encoding)
        # shellcheck disable=SC2086 # words, on purpose
        exec "$rustc" "$@" $FUZZ_INSTRUMENTATION
        ;;
    esac
fi
exec "$rustc" "$@"
