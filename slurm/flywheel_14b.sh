#!/usr/bin/env bash
# Submits every job of a flywheel, each to start after the success of the one before:
#
#   bash slurm/flywheel_14b.sh [key=value | --yaml FILE]...
#
# on a machine where sbatch works and nemo-rmt is installed (it needs no GPU and no torch). Run again, with the same
# words, it submits what is neither done nor still in the queue. Account, partition and time are sbatch's variables
# (SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT), the number of nodes is NODES; slurm/README.md has all of them.
set -euo pipefail
NEMO_RMT_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export NEMO_RMT_HOME
# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$NEMO_RMT_HOME/slurm/launch.sh"

SCRIPTS=(pretrain anneal rmt posttrain evaluate)
declare -A STAGES=([pretrain]=pretrain [anneal]=anneal [rmt]=rmt [posttrain]="sft rl" [evaluate]=evaluate)
GPUS=8 # of a node, in the scripts' own #SBATCH lines

declare -A status    # of each stage, by "ITERATION STAGE"
declare -A queued    # "STATE REASON" of each of the user's jobs in Slurm, by id
declare -A job_state # of each of the flywheel's jobs, by "ITERATION SCRIPT": done, to submit, submitted, or Slurm's
declare -A job_id
declare -A depends_on
jobs=() # "ITERATION SCRIPT" in the order they run

main() {
    export NODES=${NODES:-2}
    describe_recipe "$@"
    [ -z "${CONTAINER_IMAGE:-}" ] || find_program
    use_environment # for this machine, also when the jobs have a container
    local gpus=${SBATCH_GPUS_PER_NODE:-$GPUS}
    gpus=${gpus##*:} # of TYPE:NUMBER
    [ "$gpus" != 0 ] || gpus=1 # a process without GPU
    use_cluster "$NODES" "${GPUS_PER_NODE:-$gpus}"
    nemo-rmt plan "${recipe[@]}" || exit $?
    read_run
    find_jobs
    check_submission "$@"
    submit_all "$@"
    print_jobs
}

# Sets run_dir, and the status of every stage.
read_run() {
    local plain iteration stage line
    run_dir=$(nemo-rmt recipes show "${recipe[@]}" | sed -n 's/^run_dir: //p')
    run_dir=${run_dir#\'} run_dir=${run_dir%\'}
    record=$run_dir/slurm_jobs.tsv
    plain=$(nemo-rmt status "${recipe[@]}" --plain) || exit $?
    while IFS=$'\t' read -r iteration stage line; do
        status["$iteration $stage"]=$line
        iterations=$((iteration + 1))
    done <<<"$plain"
}

# Sets jobs, their states, and the ids of those that Slurm still has.
find_jobs() {
    local iteration script job listing id state reason
    listing=$(squeue --me --noheader --format='%A %T %r') || exit "$FAILED"
    while read -r id state reason; do
        [ -z "$id" ] || queued[$id]="$state $reason"
    done <<<"$listing"
    for ((iteration = 0; iteration < iterations; iteration++)); do
        for script in "${SCRIPTS[@]}"; do
            job="$iteration $script"
            find_job "$iteration" "$script"
            [ -z "${job_state[$job]:-}" ] || jobs+=("$job")
        done
    done
}

find_job() { # ITERATION SCRIPT
    local stage exists="" missing="" id=""
    for stage in ${STAGES[$2]}; do
        [ -n "${status["$1 $stage"]:-}" ] || continue
        exists=yes
        [ "${status["$1 $stage"]}" = "done" ] || missing=yes
    done
    [ -n "$exists" ] || return 0
    [ ! -e "$record" ] || id=$(awk -F'\t' -v i="$1" -v s="$2" '$1 == i && $2 == s { id = $3 } END { print id }' "$record")
    # a job whose predecessor failed stays for a moment, until Slurm cancels it
    if [ -n "$id" ] && [ -n "${queued[$id]:-}" ] && [[ ${queued[$id]} != *DependencyNeverSatisfied* ]]; then
        job_state["$1 $2"]=${queued[$id]%% *}
        job_id["$1 $2"]=$id
    elif [ -n "$missing" ]; then
        job_state["$1 $2"]="to submit"
    else
        job_state["$1 $2"]="done"
    fi
}

# Nothing is submitted unless everything can be.
check_submission() { # [WORD]...
    local job missing="" script answer
    for job in "${jobs[@]}"; do
        if [ "${job_state[$job]}" = "to submit" ]; then
            missing=${missing:-$job}
        elif [ -n "$missing" ] && [ -n "${job_id[$job]:-}" ]; then
            refuse "job ${job_id[$job]} (iteration $job) is ${job_state[$job]}, but what comes before it, iteration" \
                "$missing, is neither done nor in the queue: scancel ${job_id[$job]}, and run this again"
        fi
    done
    for job in "${jobs[@]}"; do
        [ "${job_state[$job]}" = "to submit" ] || continue
        script=${job#* }
        answer=$(sbatch --test-only --nodes="$NODES" "$NEMO_RMT_HOME/slurm/${script}_14b.sh" "$@" 2>&1) ||
            refuse "Slurm would not take ${script}_14b.sh: ${answer//$'\n'/; }"
    done
}

submit_all() { # [WORD]...
    local job id before="" iteration script
    mkdir -p "$run_dir/slurm"
    for job in "${jobs[@]}"; do
        iteration=${job% *} script=${job#* }
        if [ "${job_state[$job]}" = "to submit" ]; then
            id=$(ITERATION=$iteration sbatch --parsable --nodes="$NODES" --job-name="${script}_$iteration" \
                --output="$run_dir/slurm/%x-%j.log" --kill-on-invalid-dep=yes ${before:+--dependency="afterok:$before"} \
                "$NEMO_RMT_HOME/slurm/${script}_14b.sh" "$@") ||
                { echo "nemo-rmt: the jobs before it are submitted: run this again for the rest" >&2 && exit "$FAILED"; }
            job_id[$job]=${id%%;*}
            job_state[$job]=submitted
            printf '%s\t%s\t%s\t%s\n' "$iteration" "$script" "${job_id[$job]}" "$(date --iso-8601=seconds)" >>"$record"
        fi
        [ "${job_state[$job]}" = "done" ] || depends_on["$job"]=$before
        before=${job_id[$job]:-}
    done
}

print_jobs() {
    local job
    printf '%-24s %-10s %-10s %s\n' job id "starts after" state
    for job in "${jobs[@]}"; do
        printf '%-24s %-10s %-10s %s\n' "iteration $job" "${job_id[$job]:--}" "${depends_on[$job]:--}" "${job_state[$job]}"
    done
    echo "Logs: $run_dir/slurm/. To watch: squeue --me, nemo-rmt status $run_dir"
}

main "$@"
