#!/usr/bin/env bash
# Builds the image that the Dockerfile describes, from what git knows, and runs it as docs/serve.md says:
#
#   tools/image/check.sh [BUNDLE] [ARCHITECTURE]     (demo-bundle, and this machine's; amd64 or arm64)
#
# Read-only, without privileges and on one core, it has to answer as `generate` does, be healthy, and end at
# SIGTERM. Needs root, and podman, runc and mmdebstrap, which it installs on Debian and Ubuntu. Where no registry
# answers, the base image is made of Debian's packages under the same name; BASE is another's name. All is kept in
# a folder of its own, and removed. Where there are no means to build, it prints "image: not built: ..." and ends
# with 0. Another processor's image needs QEMU for it in /proc/sys/fs/binfmt_misc.
set -euo pipefail
cd "$(dirname "$0")/../.."
bundle=$(realpath "${1:-demo-bundle}")
here=$(dpkg --print-architecture 2>/dev/null || uname -m | sed 's/x86_64/amd64/; s/aarch64/arm64/')
architecture=${2:-$here}
base=${BASE:-$(sed -n 's/^ARG BASE=//p' Dockerfile)}
image=localhost/blt-edge
port=$(sed -n 's/^EXPOSE //p' Dockerfile)
prompt="Once upon a time" bytes=64

say() { echo "image: $*"; }
fail() { echo "check.sh: $*" >&2; exit 1; }
without() { say "not $1: $2"; exit 0; }

[ -f "$bundle/manifest.json" ] || { echo "check.sh: $bundle is no bundle; run make demo, or give one" >&2; exit 2; }

# 1. Means.

[ "$(id -u)" = 0 ] || without built "needs root"
needed=(podman runc mmdebstrap)
[ "$architecture" = "$here" ] || needed+=(arch-test) # mmdebstrap's, for other processors
missing=()
for program in "${needed[@]}"; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || without built "needs ${missing[*]}, and this is no Debian to install them on"
    { apt-get update -q && apt-get install -qy --no-install-recommends "${missing[@]}"; } >/dev/null ||
        without built "${missing[*]} can't be installed here"
fi

work=$(mktemp -d)
driver=vfs
mkdir "$work"/{lower,upper,scratch,seen}
if mount -t overlay -o "lowerdir=$work/lower,upperdir=$work/upper,workdir=$work/scratch" overlay "$work/seen" \
    2>/dev/null; then
    umount "$work/seen"
    driver=overlay
