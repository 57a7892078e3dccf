#!/bin/sh
# The secrets that the manifests name, as YAML, from a directory of deploy/make_keys.sh:
#   deploy/kubernetes/make-secrets.sh keys redis://redis:6379/0 api_keys | kubectl apply -f -
set -eu
usage="usage: make-secrets.sh DIRECTORY REDIS_URL API_KEY_FILE"
keys=${1:?$usage} redis_url=${2:?$usage} api_keys=${3:?$usage}
make() {
    echo "---"
    name=$1
    shift
    kubectl create secret generic "$name" --namespace midspan --dry-run=client --output yaml "$@"
}
make midspan-broker-key --from-file="$keys/broker.key_secret" --from-file="$keys/broker.key"
make midspan-authorized --from-file="$keys/worker.key" --from-file="$keys/edge.key"
make midspan-worker-key --from-file="$keys/worker.key_secret" --from-file="$keys/broker.key"
make midspan-edge-key --from-file="$keys/edge.key_secret" --from-file="$keys/broker.key"
make midspan-api-keys --from-file=keys="$api_keys"
make midspan-redis --from-literal=url="$redis_url"
