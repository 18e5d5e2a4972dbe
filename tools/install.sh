#!/usr/bin/env bash
# tools/install.sh                    for `make install`: make .venv, install this package in it, and libturbojpeg.
#                                     Repeatable; takes seconds if there is nothing to do.
# tools/install.sh fashion-mnist      put the demo's data set from the distribution into data/, if available
# tools/install.sh turbojpeg          put libturbojpeg into .venv, if it isn't found
# tools/install.sh deb FOLDER NAME... download the first available of these Debian packages to FOLDER
#
# Root is only needed to install python3-venv, if it is missing, and the libraries that the extra ffcv compiles
# against: other Debian packages are downloaded and unpacked, not installed.
#
# PYTHON   interpreter for a new .venv; default: the .venv's own, or else the first python3 >= 3.10
# EXTRAS   extras of pyproject.toml, default dev
set -euo pipefail
cd "$(dirname "$0")/.."

ROOT=$PWD
LOG=.cache/install.log
STAMP=.venv/installed
extras=${EXTRAS:-dev}

say() { printf '%s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

logged() {  # run a command with its output in the log; on failure, show the log's tail
    "$@" >>"$LOG" 2>&1 </dev/null || { tail -n 25 "$LOG" >&2; return 1; }
}

as_root() {  # as root already, or by sudo, which may ask for a password only if somebody can type one
    if [ "$(id -u)" = 0 ]; then "$@"
    elif sudo -n true 2>/dev/null; then sudo -n "$@"
    elif [ -t 0 ] && [ -t 2 ] && command -v sudo >/dev/null; then sudo -v && sudo -n "$@"
    else return 1; fi
}

apt() {  # apt-get without questions, which waits until another apt-get has ended
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 "$@"
}

# ---- Python

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {  # prints nothing if there is none
    local candidate
    if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"; return; fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if fits "$candidate"; then echo "$candidate"; return; fi
    done
}

has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
has_headers() {
    "$1" -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))'
}

# ---- System packages: only those whose files are missing, whatever dpkg lists

wants_ffcv() { case ",$extras," in *,ffcv,*) true ;; *) false ;; esac; }

missing_packages() {  # for the interpreter $1, which may be empty
    local python=$1 version=3
    if [ -z "$python" ]; then
        echo python3 python3-venv
    else
        # Debian's packages for one version (python3.12-venv) also suit the default interpreter.
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        has_venv "$python" || echo "python$version-venv"
    fi
    wants_ffcv || return 0
    if [ -z "$python" ] || ! has_headers "$python"; then echo "python$version-dev"; fi
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
}

install_system() {
    local packages command
    packages=$(missing_packages "$(find_python)" | xargs)
    [ -n "$packages" ] || return 0
    command="apt-get update && apt-get install -y --no-install-recommends $packages"
    command -v apt-get >/dev/null ||
        die "missing: $packages (names as on Debian); install their like with this system's package manager, then repeat"
    say "system packages: $packages"
    as_root true || die "needs root, and sudo isn't to be had without a password; as root: $command"
    # An outdated or incomplete package list only matters if the installation then fails.
    logged apt update || true
    # shellcheck disable=SC2086
    logged apt install --no-install-recommends $packages || die "apt-get failed (see $LOG); as root: $command"
    packages=$(missing_packages "$(find_python)" | xargs)
    [ -z "$packages" ] || die "still missing after apt-get: $packages (see $LOG)"
}

# ---- Debian packages without root: downloaded and unpacked, so that the system doesn't change

try() { "$@" >>"$ROOT/$LOG" 2>&1 </dev/null; }

download_deb() {  # folder, names: download the first available of these packages
    local folder=$1 own=$ROOT/.cache/apt name
    shift
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
    mkdir -p "$folder" "$own/lists/partial" "$own/cache/archives/partial"
    local options=(-q -o Acquire::http::Timeout=20 -o "APT::Sandbox::User=$(id -un)")
    for name in "$@"; do (cd "$folder" && try apt-get "${options[@]}" download "$name") && return; done
    # The system's package lists are missing or outdated, and only root may renew them: use separate ones.
    options+=(-o "Dir::State::Lists=$own/lists" -o "Dir::Cache=$own/cache" -o Debug::NoLocking=1)
    try apt-get "${options[@]}" update || true
    for name in "$@"; do (cd "$folder" && try apt-get "${options[@]}" download "$name") && return; done
    return 1
}

unpacked() {  # folder, names: unpack the first available of these packages into the folder
    local folder=$1
    shift
    rm -rf "$folder" "$folder.deb"
    download_deb "$folder.deb" "$@" && mkdir -p "$folder" &&
        try dpkg-deb -x "$folder.deb"/*.deb "$folder" && rm -rf "$folder.deb"
}

turbojpeg() {  # put libturbojpeg into .venv, if it isn't found; without it Pillow decodes, more slowly
    local files=.cache/turbojpeg
    if .venv/bin/python -c 'from pipelines.formats import turbojpeg as t; raise SystemExit(t.FOUND is None)'; then return; fi
    # Debian's name, then Ubuntu's.
    if unpacked "$files" libturbojpeg0 libturbojpeg &&
        cp -L "$files"/usr/lib/*/libturbojpeg.so.0 .venv/lib/libturbojpeg.so.0.part &&
        try .venv/bin/python -c 'import ctypes; ctypes.CDLL(".venv/lib/libturbojpeg.so.0.part")'; then
        mv .venv/lib/libturbojpeg.so.0.part .venv/lib/libturbojpeg.so.0
        say "libturbojpeg: unpacked into .venv/lib"
    else
        say "libturbojpeg can't be had here (see $LOG): Pillow decodes JPEGs in its place, more slowly"
    fi
    rm -rf "$files"
}

