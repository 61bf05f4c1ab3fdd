# shellcheck shell=bash
# What the batch scripts of this folder share; they source it. Every variable it reads is in slurm/README.md.
#
#   launch STAGE... -- [key=value | --yaml FILE]...
#
# runs stages of one iteration, one after the other, on all nodes of the Slurm job that it is called in.
set -euo pipefail

FINISHED=0 FAILED=1 WRONG_INPUT=2 STOPPED=75 # as in nemo_rmt/exit_codes.py
NODE_WAIT_S=120     # between the end of the first nemo-rmt and that of the last, longer than they wait for each other
MOST_RESTARTS=30    # of a job some of whose nemo-rmt keep getting killed; stopping at checkpoints is not limited
step_pid=           # of the srun that runs a stage
stop_requested=     # by which signal

refuse() { # MESSAGE
    echo "nemo-rmt: error: $*" >&2
    exit "$WRONG_INPUT"
}

# Where nemo-rmt is: sets `container`, srun's options for it, or puts a virtual environment first in PATH.
find_program() {
    container=()
    if [ -n "${CONTAINER_IMAGE:-}" ]; then
        local options
        options=$(srun --help 2>&1)
        [[ $options == *--container-image* ]] ||
            refuse "CONTAINER_IMAGE=$CONTAINER_IMAGE needs the pyxis plugin, which this Slurm does not have (srun --help" \
                "knows no --container-image): unset it and give a virtual environment with VENV"
        local mounts=${CONTAINER_MOUNTS:-$PWD:$PWD${RUN_DIR:+,$(realpath -m "$RUN_DIR"):$(realpath -m "$RUN_DIR")}}
        container=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD")
    else
        use_environment
    fi
}

use_environment() {
    local folder=${VENV:-$NEMO_RMT_HOME/.venv}
    [ -x "$folder/bin/nemo-rmt" ] ||
        refuse "VENV=$folder has no bin/nemo-rmt: make it with make install in $NEMO_RMT_HOME, or set VENV"
    export PATH="$folder/bin:$PATH"
}

# What the user said about the recipe: sets `recipe`, the words for nemo-rmt, from variables and then from arguments.
describe_recipe() { # [key=value | --yaml FILE]...
    local word words
    read -r -d '' -a words <<<"${OVERRIDES:-}" || true # it returns 1 at the end of the text
    recipe=("${RECIPE:=qwen3_14b}" ${words[@]+"${words[@]}"} "$@")
    for word in "${recipe[@]}"; do
        case $word in
            cluster.nodes=* | cluster.gpus_per_node=*)
                refuse "$word is what Slurm gives the job: use sbatch --nodes (NODES for flywheel_14b.sh) and GPUS_PER_NODE" ;;
        esac
    done
    [ -z "${RUN_DIR:-}" ] || recipe+=("run_dir=$RUN_DIR")
    [ -z "${ITERATIONS:-}" ] || recipe+=("iterations=$ITERATIONS")
}

use_cluster() { # NODES PROCESSES_PER_NODE
    recipe+=("cluster.nodes=$1" "cluster.gpus_per_node=$2")
}

# Defaults that the environment may override.
set_communication() {
    # says on which rank and why a communicator failed; without it NCCL is silent
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # a failed or timed out collective ends its rank, which is then noticed, instead of leaving it in CUDA
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    # kernels start in the order in which they are queued: Megatron overlaps tensor-parallel communication only then
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    # lines of different ranks reach the job's log when they are printed
    export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}
}

# --- inside of a job -------------------------------------------------------------------------------------------------

launch() { # STAGE... -- [key=value | --yaml FILE]...
    local stages=()
    while [ "$1" != -- ]; do
        stages+=("$1")
        shift
    done
    shift
    [ -n "${SLURM_JOB_ID:-}" ] || refuse "this is a batch script: start it with sbatch"
    trap 'request_stop USR1' USR1
    trap 'request_stop TERM' TERM
    log_start=$(stat -Lc %s "/proc/$$/fd/2")
    iteration=${ITERATION:-0}
    describe_recipe "$@"
    find_program
    place
    set_communication
    say "start $((${SLURM_RESTART_COUNT:-0} + 1)): ${stages[*]} of $RECIPE, iteration $iteration," \
        "on $SLURM_JOB_NUM_NODES node(s) $SLURM_JOB_NODELIST with $processes process(es) each, $(date --iso-8601=seconds)"
    if [ -z "${SLURM_RESTART_COUNT:-}" ]; then
        on_one_node plan "${recipe[@]}" || end $? "$(reason "nemo-rmt plan failed"); nothing was started"
    fi
    choose_stages "${stages[@]}"
    local entry
    for entry in ${to_run[@]+"${to_run[@]}"}; do
        run_stage "${entry#*/}" "${entry%%/*}"
    done
    if [ "${stages[*]}" = evaluate ]; then
        on_one_node report "${recipe[@]}" || end $? "the report could not be written; the run is safe"
    fi
    end "$FINISHED" "done"
}

say() { echo "nemo-rmt job $SLURM_JOB_ID: $*"; }

end() { # EXIT_CODE MESSAGE
    trap '' USR1 TERM
    say "ended with exit code $1: $2"
    exit "$1"
}

