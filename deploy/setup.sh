#!/bin/sh
# Makes a checkout ready: the Debian packages that are missing, and .venv with the project in it.
# Does nothing, in a few milliseconds, when that is done. Nothing that it installs is started or enabled.
#
#   deploy/setup.sh install    Python only: what `make install` needs
#   deploy/setup.sh demo       and containerd
#   deploy/setup.sh test       and Go, linters and tools for the tests
#   deploy/setup.sh bench      and what bench/ measures against
#   deploy/setup.sh xfstests   and what xfstests runs
#
#   .venv/.setup          where and for what .venv was made, written last; without it .venv is made anew
#   .cache/setup.log      the output of the last apt and pip
#   .cache/setup.apt      the packages of an installation that has not ended
#   .cache/setup.absent   packages that this release does not have

set -u
cd "$(dirname "$0")/.." || exit 1
PATH=$PATH:/usr/sbin:/sbin
unset PYTHONPATH PYTHONHOME

python=/usr/bin/python3
log=.cache/setup.log
policy=/usr/sbin/policy-rc.d
policy_line='# dedup-snapshotter set-up: no service is started while its packages are installed'
policy_made=

say() { echo "setup: $*"; }

die() {
    echo "setup: $*" >&2
    exit 1
}

die_with_log() {
    echo "setup: $*; the end of $log:" >&2
    tail -n 20 "$log" | sed 's/^/    /' >&2
    exit 1
}

# The first line of the log that says that a server could not be reached; nothing if none does.
network_trouble() {
    grep -oE "Temporary failure resolving '[^']*'|Could not (resolve|connect to) [^ ]*|\
Unable to connect to [^ ]*|Connection (failed|timed out|refused)|Network is unreachable|\
Cannot connect to proxy|Name or service not known|Temporary failure in name resolution|\
Read timed out" "$log" | head -n 1
}

main() {
    case ${1-} in
        install | demo) profile=$1 scope=run ;;
        test | bench | xfstests) profile=$1 scope=dev ;;
        *) die "usage: deploy/setup.sh install|demo|test|bench|xfstests" ;;
    esac
    is_ready && return
    mkdir -p .cache || exit 1
    exec 9>.cache/setup.lock
    flock 9
    trap clean_up EXIT
    trap 'exit 130' INT TERM HUP
    is_ready && return
    : >"$log"
    missing=$(missing_packages)
    if [ -n "$missing" ] || [ -e .cache/setup.apt ]; then
        install_packages
    fi
    is_installed || install_project
}

is_ready() {
    [ ! -e .cache/setup.apt ] && [ -z "$(missing_packages)" ] && is_installed
}

# -- packages

# Programs are looked for, not packages: a containerd from elsewhere is left alone.
missing_packages() {
    for_program python3 python3
    [ -x .venv/bin/python ] || "$python" -c 'import ensurepip' 2>/dev/null || want python3-venv
    if [ "$profile" != install ]; then
        for_program containerd containerd
        for_program ctr containerd
        for_program runc runc
        for_program nsenter util-linux
        for_program mount mount
    fi
    if [ "$scope" = dev ]; then
        for_program go golang-go
        [ -d /usr/share/gocode/src/github.com/containerd/containerd ] ||
            want golang-github-containerd-containerd-dev
        for_program getfattr attr
        for_program setfacl acl
        for_program systemd-analyze systemd
        for_program mkfs.ext4 e2fsprogs
        for_program mkfs.xfs xfsprogs
        for_program mkfs.btrfs btrfs-progs
        for_program strace strace
    fi
    if [ "$profile" = xfstests ]; then
        for_program bc bc
        for_program gawk gawk
        for_program killall psmisc
        for_program perl perl
        for_program quota quota
        for_program uuidgen uuid-runtime
        for_program fsverity fsverity
    fi
    if [ "$profile" = bench ]; then
        for_program ostree ostree
        for_program hardlink util-linux
        for_program jdupes jdupes
        for_program b3sum b3sum
        for_program eatmydata eatmydata
    fi
}

for_program() { command -v "$1" >/dev/null || want "$2"; }

want() { grep -qsx "$1" .cache/setup.absent || echo "$1"; }

install_packages() {
    if [ -e .cache/setup.apt ]; then
        say "an earlier installation was interrupted"
        missing=$(printf '%s\n' "$missing" | sort -u - .cache/setup.apt | grep .)
    fi
    names=$(echo "$missing" | sort -u | paste -sd' ' | sed 's/ /, /g')
    [ "$(id -u)" = 0 ] || die "must be root to install $names: use sudo"
    command -v apt-get >/dev/null || die "no apt-get here; install these yourself: $names"
    say "installing $names (apt)"
    deny_services
    [ ! -e .cache/setup.apt ] || DEBIAN_FRONTEND=noninteractive dpkg --configure -a >>"$log" 2>&1 </dev/null
    echo "$missing" | sort -u >.cache/setup.apt
    apt_get update  # judged by what follows: some source that nobody needs here may be broken
    update_trouble=$(network_trouble)
    drop_absent_packages
    : >"$log"
    # shellcheck disable=SC2046  # one word each
    apt_get install --no-install-recommends $(cat .cache/setup.apt) || die_of_apt
    if grep -qx containerd .cache/setup.apt; then
        disable_containerd
    fi
    rm .cache/setup.apt
}