fashion_mnist() {  # never fails: without it the demo tries torchvision's download
    local folder=usr/share/datasets/fashion-mnist files=.cache/fashion-mnist
    if [ -d "/$folder" ] || [ -d data/fashion-mnist ]; then return; fi
    mkdir -p .cache data
    say "Fashion-MNIST: 31 MB, the distribution's package, unpacked into data/"
    if unpacked "$files" dataset-fashion-mnist && [ -d "$files/$folder" ]; then
        mv "$files/$folder" data/fashion-mnist
    else
        say "it can't be had from here (see $LOG)"
    fi
    rm -rf "$files"
}

# ---- The virtual environment

venv_version() { .venv/bin/python -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

state() {  # describes what the environment was made from: any change requires another `pip install`
    echo "$(sha256sum <pyproject.toml | cut -c-16) python $(venv_version) at $PWD"
}

works() {  # whether all packages are present and FFCV's compiled part loads; imports nothing heavy
    .venv/bin/python - "$extras" <<'PY' 2>/dev/null
import ctypes, glob, importlib.metadata as metadata, sys
for name in ("lvssl", "torch", "torchvision", "numba", "tyro"):
    metadata.version(name)
if "ffcv" in sys.argv[1].split(","):
    metadata.version("ffcv")
    import sysconfig
    (library,) = glob.glob(sysconfig.get_path("platlib") + "/ffcv/_libffcv*.so")
    ctypes.CDLL(library)
PY
}

up_to_date() {
    local extra installed
    [ -f "$STAMP" ] && [ -x .venv/bin/lvssl ] || return 1
    [ "$(sed -n 1p "$STAMP")" = "$(state)" ] || return 1
    installed=",$(sed -n 2p "$STAMP"),"
    for extra in ${extras//,/ }; do
        case $installed in *",$extra,"*) ;; *) return 1 ;; esac
    done
    if [ -n "${PYTHON:-}" ]; then
        [ "$("$PYTHON" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')" = "$(venv_version)" ] || return 1
    fi
    works
}

make_venv() {
    local python
    python=$(find_python)
    if [ -n "$(venv_version || true)" ] && .venv/bin/python -m pip --version >/dev/null 2>&1; then
        # A working environment is kept, unless another interpreter was requested or the folder was moved.
        if { [ -z "${PYTHON:-}" ] || [ "$("$python" -V)" = "$(.venv/bin/python -V)" ]; } &&
            head -n 1 .venv/bin/pip | grep -qF "$PWD/.venv/"; then return; fi
    fi
    say "virtual environment: .venv, $("$python" -V)"
    logged "$python" -m venv --clear .venv || die "$python -m venv failed (see $LOG)"
}

install_packages() {
    rm -f "$STAMP"
    say "Python packages: pip install -e .[$extras] (the first time torch alone is 3 GB: minutes; log in $LOG)"
    # Old versions of pip build source packages without isolation, in the present environment.
    logged .venv/bin/python -m pip install "pip>=24" "setuptools>=77" wheel ||
        die "pip failed (see $LOG)"
    logged .venv/bin/python -m pip install -e ".[$extras]" || die "pip failed (see $LOG)"
    works || die "installed, but a piece doesn't load: .venv/bin/python -m lvssl.commands.doctor says which"
    printf '%s\n%s\n' "$(state)" "$extras" >"$STAMP.part"
    mv "$STAMP.part" "$STAMP"
}

install() {
    if [ -n "${PYTHON:-}" ]; then fits "$PYTHON" || die "PYTHON=$PYTHON is no Python >= 3.10"; fi
    mkdir -p .cache
    # Two concurrent makes share one environment: the second waits, and then finds nothing to do.
    exec 9>.cache/install.lock
    flock 9
    if up_to_date; then
        turbojpeg
        say ".venv is up to date"
        return
    fi
    : >"$LOG"
    if [ -f "$STAMP" ]; then  # extras requested earlier are kept
        extras=$({ echo "$extras"; sed -n 2p "$STAMP"; } | tr , '\n' | sort -u | paste -sd,)
    fi
    install_system
    make_venv
    install_packages
    turbojpeg
    say "installed in ${SECONDS} s"
}

case ${1:-install} in
    install) install ;;
    fashion-mnist) fashion_mnist ;;
    turbojpeg) mkdir -p .cache; turbojpeg ;;
    deb) shift; mkdir -p .cache; download_deb "$@" || die "none of these can be had: ${*:2} (see $LOG)" ;;
    *) die "usage: tools/install.sh [fashion-mnist | turbojpeg | deb FOLDER NAME...]" ;;
esac
