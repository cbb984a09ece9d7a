# shellcheck shell=bash disable=SC2034
# Your site, in one place: edit this file once, in the copy that students clone, then run it.
#
#   bash experiments/site.sh             # writes account, partition and constraint into the four .slurm files
#   bash experiments/site.sh --check     # do these files agree with it? If not: their names, exit status 1
#
[[ $(<"${BASH_SOURCE[0]}") != *$'\r'* ]] || { echo "ERROR: Windows line ends; dos2unix site.sh"; exit 1; }  # \r
# The jobs source this file, before `set -euo pipefail`, under which conda and modules break. But sbatch reads only the
# #SBATCH lines of the .slurm file itself, and skips those with ##SBATCH; so they are written there. Options of sbatch
# and SBATCH_ variables still override them. CPUs, GPUs and time differ between the jobs: EDIT lines in each file.
#
# ---- EDIT: three sites ----------------------------------------------------------------------------------------------
#   V100s                                  the constraint as it is; PyTorch's CUDA 12.6 build (environment.yml)
#   A100s or H100s, no constraint needed   an empty constraint
#   CPUs only                              an empty constraint; ## in front of --gpus-per-node in each .slurm file
SITE_ACCOUNT=""                          # if your site asks for one
SITE_PARTITION=""                        # if the default one is not right (sinfo --summarize)
SITE_CONSTRAINT="v100"                   # your site's name for the GPU type (sinfo --format="%N %f %G")

# The environment. After scripts/setup_env.sh there is nothing to do: the repository's .venv, where there is one, comes
# first. Otherwise activate it here; a CUDA module is not needed.
# source "$HOME/miniforge3/bin/activate" bloom_hpo           # conda
# source "$HOME/venvs/bloom_hpo/bin/activate"                # another virtual environment
# CONTAINER="ch-run -b /home --set-env=PATH=/opt/hpo/bin:/usr/bin:/bin /home/you/bloom_hpo --"   # in a container
# NODE_ADDRESS=$(ip -4 -o addr show ib0 | awk '{ sub("/.*", "", $4); print $4 }')   # nodes reach each other at ib0 only
# ---- end of EDIT ----------------------------------------------------------------------------------------------------

site_lines() {                           # site_lines FILE: the lines of this site in it
    local option value
    for option in account partition constraint; do
        [[ $option != constraint || $1 != *head_node* ]] || continue   # the head trains nothing
        value=SITE_${option^^}
        if [[ -n ${!value} ]]; then echo "#SBATCH --$option=${!value}"; else echo "##SBATCH --$option=..."; fi
    done
}

site_files() {                           # site_files [--check]: writes these lines, or names the files that have others
    local here file text other=() status=0
    here=$(dirname "${BASH_SOURCE[0]}")
    for file in "$here"/raytune/scheduler/asha/*.slurm "$here"/manual/*.slurm; do
        text=$(site_lines "$file" | sed -E -e '/^##?SBATCH --(account|partition|constraint)=/d' \
            -e '/^#SBATCH --job-name=/r /dev/stdin' "$file")
        [[ $text != "$(<"$file")" ]] || continue
        if [[ ${1:-} == --check ]]; then
            other+=("${file##*/}") status=1
        else
            printf '%s\n' "$text" >"$file" || status=1
            printf '%s\n' "${file##*/}:" "$(site_lines "$file")"
        fi
    done
    [[ -z ${other[*]} ]] || echo "other #SBATCH lines than in site.sh: ${other[*]}; fix: bash experiments/site.sh"
    return "$status"
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || case ${1:-} in
    "" | --check) site_files "$@" ;;
    *) echo "usage: bash experiments/site.sh [--check]" >&2; exit 2 ;;
esac
