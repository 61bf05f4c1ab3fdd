#!/usr/bin/env bash
# Reinforcement mid-training (RMT) of one iteration.
#
#   sbatch slurm/rmt_14b.sh [key=value | --yaml FILE]...
#
# Flags of sbatch override the lines below, and so do its SBATCH_* variables; slurm/README.md has the other variables.
#SBATCH --job-name=rmt_14b
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
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

launch rmt -- "$@"