# The nodes' number of processes, and the address under which they find the first.
place() {
    local gpus=${SLURM_GPUS_PER_NODE:-0} # what was asked for; where whole nodes are given, they may have more
    gpus=${gpus##*:}                     # of TYPE:NUMBER
    [ "$gpus" != 0 ] || gpus=${SLURM_GPUS_ON_NODE:-1}
    processes=${GPUS_PER_NODE:-$gpus}
    [[ $processes =~ ^[1-9][0-9]*$ ]] || refuse "GPUS_PER_NODE=$processes must be a number of processes, at least 1"
    if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && [ "$processes" -gt "$SLURM_GPUS_ON_NODE" ]; then
        refuse "GPUS_PER_NODE=$processes, but the job has $SLURM_GPUS_ON_NODE GPU(s) on a node: lower it, or ask for more" \
            "with sbatch --gpus-per-node"
    fi
    use_cluster "$SLURM_JOB_NUM_NODES" "$processes"
    local first address
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR=${address:-$first}
    # of sites that start jobs without the submitter's environment: steps have the job's
    export SLURM_EXPORT_ENV=ALL
    # --gpus-per-node=0 says that GPUs come otherwise (--gres) or not at all; a step would take it for no GPU
    [ "${SLURM_GPUS_PER_NODE:-}" != 0 ] || unset SLURM_GPUS_PER_NODE
}

on_one_node() { # COMMAND [WORD]...
    srun --nodes=1 --ntasks=1 --cpu-bind=none ${container[@]+"${container[@]}"} nemo-rmt "$@"
}

# Sets `to_run`, as ITERATION/STAGE: those of the stages asked for, and the data stage before them, that are not done.
choose_stages() { # STAGE...
    local plain line_iteration line_stage line_status name wanted="" found=""
    plain=$(on_one_node status "${recipe[@]}" --plain) || end $? "$(reason "nemo-rmt status failed"); nothing was started"
    for name in "$@"; do
        case $name in
            pretrain) wanted+=" 0/pretrain" ;; # there is one for all iterations
            *) wanted+=" $iteration/$name" ;;
        esac
    done
    to_run=()
    while IFS=$'\t' read -r line_iteration line_stage line_status; do
        name=$line_iteration/$line_stage
        [[ " $wanted " != *" $name "* ]] || found=yes
        [[ " 0/data$wanted " == *" $name "* ]] || continue
        if [ "$line_status" = "done" ]; then
            say "iteration $line_iteration $line_stage is done"
        else
            to_run+=("$name")
        fi
    done <<<"$plain"
    [ -n "$found" ] || end "$WRONG_INPUT" "the recipe has no such stage in iteration $iteration: $*"
}

run_stage() { # STAGE ITERATION
    [ -z "$stop_requested" ] || requeue "stopped by $stop_requested before $1"
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
        --kill-on-bad-exit=0 --wait="$NODE_WAIT_S" ${container[@]+"${container[@]}"} \
        nemo-rmt stage "$1" "${recipe[@]}" --iteration "$2" &
    await_step "iteration $2 $1"
}

# Waits for the srun that was just started in the background. Returns when it is done; else the job ends, or is requeued.
await_step() { # WHAT
    local status interrupted_by
    step_pid=$!
    [ -z "$stop_requested" ] || request_stop "$stop_requested" # it came before there was anything to forward it to
    while true; do
        interrupted_by=$stop_requested status=0
        wait "$step_pid" || status=$?
        [ "$stop_requested" != "$interrupted_by" ] || break # else the trap ended the wait, not srun
    done
    step_pid=
    case $status in
        "$FINISHED") ;;
        "$STOPPED") requeue "$1 stopped at a checkpoint" ;;
        "$FAILED" | "$WRONG_INPUT") end "$status" "$(reason "$1 failed")" ;;
        *)
            # before Python runs, the signal itself ends a process
            [ -z "$stop_requested" ] || requeue "$1 stopped by $stop_requested (srun's exit code is $status)"
            requeue_lost "$1: a nemo-rmt was killed (srun's exit code is $status)"
            ;;
    esac
}

# Slurm's signal, or a person's: every process of the stage gets SIGUSR1, which asks for a checkpoint.
request_stop() { # SIGNAL
    stop_requested+=${stop_requested:+, }$1
    [ -z "$step_pid" ] || kill -USR1 "$step_pid" 2>/dev/null || true
}

# What nemo-rmt said last in this start of the job, so that the last line of the log has it.
reason() { # DEFAULT
    local said="" log=/proc/$$/fd/2
    if [ -f "$log" ]; then
        said=$(tail -c +$((log_start + 1)) "$log" | grep -a '^nemo-rmt: ' | tail -n 1) || true
    fi
    said=${said:-$1}
    echo "${said#nemo-rmt: }"
}

requeue_lost() { # MESSAGE
    [ "${SLURM_RESTART_COUNT:-0}" -lt "$MOST_RESTARTS" ] ||
        end "$FAILED" "$1; not started again after $MOST_RESTARTS restarts"
    requeue "$1"
}

# Puts the job back into the queue, unless Slurm is already ending it: then scancel, a requeue or pre-emption did.
requeue() { # MESSAGE
    local state
    state=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
    [ "$state" = RUNNING ] || end "$STOPPED" "$1; Slurm ends the job ($state): cancelled, or requeued by somebody else"
    trap '' USR1 TERM # Slurm ends this process next
    say "$1; requeued, to go on from there"
    scontrol requeue "$SLURM_JOB_ID" || end "$STOPPED" "$1, and the job cannot be requeued: submit it again to go on"
    exit "$STOPPED"
}
