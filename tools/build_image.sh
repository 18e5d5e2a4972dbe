#!/usr/bin/env bash
# tools/build_image.sh [COMMAND]     build Dockerfile's image without a registry: buildah builds it on a Debian
#                                    made by debootstrap; then COMMAND runs in a container of it
#
#     tools/build_image.sh
#     tools/build_image.sh convert-beton sklearn:digits /tmp/train.beton
#
# COMMAND  default: lvssl doctor
# ROOM     folder of images and containers (15 GB, 25 during the build); default /var/tmp/lvssl-images. Delete it by hand.
#
# Needs root, buildah and debootstrap. The build uses this machine's network settings (names, certificates,
# apt's and pip's settings), which aren't kept in the image.
set -euo pipefail
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || die "needs root: it makes a system of its own and enters it"
for tool in buildah debootstrap; do command -v $tool >/dev/null || die "needs $tool: apt-get install $tool"; done

source=$(cd "$(dirname "$0")/.." && pwd)
room=${ROOM:-/var/tmp/lvssl-images}
mkdir -p "$room"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TMPDIR=$room
buildah=(buildah --root "$room/storage" --runroot "$room/run")

if ! "${buildah[@]}" images debian-base >/dev/null 2>&1; then
    # The mirror of this machine's own packages; without one, debootstrap's default.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 '/debian/$' || true)
    # Includes ca-certificates, because this machine's are mounted in their place below, read-only.
    debootstrap --variant=minbase --include=ca-certificates bookworm "$scratch/base" $mirror
    rm -rf "$scratch/base"/var/lib/apt/lists/* "$scratch/base"/var/cache/apt/archives/*.deb
    base=$("${buildah[@]}" from scratch)
    "${buildah[@]}" add -q "$base" "$scratch/base" /
    "${buildah[@]}" commit -q --rm "$base" debian-base
    rm -rf "$scratch/base"
fi

# ---- This machine's network settings, mounted while a step runs

lent=()
lend() { [ ! -e "$1" ] || lent+=(--volume "$1:${2:-$1}:ro"); }
for path in /etc/ssl/certs /usr/local/share/ca-certificates; do lend "$path"; done
for path in /etc/apt/apt.conf.d/*; do  # proxies and mirror settings, but not other packages' hooks
    if grep -qiE 'Acquire::' "$path" && ! grep -q 'DPkg::' "$path"; then lend "$path"; fi
done
{ echo "[global]"; python3 -m pip config list | sed -nE "s/^(global|user|:env:)\.([a-z-]+)='(.*)'$/\2 = \3/p"; } |
    awk -F ' = ' '!seen[$1]++' >"$scratch/pip.conf"
lend "$scratch/pip.conf" /etc/pip.conf
for path in $(grep -E '^(constraint|find-links|index-url|extra-index-url) ' "$scratch/pip.conf" | tr ' ' '\n' |
    sed 's,^file://,,' | grep '^/' | sort -u); do  # on this disk; an index's files are next to it
    if [ "$(basename "$path")" = simple ]; then path=$(dirname "$path"); fi
    lend "$path"
done

"${buildah[@]}" build --isolation chroot --network host --layers=false "${lent[@]}" \
    --build-arg BASE=localhost/debian-base --tag lvssl "$source"
container=$("${buildah[@]}" from lvssl)
trap '"${buildah[@]}" rm "$container" >/dev/null; rm -rf "$scratch"' EXIT
[ $# -gt 0 ] || set -- lvssl doctor
"${buildah[@]}" run --isolation chroot "$container" -- "$@"
