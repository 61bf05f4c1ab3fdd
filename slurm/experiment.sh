#!/usr/bin/env bash
# Works on an experiment. Every task of an array runs the same command; they share the stages among themselves:
#
#   sbatch --array=0-7 slurm/experiment.sh NAME [--out FOLDER] [--jobs N] [--seeds N,N] [--arms ARM,ARM] [key=value]...
#
# on one node each, all with the same --out, on a file system that every node sees. Flags of sbatch override the lines
# below, and so do its SBATCH_* variables; slurm/README.md has the other variables.
#SBATCH --job-name=experiment
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300

NEMO_RMT_HOME=${NEMO_RMT_HOME:-${SLURM_SUBMIT_DIR:-.}} # Slurm runs a copy of this file, which is elsewhere
if [ ! -r "$NEMO_RMT_HOME/slurm/launch.sh" ]; then
    echo "nemo-rmt: error: no slurm/launch.sh in $NEMO_RMT_HOME: submit from nemo_rmt's folder, or set NEMO_RMT_HOME" >&2
    exit 2
fi
# shellcheck source-path=SCRIPTDIR source=launch.sh
source "$NEMO_RMT_HOME/slurm/launch.sh"

work() { # NAME [WORD]...
    [ -n "${SLURM_JOB_ID:-}" ] || refuse "this is a batch script: start it with sbatch"
    [ $# -gt 0 ] || refuse "name an experiment: sbatch --array=0-7 slurm/experiment.sh NAME"
    trap 'request_stop USR1' USR1
    trap 'request_stop TERM' TERM
    log_start=$(stat -Lc %s "/proc/$$/fd/2")
    find_program
    set_communication
    # of sites that start jobs without the submitter's environment: steps have the job's
    export SLURM_EXPORT_ENV=ALL
    # --gpus-per-node=0 says that GPUs come otherwise (--gres) or not at all; a step would take it for no GPU
    [ "${SLURM_GPUS_PER_NODE:-}" != 0 ] || unset SLURM_GPUS_PER_NODE
    say "start $((${SLURM_RESTART_COUNT:-0} + 1)): experiment $1, on $SLURM_JOB_NODELIST, $(date --iso-8601=seconds)"
    srun --nodes=1 --ntasks=1 --cpu-bind=none ${container[@]+"${container[@]}"} nemo-rmt experiment "$@" &
    await_step "the experiment"
    end "$FINISHED" "done"
}

work "$@"