fi
pod() {
    podman --root "$work/storage" --runroot "$work/run" --storage-driver $driver --cgroup-manager cgroupfs \
        --runtime runc --log-level fatal "$@"
}
tidy() {
    pod rm -fa -t 0 >/dev/null 2>&1 || true
    pod rmi -fa >/dev/null 2>&1 || true
    umount "$work"/storage/* 2>/dev/null || true
    rm -rf --one-file-system "$work" # what may still be mounted in it is this machine's
}
trap tidy EXIT

# 2. The base image.

if ! pod pull -q --arch "$architecture" "$base" >/dev/null 2>&1; then
    say "$base can't be pulled; Debian's packages take its place"
    mmdebstrap --quiet --variant=minbase --architectures="$architecture" --include=python3,python3-venv \
        bookworm "$work/base.tar" http://deb.debian.org/debian || without built "no base image, and none can be made"
    pod import --arch "$architecture" "$work/base.tar" "$base" >/dev/null ||
        without built "podman can't keep an image here"
    rm "$work/base.tar"
fi

# 3. The build, as from a fresh clone.

context=.
if git rev-parse --git-dir >/dev/null 2>&1; then
    context=$work/context
    mkdir "$context"
    git ls-files -z --cached --others --exclude-standard |
        tar -c --null --verbatim-files-from --ignore-failed-read -T - | tar -x -C "$context"
fi
# The package index, and whose certificate is trusted, as on this machine.
own=()
for path in /etc/ssl/certs /etc/pip.conf; do
    [ ! -e $path ] || own+=(-v "$path:$path:ro")
done
options=(--arch "$architecture" --isolation chroot --format docker --layers --build-arg "BASE=$base" "${own[@]}")
index=()
[ -z "${PIP_INDEX_URL:-}" ] || { options+=(--build-arg PIP_INDEX_URL) && index=(-e PIP_INDEX_URL); }
pod build -q "${options[@]}" --target build -t localhost/build "$context" >/dev/null ||
    fail "the wheel can't be built or installed"
pod build -q "${options[@]}" -t $image "$context" >/dev/null || fail "the image can't be built"
of() { pod image inspect --format '{{.Size}}' "$1"; }
all=$(of $image)
say "built for $architecture: $((all / 1000000)) MB, $(((all - $(of "$base")) / 1000000)) MB of them over the base image"

# 4. The run. Limits under this machine's own need no privilege.

limits=(--ulimit nofile=1024:1024 --ulimit nproc=1024:1024 --cpus 1 --memory 1g)
safe=(--read-only --read-only-tmpfs=false --cap-drop all --security-opt no-new-privileges)
pod run --rm --network none "${limits[@]}" "$base" true 2>"$work/said" || without run "$(tail -n 1 "$work/said")"
pod run -d --name server --health-interval disable --network none "${limits[@]}" "${safe[@]}" \
    -v "$bundle:/bundle:ro" $image >/dev/null
inside() { pod exec -i server "$@"; }
for _ in {1..120}; do
    ! pod healthcheck run server >/dev/null 2>&1 || break
    [ "$(pod inspect --format '{{.State.Running}}' server)" = true ] || break
    sleep 0.5
done
pod healthcheck run server >/dev/null || { pod logs server; fail "the server is not healthy"; }
version=$(inside blt-edge --version)
inside python3 - <<'END' || fail "it has other rights or threads than it should"
import os
from blt_edge.runtime.processors import usable_cores

assert os.getuid() == os.getgid() == 10001 and os.getgroups() in ([], [10001]), (os.getuid(), os.getgroups())
assert "blt-edge serve" in open("/proc/1/cmdline").read().replace("\0", " "), "the server is not process 1"
assert usable_cores() == 1, usable_cores()
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
for folder in ("/", "/tmp", "/opt/blt-edge", "/bundle"):
    assert not os.access(folder, os.W_OK), folder
END
# Whoever listens on 127.0.0.1 alone does not answer at 127.0.0.2.
answer=$(inside python3 - "$port" "$prompt" $bytes <<'END'
import http.client, json, sys

port, prompt, count = sys.argv[1:]
server = http.client.HTTPConnection("127.0.0.2", int(port), timeout=120)
body = json.dumps({"prompt": prompt, "max_tokens": int(count), "temperature": 0})
server.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
print(json.load(server.getresponse())["choices"][0]["text"])
END
) || fail "it completes nothing"
wanted=$(inside blt-edge generate -m /bundle -p "$prompt" -n $bytes --temperature 0 -q </dev/null)
[ "$answer" = "$wanted" ] || fail "it answered '$answer', generate says '$wanted'"
began=$(date +%s)
pod stop -t 30 server >/dev/null
seconds=$(($(date +%s) - began))
code=$(pod inspect --format '{{.State.ExitCode}}' server)
[ "$code" = 0 ] && [ $seconds -lt 10 ] || fail "SIGTERM: ended after $seconds s with exit code $code"
say "$version ran as 10001 without writing, was healthy, answered as generate does, and ended $seconds s after SIGTERM"

# 5. The other processor's wheels, unless it was built for that.

[ "$architecture" = "$here" ] || exit 0
other=aarch64
[ "$here" != arm64 ] || other=x86_64
python=$(sed -n 's/^ARG BASE=.*python:\([0-9.]*\).*/\1/p' Dockerfile)
pod run --rm --network host "${limits[@]}" "${own[@]}" "${index[@]}" --entrypoint sh localhost/build -c "
    /build/bin/pip install -q --dry-run --target /tmp/none --python-version $python --only-binary :all: \
        --platform manylinux_2_28_$other --platform manylinux_2_17_$other \
        -c /source/constraints.txt \"\$(echo /wheels/*.whl)[cpu,serve]\"" || fail "not every package has a wheel for $other"
say "every package has a wheel for $other"
