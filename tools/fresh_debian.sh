#!/usr/bin/env bash
# tools/fresh_debian.sh RELEASE USER [COMMAND]     run the README's first commands in a fresh Debian that has
#                                                  only what a newcomer has, and a clone of this checkout
#
#     tools/fresh_debian.sh bookworm root
#     tools/fresh_debian.sh trixie user "make install && .venv/bin/lvssl doctor"
#
# RELEASE  a release that debootstrap knows: bookworm (12, Python 3.11), trixie (13, Python 3.13)
# USER     root; or any other name: an ordinary user without sudo, created there
# COMMAND  run in the clone; default: make test && make demo
# ARCH     its architecture, default this machine's. Another one is emulated: ARCH=arm64 with Debian's
#          qemu-user-static, registered with the kernel, and `export QEMU_CPU=neoverse-n1` before COMMAND
# ROOM     folder of the systems and clones; default /var/tmp/fresh-debian. Its systems are reused, but the
#          clone is new each time (KEEP=1 keeps it, with its .venv). Delete ROOM by hand.
#
# Needs root and debootstrap. The system has git, make, python3-venv, ca-certificates and their dependencies.
# At run time it uses this machine's network settings: names, certificates, apt's sources of that release, if
# any, pip's settings, and the variables that name proxies or certificates.
set -euo pipefail
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
[ $# -ge 2 ] || die "usage: tools/fresh_debian.sh RELEASE USER [COMMAND]"
[ "$(id -u)" = 0 ] || die "needs root: it makes a system of its own and enters it"
command -v debootstrap >/dev/null || die "needs debootstrap: apt-get install debootstrap"

# Mounts are made in this script's own mount namespace, and end with it.
[ -n "${LVSSL_UNSHARED:-}" ] || LVSSL_UNSHARED=1 exec unshare --mount --propagation private "$0" "$@"

release=$1 user=$2 command=${3:-make test && make demo}
source=$(cd "$(dirname "$0")/.." && pwd)
room=${ROOM:-/var/tmp/fresh-debian}
system=$room/$release${ARCH:+-$ARCH}

if [ ! -d "$system" ]; then
    mkdir -p "$room"
    rm -rf "$system.part"
    # The mirror of this machine's own packages; without one, debootstrap's default.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 '/debian/$' || true)
    debootstrap ${ARCH:+--arch="$ARCH"} --variant=minbase --include=git,make,python3-venv,ca-certificates "$release" "$system.part" $mirror
    rm -rf "$system.part"/var/lib/apt/lists/*  # as in an image: only root could renew them
    mv "$system.part" "$system"
fi

# ---- This machine's network settings, mounted while the command runs

lend() {  # mount a file or folder of this machine at the same path, read-only
    if [ -d "$1" ]; then mkdir -p "$system$1"; else
        mkdir -p "$system$(dirname "$1")"
        [ -e "$system$1" ] || : >"$system$1"
    fi
    mount --bind "$1" "$system$1"
    mount -o remount,bind,ro "$system$1"
}

mount -t proc proc "$system/proc"
mount -t sysfs sys "$system/sys"  # where torch looks for the processor's kind on aarch64
mount --rbind /dev "$system/dev"
for path in /etc/resolv.conf /etc/hosts /etc/ssl/certs /usr/local/share/ca-certificates /etc/xdg/pip /etc/pip.conf; do
    [ ! -e "$path" ] || lend "$path"
done
for path in /etc/apt/apt.conf.d/*; do  # proxies and mirror settings, but not other packages' hooks
    if grep -qiE 'Acquire::' "$path" && ! grep -q 'DPkg::' "$path"; then cp "$path" "$system/etc/apt/apt.conf.d/"; fi
done
[ ! -d /etc/apt/auth.conf.d ] || cp -a /etc/apt/auth.conf.d/. "$system/etc/apt/auth.conf.d/"
# Folders on this disk in which pip looks for packages.
for path in $({ python3 -m pip config list 2>/dev/null; env | grep '^PIP_' || true; } |
    grep -oE "(find-links|FIND_LINKS|index-url|INDEX_URL)='?[^']*" | tr "'= " '\n\n\n' | sed 's,^file://,,' | grep '^/' | sort -u); do
    while [ "$(basename "$path")" = simple ] && [ -d "$(dirname "$path")/files" ]; do path=$(dirname "$path"); done
    [ ! -d "$path" ] || lend "$path"
done
environment=(HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8)
while IFS= read -r variable; do environment+=("$variable"); done < <(
    env | grep -iE '^(https?_proxy|no_proxy|all_proxy|PIP_[A-Z_]*|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE)=' || true)

# ---- The clone, and the command in it

[ "$user" = root ] || chroot "$system" id "$user" >/dev/null 2>&1 || chroot "$system" useradd -m -s /bin/bash "$user"
home=$(chroot "$system" getent passwd "$user" | cut -d: -f6)
environment+=("HOME=$home")
if [ -z "${KEEP:-}" ] || [ ! -d "$system$home/checkout" ]; then
    rm -rf "$system$home/checkout"
    git clone -q "$source" "$system$home/checkout"
fi
chroot "$system" chown -R "$user:" "$home/checkout"
run="cd ~/checkout && $command"
if [ "$user" = root ]; then
    env -i "${environment[@]}" chroot "$system" bash -c "$run"
else
    ids=$(chroot "$system" id -u "$user"):$(chroot "$system" id -g "$user")  # not this machine's user of that name
    env -i "${environment[@]}" chroot --userspec="$ids" --groups= "$system" bash -c "$run"
fi
