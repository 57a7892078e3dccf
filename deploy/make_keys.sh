#!/bin/sh
# Keys of a pool with one broker, one key for its workers and one for an edge, in DIRECTORY. What is
# there already stays. Hand `edge.key_secret` and `broker.key` to the device that owns the prompts.
set -eu
directory=${1:?usage: make_keys.sh DIRECTORY}
midspan=${MIDSPAN:-midspan}
for name in broker worker edge; do
    [ -e "$directory/$name.key_secret" ] || "$midspan" keys new "$name" --keys "$directory"
done
[ -e "$directory/authorized/workers/worker.key" ] ||
    "$midspan" keys authorize "$directory/worker.key" --as worker --keys "$directory"
[ -e "$directory/authorized/edges/edge.key" ] ||
    "$midspan" keys authorize "$directory/edge.key" --as edge --keys "$directory"
