#!/usr/bin/env bash
# Installs blt-edge on a Jetson: a virtual environment that sees JetPack's TensorRT, and the packages in it.
# Changes nothing outside that environment, needs no root, and may be run again. Not run on a Jetson so far:
# written from NVIDIA's documentation and tested against a pretended one (BLT_EDGE_ROOT).
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: install.sh [--dry-run] [--venv DIR] [--wheels DIR] [--source DIR] [--offline]

  --dry-run      Print what would be done, and do nothing.
  --venv DIR     Where the environment goes (default: ~/blt-edge-venv).
  --wheels DIR   Look for wheels in DIR, too; blt-edge's own is taken from there when it is there.
  --source DIR   Install blt-edge from this checkout (default: the one this script lies in).
  --offline      Take nothing from the package index; needs --wheels.
TEXT
}

fail() {
    printf 'install.sh: error: %s\n' "$1" >&2
    exit "${2:-1}"
}

say() {
    printf '%s\n' "$*"
}

# For tests: the root of another file system, and the machine that it pretends to be.
ROOT=${BLT_EDGE_ROOT:-}
MACHINE=${BLT_EDGE_MACHINE:-$(uname -m)}

dry=no
offline=no
wheels=
venv=${HOME:-/root}/blt-edge-venv
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# 1. What was asked.

while (($#)); do
    case $1 in
        --dry-run) dry=yes ;;
        --offline) offline=yes ;;
        --venv | --wheels | --source)
            (($# > 1)) || fail "$1 needs a directory; see --help" 2
            case $1 in
                --venv) venv=$2 ;;
                --wheels) wheels=$2 ;;
                --source) source=$2 ;;
            esac
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) fail "there is no option $1; see --help" 2 ;;
    esac
    shift
done
[[ -z $wheels || -d $wheels ]] || fail "--wheels: $wheels is not a directory" 2
[[ -f $source/pyproject.toml ]] || fail "--source: $source is no checkout of blt-edge, it has no pyproject.toml" 2
[[ $offline == no || -n $wheels ]] || fail "--offline needs --wheels: a directory with the wheels to install" 2

# 2. What this machine is.

[[ $MACHINE == aarch64 ]] || fail "this is $MACHINE; Jetsons are aarch64. Elsewhere: pip install '.[cpu]'"
release=$ROOT/etc/nv_tegra_release
[[ -r $release ]] || fail "this is no Jetson: there is no /etc/nv_tegra_release. Elsewhere: pip install '.[cpu]'"
text=$(<"$release")
if [[ $text =~ R([0-9]+)\ \(release\),\ REVISION:\ ([0-9.]+) ]]; then
    major=${BASH_REMATCH[1]}
    revision=${BASH_REMATCH[2]}
else
    fail "/etc/nv_tegra_release is not understood; it begins with: ${text:0:60}"
fi
case $major in
    36)
        python=python3.10
        bindings='cuda-bindings>=12.6,<13'
        ;;
    38 | 39)
        python=python3.12
        bindings='cuda-bindings>=13.0,<14'
        ;;
    *) fail "Jetson Linux R$major.$revision is not known; JetPack 6 (R36) and JetPack 7 (R38, R39) are" ;;
esac
board=unknown
[[ ! -r $ROOT/proc/device-tree/model ]] || board=$(tr -d '\0' <"$ROOT/proc/device-tree/model")
say "board     $board"
say "system    Jetson Linux R$major.$revision, $python"

# 3. Doing it.

run() {
    say "+ $*"
    [[ $dry == yes ]] || "$@"
}

found_python() {
    [[ -n $ROOT ]] || command -v "$python" >/dev/null
}

package=$source
pip_options=()
[[ -z $wheels ]] || pip_options+=(--find-links "$wheels")
[[ $offline == no ]] || pip_options+=(--no-index)
if [[ -n $wheels ]] && compgen -G "$wheels/blt_edge-*.whl" >/dev/null; then
    package=blt-edge
fi

found_python || fail "there is no $python, for which JetPack's TensorRT is: sudo apt-get install $python $python-venv"
if [[ -z $ROOT ]] && ! "$python" -c 'import ensurepip' 2>/dev/null; then
    fail "$python makes no virtual environments: sudo apt-get install $python-venv"
fi

if [[ -x $venv/bin/python ]]; then
    if ! grep -qi '^include-system-site-packages *= *true' "$venv/pyvenv.cfg"; then
        fail "$venv was made without --system-site-packages and does not see TensorRT: remove it, or give another --venv"
    fi
    say "venv      $venv, which is there already"
else
    # JetPack's packages for Python are in the system's folder: tensorrt has no wheel for Jetsons elsewhere.
    run "$python" -m venv --system-site-packages "$venv"
fi

run "$venv/bin/python" -m pip install --upgrade "${pip_options[@]}" "${package}[cpu,export]" "$bindings"

# 4. What it can do now.

if [[ $dry == no ]] && ! said=$("$venv/bin/python" -c 'import tensorrt' 2>&1); then
    if [[ $said == *libnvdla_compiler* ]]; then
        say "TensorRT lacks the compiler for DLAs, which some systems leave out: sudo apt-get install nvidia-l4t-dla-compiler"
    else
        say "TensorRT is not there for $python. It is JetPack's: sudo apt-get install python3-libnvinfer"
    fi
    say "Without it, bundles run on the processor."
fi
run "$venv/bin/blt-edge" doctor
say "next: source $venv/bin/activate"
