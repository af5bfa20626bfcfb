#!/bin/sh
# Puts the daemon, snapctl and fsck.overlay on a host, or takes them off. `make install` and `make uninstall` call it.
#
#   PREFIX=/usr/local DESTDIR= deploy/install.sh install|uninstall
#
#   $PREFIX/lib/dedup-snapshotter/   the project and its Python packages, apart from the system's
#   $PREFIX/bin/                     launchers
#   $PREFIX/share/                   completions
#   systemd's directories            unit, tmpfiles, drop-in for containerd
#   /etc/dedup-snapshotter/          the configuration: installed once, never overwritten or removed

set -eu
cd "$(dirname "$0")/.."
umask 022
PREFIX=${PREFIX:-/usr/local}
DESTDIR=${DESTDIR:-}
python=/usr/bin/python3

library=$PREFIX/lib/dedup-snapshotter
bash_completion=$PREFIX/share/bash-completion/completions/snapctl
zsh_completion=$PREFIX/share/zsh/site-functions/_snapctl
# systemd looks below /usr/local and /usr (systemd.unit(5)), but below no other prefix.
case $PREFIX in
    /usr/local | /usr) units=$PREFIX/lib/systemd/system tmpfiles=$PREFIX/lib/tmpfiles.d ;;
    *) units=/etc/systemd/system tmpfiles=/etc/tmpfiles.d ;;
esac
unit=$units/dedup-snapshotter.service
drop_in=$units/containerd.service.d/10-dedup-snapshotter.conf
tmpfile=$tmpfiles/dedup-snapshotter.conf
config=/etc/dedup-snapshotter/config.toml

die() {
    echo "$action: $*" >&2
    exit 1
}

check() {
    case $PREFIX in
        /*[!A-Za-z0-9_./-]* | [!/]*) die "PREFIX must be an absolute path of plain characters, not '$PREFIX'" ;;
    esac
    [ -n "$DESTDIR" ] || [ "$(id -u)" = 0 ] || die "must be root to change $PREFIX and /etc: use sudo"
}

on_running_systemd() { [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; }

do_install() {
    install_library
    launcher containerd-dedup-grpc snapshotter.server
    launcher snapctl snapshotter.cli
    launcher fsck.overlay snapshotter.fsck_overlay.command
    file deploy/systemd/dedup-snapshotter.service "$unit"
    file deploy/systemd/containerd.service.d/10-dedup-snapshotter.conf "$drop_in"
    file deploy/systemd/dedup-snapshotter.conf "$tmpfile"
    [ -e "$DESTDIR$config" ] || file deploy/config.toml "$config"
    completion bash "$bash_completion"
    completion zsh "$zsh_completion"
    if on_running_systemd; then
        systemctl daemon-reload
    fi
    if [ -z "$DESTDIR" ]; then
        say_what_is_next
    fi
}

# A new directory takes the place of the old one at once: a running daemon may still import from it.
install_library() {
    new=$DESTDIR$library.new
    rm -rf "$new" "$DESTDIR$library.old"
    mkdir -p "$DESTDIR$PREFIX/lib"
    PIP_RETRIES=${PIP_RETRIES:-2} .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --no-input --no-compile --target "$new" . >.cache/install.log 2>&1 </dev/null ||
        die "pip cannot install the project (no network?); what it wrote is in .cache/install.log"
    rm -rf "${new:?}/bin" "$new"/*.dist-info/direct_url.json
    # Bytecode names the place where the files will be.
    "$python" -m compileall -q -s "$new" -p "$library" "$new"
    if [ -e "$DESTDIR$library" ]; then
        mv "$DESTDIR$library" "$DESTDIR$library.old"
    fi
    mv "$new" "$DESTDIR$library"
    rm -rf "$DESTDIR$library.old"
}

# -I and -S keep out PYTHONPATH, the user's packages and the system's; compiled packages fit one Python only.
launcher() {
    version=$("$python" -c 'import sys; print("%d, %d" % sys.version_info[:2])')
    write "$PREFIX/bin/$1" 755 <<END
#!/usr/bin/python3 -IS
import sys

if sys.version_info[:2] != ($version):
    sys.exit("$1: was installed for another Python than %d.%d; install it again" % sys.version_info[:2])
sys.path.insert(0, "$library")

from $2 import main

sys.exit(main())
END
}

file() { sed "s|@PREFIX@|$PREFIX|g" "$1" | write "$2" 644; }

completion() {
    program='import sys; sys.path.insert(0, sys.argv.pop(1)); from snapshotter.cli import main; sys.exit(main())'
    script=$("$python" -ISBc "$program" "$DESTDIR$library" completion "$1")
    printf '%s\n' "$script" | write "$2" 644
}

write() {
    mkdir -p "$DESTDIR$(dirname "$1")"
    cat >"$DESTDIR$1.new"
    chmod "$2" "$DESTDIR$1.new"
    mv "$DESTDIR$1.new" "$DESTDIR$1"
}

say_what_is_next() {
    cat <<END
Installed in $PREFIX; nothing was started. What is next:
  1. look at $config
  2. systemctl enable --now dedup-snapshotter
  3. tell containerd of it (README.md, "Tell containerd"), and restart containerd
END
}

do_uninstall() {
    if on_running_systemd; then
        if systemctl --quiet is-active dedup-snapshotter.service; then
            die "the daemon is running; stop it first: systemctl disable --now dedup-snapshotter"
        fi
        systemctl --quiet disable dedup-snapshotter.service 2>/dev/null || true
    fi
    for name in "$PREFIX/bin/containerd-dedup-grpc" "$PREFIX/bin/snapctl" "$PREFIX/bin/fsck.overlay" \
        "$unit" "$drop_in" "$tmpfile" "$bash_completion" "$zsh_completion"; do
        rm -f "$DESTDIR$name"
    done
    rm -rf "$DESTDIR$library" "$DESTDIR$library.new" "$DESTDIR$library.old"
    rmdir "$DESTDIR$(dirname "$drop_in")" 2>/dev/null || true
    if on_running_systemd; then
        systemctl daemon-reload
    fi
    if [ -z "$DESTDIR" ]; then
        echo "Uninstalled. $config and the snapshots are left."
    fi
}

action=${1-}
case $action in
    install | uninstall) check && "do_$action" ;;
    *) echo "usage: deploy/install.sh install|uninstall" >&2 && exit 2 ;;
esac
