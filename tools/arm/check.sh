#!/usr/bin/env bash
# Proves blt-edge on an Arm or an old x86-64 processor that need not be here, and leaves one JSON:
#
#   tools/arm/check.sh [--processor NAME] [--cache FOLDER] [--json FILE] [options that --help lists]
#
# --processor: cortex-a76 (Raspberry Pi 5, Jetson Orin), cortex-a72 (Raspberry Pi 4), armv9 (SVE2 and i8mm), haswell
# (AVX2, no AVX-512), nehalem (no AVX): emulated on x86-64 Debian, from its packages and wheels alone; or native:
# this machine, the default on aarch64. Elsewhere the default is cortex-a76.
# What was fetched is kept in the cache folder (.arm-cache of this checkout) and used again. Exit code 77: can't be
# tried here.
set -euo pipefail
from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
processor=cortex-a76 cache=.arm-cache rest=()
[ "$(uname -m)" != aarch64 ] || processor=native

fail() { echo "check.sh: $1" >&2; exit "${2:-1}"; }
cant() { fail "$processor can't be tried here: $1" 77; }
# A path as it was typed, and text as one word of a shell.
typed() { case $1 in /*) printf '%s\n' "$1" ;; *) printf '%s\n' "$from/$1" ;; esac; }
quoted() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

while [ $# -gt 0 ]; do
    case $1 in
        --processor=* | --cache=* | --json=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --processor | --cache | --json)
            [ $# -ge 2 ] || fail "$1 needs a value" 2
            case $1 in
                --processor) processor=$2 ;;
                --cache) cache=$(typed "$2") ;;
                --json) rest+=("$1" "$(typed "$2")") ;;
            esac
            shift 2 ;;
        *) rest+=("$1"); shift ;;
    esac
done
# The release whose Python runs under emulation; the host's may be another.
suite=bookworm python=3.11

# qemu's model, without what its translator lacks and would warn of; and the architecture.
case $processor in
    cortex-a72 | cortex-a76) machine=aarch64 model=$processor ;;
    armv9) machine=aarch64 model=max,sme=off ;;
    haswell) machine=x86_64 model=Haswell-v4,-pcid,-x2apic,-tsc-deadline,-invpcid,-spec-ctrl ;;
    nehalem) machine=x86_64 model=Nehalem-v1 ;;
    native) machine=$(uname -m) model= ;;
    *) fail "--processor is '$processor'; allowed are cortex-a76, cortex-a72, armv9, haswell, nehalem, native" 2 ;;
esac
[ "$(uname -s)" = Linux ] || cant "that takes Linux"
[ -z "$model" ] || [ "$(uname -m)" = x86_64 ] || cant "that takes x86-64; --processor native tries this machine"
mkdir -p "$cache"
cache=$(realpath "$cache")
case $cache in *:*) fail "--cache: $cache has a colon, which no folder of Python modules may have; give another" 2 ;; esac
# One run for each processor, whose package and program are made anew; and one that fetches.
exec 8>"$cache/fetching.lock" 9>"$cache/$processor.lock"
flock -n 9 || fail "$processor is being tried with $cache by another run: wait for it, or give another --cache"
flock -n 8 || { echo "check.sh: another run is fetching, which this one waits for" >&2; flock 8; }

# 1. The host's own: makes the bundles, and compares.
if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c 'import blt_edge.export, onnxruntime' 2>/dev/null; then
    python3 -m venv "$cache/host"
    host=$cache/host/bin/python
    "$host" -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[cpu,export,serve]'
else
    host=$PWD/.venv/bin/python
fi
pip=("$host" -m pip -qq --disable-pip-version-check)
check=("$host" -m blt_edge.tools.arm.check --processor "$processor" "${rest[@]}")
"${check[@]}" # the options, before minutes of work
case " ${rest[*]} " in *" -h "* | *" --help "*) exit 0 ;; esac
if [ -n "$model" ] && ! command -v "qemu-$machine-static" >/dev/null; then
    command -v apt-get >/dev/null || cant "install Debian's qemu-user-static"
    { apt-get update -q && apt-get install -qy qemu-user-static; } >"$cache/apt.log" 2>&1 ||
        cant "apt-get install qemu-user-static failed, see $cache/apt.log; it needs root"
fi

# 2. A Python of that architecture: its packages are unpacked, and nothing of them is run but Python.
root=
if [ "$machine" = aarch64 ] && [ -n "$model" ]; then
    root=$cache/$suite-arm64
    if [ ! -e "$root/complete" ]; then
        command -v dpkg-deb >/dev/null || cant "dpkg-deb is missing; that takes a Debian"
        rm -rf "$root" "$cache/apt"
        mkdir -p "$root" "$cache/apt/lists/partial" "$cache/apt/archives/partial"
        mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$cache/apt/sources.list"
        options=(-q -oAPT::Architecture=arm64 -oAPT::Architectures=arm64 -oDir::State::status=/dev/null
            -oDir::State::Lists="$cache/apt/lists" -oDir::Etc::SourceList="$cache/apt/sources.list"
            -oDir::Etc::SourceParts=/dev/null -oDir::Cache="$cache/apt" -oAPT::Sandbox::User=root -oAcquire::Retries=3)
        apt-get "${options[@]}" update >"$cache/apt.log" 2>&1 || cant "apt-get update of $suite arm64 failed, see $cache/apt.log"
        packages=$(apt-get "${options[@]}" -s install --no-install-recommends "python$python" libstdc++6 libgomp1 \
            ca-certificates 2>>"$cache/apt.log" | awk '/^Inst/{print $2}') ||
            cant "there is no python$python in $suite arm64, see $cache/apt.log"
        # shellcheck disable=SC2086  # names, one word each
        (cd "$cache/apt/archives" && apt-get "${options[@]}" download $packages) >>"$cache/apt.log" 2>&1 ||
            cant "apt-get download failed, see $cache/apt.log"
        for package in "$cache"/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
        (cd "$cache/apt/archives" && sha256sum -- *.deb) >"$root/complete"
    fi
    executable=$root/usr/bin/python$python home=$root/usr
    [ -e "$executable" ] || fail "$root is not whole: remove it"
else
    executable=$("$host" -c 'import sys; print(sys._base_executable)')
    home=$("$host" -c 'import sys; print(sys.base_prefix)')
    python=$("$host" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    # numpy's pinned version asks for it.
    "$host" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || cant "this Python is $python, and the pinned wheels are for 3.11 and newer"
fi
files=$cache/$processor-files
if [ -n "$model" ]; then
    # ONNX Runtime and blt-edge read what the processor can do from here; the host's own would be a lie. Beside it
    # are the architecture's libraries, which processors share.
    mkdir -p "$files/proc" "$files/sys/devices/system/cpu"
    for folder in ${root:+bin etc lib sbin usr var}; do ln -sfn "$root/$folder" "$files/$folder"; done
    cores=$(nproc)
    for ((core = 0; core < cores; core++)); do
        printf 'processor\t: %s\n' "$core"
        cat "tools/arm/processors/$processor"
        echo
    done >"$files/proc/cpuinfo"
    for file in possible present online; do echo "0-$((cores - 1))" >"$files/sys/devices/system/cpu/$file"; done
fi

# 3. The project's wheel and what it needs, for that architecture, as pinned.
site=$cache/site-$machine-$python-$(cat tools/arm/requirements.txt pyproject.toml | sha256sum | cut -c1-12)
if [ ! -e "$site/complete" ]; then
    for old in "$cache/site-$machine-$python-"*; do
        [ ! -d "$old" ] || flock -n "$old" rm -rf "$old" || true # another run has it
    done
    rm -rf "$site"
    platforms=(--platform "manylinux_2_28_$machine" --platform "manylinux_2_27_$machine"
        --platform "manylinux_2_17_$machine" --platform "manylinux2014_$machine")
    "${pip[@]}" install --target "$site" --only-binary=:all: --no-deps --python-version "$python" --implementation cp \
        "${platforms[@]}" -r tools/arm/requirements.txt
    touch "$site/complete"
fi
exec 7<"$site"
flock -s 7
# From a copy: setuptools leaves a build folder, and takes what an earlier one left into the next wheel.
rm -rf "$cache/source" "$cache/wheel" "$cache/package-$processor"
mkdir "$cache/source"
mapfile -t parts < <(sed -n 's/^!//p' .dockerignore)
tar -c --exclude=__pycache__ --exclude='*.egg-info' "${parts[@]}" | tar -x -C "$cache/source"
"${pip[@]}" wheel --no-deps -w "$cache/wheel" "$cache/source"
"${pip[@]}" install --target "$cache/package-$processor" --no-deps "$cache"/wheel/blt_edge-*.whl

# 4. One program that is that Python: what starts it again, as blt-edge does, finds the same.
program=$cache/python-$processor
{
    echo '#!/bin/sh'
    echo "export PYTHONHOME=$(quoted "$home")"
    echo "export PYTHONPATH=$(quoted "$cache/package-$processor:$site")\"\${PYTHONPATH:+:\$PYTHONPATH}\""
    echo "export PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1"
    if [ -n "$model" ]; then
        echo "export QEMU_LD_PREFIX=$(quoted "$files")"
        # On an AMD host numpy's OpenBLAS takes that emulated processor for a Haswell, and ends at its first AVX.
        [ "$processor" != nehalem ] || echo "export OPENBLAS_CORETYPE=Nehalem"
        echo "exec qemu-$machine-static -cpu '$model' -0 \"\$0\" $(quoted "$executable") \"\$@\""
    else
        echo "exec $(quoted "$executable") \"\$@\""
    fi
} >"$program"
chmod +x "$program"
emulator=
[ -z "$model" ] || emulator="$("qemu-$machine-static" --version | head -1), -cpu $model"
exec 8>&-
exec "${check[@]}" --program "$program" --package "$cache/package-$processor" --emulator "$emulator"
