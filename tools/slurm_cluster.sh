#!/usr/bin/env bash
# Run a small real Slurm on this machine, for `make test-slurm`: munged, slurmctld and two slurmd (n1, n2).
#   tools/slurm_cluster.sh start [FOLDER]   install missing packages (Debian, Ubuntu), start missing daemons, and
#                                           print the value for SLURM_CONF; repeatable
#   tools/slurm_cluster.sh stop [FOLDER]    stop it and remove the folder
#   tools/slurm_cluster.sh run COMMAND...   run a command with a Slurm that already answers here, or else with
#                                           this one, which is stopped afterwards; one run at a time
# It needs neither systemd nor a free standard port, doesn't touch /etc and /run, and works as root in a container.
set -euo pipefail

folder=/tmp/lvssl-slurm-$(id -u)
[ "${1:-}" = run ] || folder=${2:-$folder}
conf=$folder/slurm.conf
port=${LVSSL_SLURM_PORT:-17000}  # of slurmctld; n1 and n2 use the next two
me=$(id -un)
export PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

answers() { sinfo -h -o %n 2>/dev/null | grep -q .; }

install_missing() {
    local command missing="" package
    for command in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge; do
        package=${command#*:}
        command -v "${command%%:*}" >/dev/null || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    command="apt-get update && apt-get install -y --no-install-recommends$missing"
    command -v apt-get >/dev/null || die "missing:$missing (names as on Debian); install their like, then repeat"
    say "system packages:$missing"
    local as_root=""
    [ "$(id -u)" = 0 ] || as_root="sudo -n"
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq update >/dev/null 2>&1 || true
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 install \
        --no-install-recommends $missing >/dev/null 2>&1 </dev/null || die "needs root: $command"
}

configure() {
    # cred_expire: how long a requeued job waits (with the default of 120 s, 150 s). config_overrides: four CPUs
    # per node, whatever the machine has. kill_invalid_depend isn't set: each job requests it itself.
    cat >"$conf" <<CONF
ClusterName=lvssl
SlurmctldHost=localhost
SlurmctldPort=$port
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=2
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=5
OverTimeLimit=0
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=30
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=4 RealMemory=1000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=4 RealMemory=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 PriorityTier=1 GraceTime=30 State=UP
PartitionName=urgent Nodes=n1,n2 MaxTime=10 PriorityTier=9 PreemptMode=OFF State=UP
CONF
}

running() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

wait_for() {  # waits for a condition, up to 20 s
    for _ in $(seq 200); do if eval "$1" >/dev/null 2>&1; then return 0; fi; sleep 0.1; done
    die "no answer from $2; see $folder/*.log"
}

start() {
    install_missing
    export SLURM_CONF=$conf
    mkdir -p "$folder/state"
    chmod 755 "$folder"
    [ -f "$folder/munge.key" ] || { (umask 077; head -c 1024 /dev/urandom >"$folder/munge.key"); configure; }
    if ! running "$folder/munged.pid"; then
        rm -f "$folder"/munge.socket*
        munged --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" --pid-file "$folder/munged.pid" \
            --log-file "$folder/munged.log" --seed-file "$folder/munge.seed" 2>/dev/null
        wait_for "[ -S '$folder/munge.socket' ]" munged
    fi
    running "$folder/slurmctld.pid" || slurmctld -f "$conf"
    wait_for "scontrol ping | grep -q UP" slurmctld
    for node in n1 n2; do
        mkdir -p "$folder/spool-$node"
        running "$folder/slurmd-$node.pid" || slurmd -f "$conf" -N "$node"
        wait_for "sinfo -h -n $node -t idle,mixed,allocated -o %t | grep -q ." "slurmd $node"
    done
    echo "$conf"
}

stop() {
    [ -d "$folder" ] || return 0
    export SLURM_CONF=$conf
    scancel --user "$me" 2>/dev/null || true
    sleep 1
    local file pid
    for file in "$folder"/slurmd-n1.pid "$folder"/slurmd-n2.pid "$folder"/slurmctld.pid "$folder"/munged.pid; do
        running "$file" || continue
        pid=$(cat "$file")
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        kill -9 "$pid" 2>/dev/null || true
    done
    rm -rf "$folder"
}

run() {
    if answers; then "$@"; return; fi
    exec 9>"$folder.lock"
    flock -n 9 || { say "waiting for another \`$0 run\` to end"; flock 9; }
    trap stop EXIT
    start >/dev/null 9>&-
    "$@"
}

case ${1:-} in
    start | stop) "$1" ;;
    run) shift; run "$@" ;;
    *) die "usage: tools/slurm_cluster.sh start|stop [FOLDER], or run COMMAND..." ;;
esac
