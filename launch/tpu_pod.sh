#!/usr/bin/env bash
# A TPU slice from the queue, one command on all of its workers, and again after every preemption.
#
#   export PROJECT=p ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite
#   export IMAGE=us-docker.pkg.dev/p/kardia/tpu:1 NFS_HOST=10.0.0.2 NFS_PATH=/runs
#   launch/tpu_pod.sh kardia-a grpo configs/demo.py --run.dir /runs/a --mesh.fsdp -1
#
# IMAGE is built from launch/docker/Dockerfile with ACCELERATOR=tpu. /runs is NFS (Filestore, for instance), since all
# workers write one checkpoint together. A spot slice that is taken away sends SIGTERM first: the run saves and goes on
# in the next slice. The slice is deleted when the run is done.
set -euo pipefail

name=${1:?usage: launch/tpu_pod.sh NAME VERB [CONFIG.py] [--part.field value ...]}
shift
: "${PROJECT:?}" "${ZONE:?}" "${TYPE:?}" "${RUNTIME:?}" "${IMAGE:?}" "${NFS_HOST:?}" "${NFS_PATH:?}"
where=(--project "$PROJECT" --zone "$ZONE")

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null ||
    echo NONE
}
remove() { gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet; }
slice() {
  # Waits in the queue until the slice is there. What is over, or was taken away, is removed and asked for again.
  while [[ $(state) != ACTIVE ]]; do
    case $(state) in
      NONE)
        gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id "$name" \
          --accelerator-type "$TYPE" --runtime-version "$RUNTIME" --spot ;;
      FAILED | SUSPENDED) remove ;;
      *) sleep 30 ;;
    esac
  done
}
workers() { gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command "$1"; }

# The image's entry point is kardia; --net host lets the workers reach each other.
kardia=(sudo docker run --rm --name kardia --privileged --net host --stop-timeout 110
  --mount "type=volume,dst=/runs,volume-opt=type=nfs,volume-opt=device=:$NFS_PATH,volume-opt=o=addr=$NFS_HOST"
  "$IMAGE" "$@" --run.auto-resume --hosts.cluster gcetpu)

code=1
while ((code != 0)); do
  slice
  code=0
  workers "sudo docker rm -f kardia >/dev/null 2>&1 || true; sudo docker pull -q $IMAGE" &&
    workers "${kardia[*]@Q}" || code=$?
  if ((code != 0)); then
    # A run that fails on a slice that stays would fail on any other; the slice is left for a look.
    sleep 60
    if [[ $(state) == ACTIVE ]]; then exit "$code"; fi
  fi
done
remove
