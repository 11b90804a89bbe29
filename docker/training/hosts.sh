#!/bin/sh
# One training on several hosts: run the same line on each of them, in any order.
#
#   hosts.sh HOST[:PORT] HOSTS PROCESSES RECIPE --out DIR [options of trivium train]
#
# HOST       where the hosts meet: one of them, by a name that all of them resolve (port 29400 if none is given)
# HOSTS      how many there are; or MIN:MAX, and the run begins with MIN and starts anew with all when one comes or goes
# PROCESSES  on this host: its cards, or 1 on CPUs
# DIR        lies where all hosts read and write it; the same line goes on from what is there, on any number of hosts
#
# RUN_ID tells runs apart that meet at the same place; PYTHON is the interpreter; RESTARTS is how often the processes
# are started again after one of them failed (default 0, or 3 where hosts may come and go).
set -eu

usage() {
    sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//;p;}' "$0" >&2
    exit 2
}

[ $# -ge 4 ] || usage
case "$1" in *:*) endpoint=$1 ;; *) endpoint=$1:29400 ;; esac
hosts=$2
processes=$3
shift 3
case "$hosts:$processes" in *[!0-9:]*) usage ;; esac
case "$hosts" in *:*) restarts=3 ;; *) restarts=0 ;; esac
case " $* " in *" --out "* | *" --out="*) ;; *) echo "hosts.sh: --out DIR is missing, a directory that all hosts share" >&2; exit 2 ;; esac

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# torchrun's hosts would share a store that those who come later are never told of
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-python3}" -m torch.distributed.run \
    --nnodes "$hosts" --nproc-per-node "$processes" --max-restarts "${RESTARTS:-$restarts}" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "${RUN_ID:-trivium}" \
    -m trivium train "$@"
