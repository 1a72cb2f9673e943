#!/usr/bin/env bash
# Proves blt-edge on a machine with an NVIDIA GPU, and leaves one JSON:
#
#   tools/gpu/check.sh [--wheels FOLDER] [--venv FOLDER] [options of python -m blt_edge.tools.gpu.check]
#
# Installs into a virtual environment of its own (.venv-gpu), from a folder of wheels where one is given, else
# from the package index. What can't be installed is left out, and what could not run for that is in the JSON.
set -euo pipefail
cd "$(dirname "$0")/../.."
wheels= venv=.venv-gpu rest=()
while [ $# -gt 0 ]; do
    case $1 in
        --wheels | --venv)
            [ $# -ge 2 ] || { echo "check.sh: $1 needs a folder" >&2; exit 2; }
            if [ "$1" = --wheels ]; then wheels=$2; else venv=$2; fi
            shift 2 ;;
        *) rest+=("$1"); shift ;;
    esac
done
source=()
if [ -n "$wheels" ]; then
    [ -d "$wheels" ] || { echo "check.sh: --wheels: $wheels is no folder; give one that holds .whl files" >&2; exit 2; }
    source=(--no-index --find-links "$wheels")
fi
# JetPack's TensorRT lies in the system's packages.
[ -x "$venv/bin/python" ] || python3 -m venv --system-site-packages "$venv"
pip=("$venv/bin/pip" install -q --disable-pip-version-check "${source[@]}")
# The package's own build needs setuptools, from the folder too.
"${pip[@]}" 'setuptools>=77' wheel
"${pip[@]}" --no-build-isolation -e '.[export]'
# cuda-bindings of a newer CUDA than the driver's finds no device.
cuda=$("$venv/bin/python" - 2>/dev/null <<'END' || true
import ctypes
version = ctypes.c_int()
ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
print(version.value // 1000 or "")
END
)
[ -z "$cuda" ] || echo "cuda-bindings<$((cuda + 1))" >"$venv/driver.txt"
[ -z "$cuda" ] || export PIP_CONSTRAINT=$(realpath "$venv/driver.txt")
# CUDA's and cuDNN's libraries come along where pip has them; else the system's are taken.
"${pip[@]}" 'onnxruntime-gpu[cuda,cudnn]' 2>/dev/null || true
for wanted in onnxruntime-gpu cuda-bindings '.[batch]' '.[tensorrt-rtx]' 'tensorrt>=10.3' '.[validate]'; do
    # In place: a wheel would have no gpu tools in it.
    editable=()
    [[ $wanted != .* ]] || editable=(-e)
    "${pip[@]}" --no-build-isolation "${editable[@]}" "$wanted" ||
        echo "check.sh: $wanted can't be installed: what needs it will be listed as not run" >&2
done
"$venv/bin/python" -c 'import onnxruntime' 2>/dev/null || "${pip[@]}" onnxruntime
exec "$venv/bin/python" -m blt_edge.tools.gpu.check "${rest[@]}"