apt_get() {
    DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 LC_ALL=C apt-get --yes --quiet \
        -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=300 \
        "$@" >>"$log" 2>&1 </dev/null 9>&-
}

# The conformance suite's sources are not in every release; the other tests do without.
drop_absent_packages() {
    [ -z "$update_trouble" ] || return 0
    for name in golang-go golang-github-containerd-containerd-dev; do
        if grep -qx "$name" .cache/setup.apt && [ -z "$(apt-cache --quiet=2 madison "$name")" ]; then
            say "this release has no $name: the conformance suite cannot run"
            echo "$name" >>.cache/setup.absent
            sed -i "/^$name\$/d" .cache/setup.apt
        fi
    done
}

die_of_apt() {
    # What came to nothing is no half installation, to be finished and disabled by the next run.
    command -v containerd >/dev/null || rm .cache/setup.apt
    trouble=$(network_trouble)
    absent=$(grep -oE 'Unable to locate package .*|Package .* has no installation candidate' "$log" | head -n 1)
    [ -z "$absent" ] || trouble=${trouble:-$update_trouble}
    [ -z "$trouble" ] || die "no network: apt cannot reach its servers ($trouble); see $log"
    [ -z "$absent" ] || die "this release lacks a package: $absent"
    die_with_log "apt failed"
}

# A package starts its service unless policy-rc.d forbids it (Debian's invoke-rc.d(8)).
deny_services() {
    if [ ! -e "$policy" ] || grep -qF "$policy_line" "$policy"; then
        policy_made=yes
        printf '#!/bin/sh\n%s\nexit 101\n' "$policy_line" >"$policy"
        chmod 755 "$policy"
    fi
}

disable_containerd() {
    if [ -d /run/systemd/system ]; then
        systemctl --quiet disable --now containerd.service >>"$log" 2>&1
    elif command -v systemctl >/dev/null; then
        systemctl --quiet disable containerd.service >>"$log" 2>&1
    else
        rm -f /etc/systemd/system/multi-user.target.wants/containerd.service
    fi
    say "containerd is installed, and neither started nor enabled"
}

clean_up() {
    [ -z "$policy_made" ] || rm -f "$policy"
}

# -- .venv

is_installed() {
    is_this_venv && grep -qsx -e "$scope $(source_digest)" -e "dev $(source_digest)" .venv/.setup || return
    for proto in proto/snapshotter/api/*.proto; do
        [ -e "snapshotter/api/$(basename "$proto" .proto)_pb2.py" ] || return
    done
}

# Made here (its scripts name their place) and by the present Python.
is_this_venv() { grep -qsFx "venv $(pwd -P) $("$python" --version)" .venv/.setup; }

# Of what pip has to see again when it changes.
source_digest() {
    cat pyproject.toml snapshotter/__init__.py proto/generate.py proto/snapshotter/api/*.proto |
        sha256sum | cut -d' ' -f1
}

install_project() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "needs Python 3.11 or newer; $python is $("$python" --version)"
    : >"$log"
    if ! is_this_venv; then
        say "making .venv ($("$python" --version))"
        "$python" -m venv --clear .venv >>"$log" 2>&1 || die_with_log "making .venv failed"
    fi
    extra=
    [ "$scope" = run ] || extra='[dev]'
    say "installing the project and its Python packages (pip)"
    # Not there while pip works: what an interruption leaves is not to be trusted.
    rm -f .venv/.setup
    if ! pip_install --editable ".$extra"; then
        write_stamp incomplete
        trouble=$(network_trouble)
        [ -z "$trouble" ] || die "no network: pip cannot reach the package index ($trouble); see $log"
        die_with_log "pip failed"
    fi
    write_stamp "$scope $(source_digest)"
}

write_stamp() {
    printf '%s\n' "venv $(pwd -P) $("$python" --version)" "$1" >.venv/.setup
}

pip_install() {
    # Variables, not options: pip calls itself to build, and passes only these on.
    PIP_RETRIES=${PIP_RETRIES:-2} PIP_DEFAULT_TIMEOUT=${PIP_DEFAULT_TIMEOUT:-20} \
        .venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check "$@" \
        >>"$log" 2>&1 </dev/null 9>&-
}

main "$@"
