# shellcheck shell=bash
# What the job scripts share: the site's settings, modules, Python, container; and what comes after the step.
# Sourced, inside a job, by the scripts beside it.

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: not inside a SLURM job; submit this script with sbatch, or use: sltscale submit" >&2
    exit 2
fi
# An element of an array is requeued by this name; its plain job id may stand for the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-$SLURM_JOB_ID}
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE MASTER_PORT  # another launcher's, if anyone's

# A script that sltscale submit has rendered brings the site's settings with it.
if [ -z "${site_included:-}" ] && [ -f slurm/site.env ]; then
    set -a
    # shellcheck source=/dev/null
    . slurm/site.env
    set +a
fi
if [ -n "${MODULES:-}" ]; then
    # shellcheck source=/dev/null
    type module >/dev/null 2>&1 || . /etc/profile
    read -r -a modules <<<"$MODULES"
    module load "${modules[@]}"
fi
if [ -f "${VENV:-.venv}/bin/activate" ]; then
    # shellcheck source=/dev/null
    . "${VENV:-.venv}/bin/activate"
elif [ -n "${VENV:-}" ]; then
    echo "error: VENV $VENV of the site file holds no bin/activate; expected a Python environment with sltscale" >&2
    exit 2
fi
read -r -a container <<<"${CONTAINER:-}"
read -r -a step <<<"srun --kill-on-bad-exit=1 ${SRUN_OPTIONS:-}"
step+=("${container[@]}")
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun has stopped taking it over by itself
fi

if [ "${SLURM_RESTART_COUNT:-0}" -gt "${MAX_REQUEUES:-100}" ]; then
    echo "error: job $job was requeued more than ${MAX_REQUEUES:-100} times (--max-requeues); it ends here" >&2
    exit 1
fi

# finish CODE ARGUMENTS: end the job with the exit code of its step; before that, requeue a run that stopped or broke
# but can go on (ARGUMENTS are those of training). A cancelled job is not RUNNING any more and stays cancelled; and on a
# node that was cut off, this may be the script of an earlier start than the one that is running.
finish() {
    local code=$1
    shift
    echo "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)): the step ended with exit code $code"
    local state
    read -r -a state < <(squeue --noheader --jobs "$job" --Format State:20,RestartCnt:20)
    # SIGNALING: running, with the time limit's signal on its way
    if [ "$code" -ne 0 ] && [[ ${state[*]} =~ ^(RUNNING|SIGNALING)\ ${SLURM_RESTART_COUNT:-0}$ ]]; then
        if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_REQUEUES:-100}" ]; then
            echo "not requeued: it was ${SLURM_RESTART_COUNT:-0} times already (--max-requeues)"
        elif "${container[@]}" sltscale progress --exit-code "$code" "$@"; then
            scontrol requeue "$job"
        fi
    fi
    exit "$code"
}
