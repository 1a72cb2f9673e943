#!/usr/bin/env bash
# Shows a Jetson's power mode and clocks; with --full, sets the mode without limits and fixes the clocks.
# Clocks stay fixed until the next start, the power mode for good. Not run on a Jetson so far.
set -euo pipefail

ROOT=${BLT_EDGE_ROOT:-}
conf=$ROOT/etc/nvpmodel.conf

fail() {
    printf 'power.sh: error: %s\n' "$1" >&2
    exit "${2:-1}"
}

full=no
dry=no
for option in "$@"; do
    case $option in
        --full) full=yes ;;
        --dry-run) dry=yes ;;
        -h | --help)
            printf 'Usage: power.sh [--full] [--dry-run]\n\n'
            printf '  --full     Set the power mode without limits and fix the clocks (needs sudo).\n'
            printf '  --dry-run  With --full: print the commands only.\n'
            exit 0
            ;;
        *) fail "there is no option $option; see --help" 2 ;;
    esac
done

[[ -r $ROOT/etc/nv_tegra_release ]] || fail "this is no Jetson: there is no /etc/nv_tegra_release"

# 1. What it is set to.

printf 'modes\n'
if [[ -r $conf ]]; then
    sed -n 's/^<[[:space:]]*POWER_MODEL[[:space:]]*ID=\([0-9]*\)[[:space:]]*NAME=\([^ >]*\).*/  \1 \2/p' "$conf"
else
    printf '  unknown: there is no /etc/nvpmodel.conf\n'
fi
[[ -n $ROOT ]] || nvpmodel -q || true
for device in "$ROOT"/sys/class/devfreq/*gpu* "$ROOT"/sys/class/devfreq/*b10b*; do
    [[ -r $device/min_freq ]] || continue
    printf 'GPU  %s to %s MHz\n' "$(($(<"$device/min_freq") / 1000000))" "$(($(<"$device/max_freq") / 1000000))"
done
for policy in "$ROOT"/sys/devices/system/cpu/cpufreq/policy*; do
    [[ -r $policy/scaling_min_freq ]] || continue
    printf 'CPU  %s to %s MHz\n' "$(($(<"$policy/scaling_min_freq") / 1000))" "$(($(<"$policy/scaling_max_freq") / 1000))"
done

# 2. Full speed.

[[ $full == yes ]] || exit 0
run() {
    printf '+ %s\n' "$*"
    [[ $dry == yes ]] || "$@"
}
mode=0
if [[ -r $conf ]]; then
    found=$(sed -n 's/^<[[:space:]]*POWER_MODEL[[:space:]]*ID=\([0-9]*\)[[:space:]]*NAME=MAXN.*/\1/p' "$conf")
    mode=${found%%$'\n'*}
    mode=${mode:-0}
fi
run sudo nvpmodel -m "$mode"
run sudo jetson_clocks
