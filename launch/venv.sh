# shellcheck shell=bash
# The project's virtual environment, for quickstart.sh and tests/run.sh. Source it from the repository's root, then:
#     ensure_venv EXTRAS      # setup.cfg's extras, such as train or train,test
# It makes .venv (or $MUON_DIST_VENV), activates it and installs the project in it, editable, at constraints.txt's versions.

ensure_venv() {
    local extras=$1
    local venv=${MUON_DIST_VENV:-.venv}
    local stamp=$venv/.muon_dist-$extras
    # What decides an installation. While it is what it was last time, pip has nothing to do.
    local wanted
    wanted=$(pwd && cat pyproject.toml setup.cfg constraints.txt)

    if [[ ! -e $venv/bin/activate ]]; then
        python3 -m venv "$venv"
    fi
    # shellcheck source=/dev/null
    source "$venv/bin/activate"
    if [[ ! -e $stamp || $(<"$stamp") != "$wanted" ]]; then
        printf 'installing muon_dist[%s] in %s (this takes a minute or more)\n' "$extras" "$venv"
        python -m pip install --quiet --constraint constraints.txt --editable ".[$extras]"
        printf '%s\n' "$wanted" >"$stamp"
    fi
}
