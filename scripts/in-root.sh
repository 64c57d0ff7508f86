#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs a command inside the Debian root of the lab.
#
#   scripts/in-root.sh ROOT [--bind SRC[:DST]]... [--chdir DIR] [--write] -- CMD [ARG]...
#
# CMD runs as root of ROOT, in mount and process namespaces of its own; without root, in a user namespace with
# the caller's sub-ids. It sees /proc, /sys, /dev, an empty /tmp, the machine's network configuration, and each
# SRC at DST (the same path when DST is not given), writable. Its environment is empty but for PATH, HOME, LANG,
# TERM and the proxy variables (`-- env NAME=VALUE CMD` adds more).
#
# ROOT itself stays as it is: what CMD writes outside the binds and ROOT's name goes to memory, and is gone when
# CMD ends. So any number of commands use one ROOT side by side. `--write` keeps the changes (root.sh alone).
#
# The exit status is that of CMD. To end it, kill this process with SIGKILL: the kernel takes everything inside
# along; SIGINT and SIGTERM are left to CMD.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/common.sh"

usage="usage: in-root.sh ROOT [--bind SRC[:DST]]... [--chdir DIR] [--write] -- CMD [ARG]..."

inside=no
if [ "${1:-}" = --inside ]; then
  inside=yes
  shift
fi
[ $# -ge 1 ] || die "$usage."
root=$1
shift
binds=()
chdir=/
write=no
arguments=("$@")
while [ $# -gt 0 ]; do
  case $1 in
    --bind)
      [ $# -ge 2 ] || die "$usage."
      binds+=("$2")
      shift 2
      ;;
    --chdir)
      [ $# -ge 2 ] || die "$usage."
      chdir=$2
      shift 2
      ;;
    --write)
      write=yes
      shift
      ;;
    --)
      shift
      break
      ;;
    *) die "in-root.sh does not know $1; $usage." ;;
  esac
done
[ $# -ge 1 ] || die "$usage."

if [ "$inside" = no ]; then
  [ -x "$root/usr/bin/env" ] || die "$root is no Debian root; run \`cargo lab prepare\` to make it."
  namespaces=(--mount --pid --fork --kill-child --propagation private)
  if [ "$(id -u)" != 0 ]; then
    need_namespaces
    namespaces+=(--map-root-user --map-auto)
  fi
  exec unshare "${namespaces[@]}" -- "$here/in-root.sh" --inside "$(cd "$root" && pwd)" "${arguments[@]}"
fi

# From here on: inside the namespaces; every mount below is ours and ends with us.
if [ "$write" = yes ]; then
  new=$root
  mount --rbind "$root" "$root"
else
  # /run of the root is empty, so it is a place for the memory of this one command.
  mount -t tmpfs -o mode=755 tmpfs "$root/run"
  mkdir "$root/run/upper" "$root/run/work" "$root/run/new"
  new=$root/run/new
  options=lowerdir=$root,upperdir=$root/run/upper,workdir=$root/run/work
  # Root of a user namespace may not set the attributes that overlays keep their notes in.
  read -r _ outside _ </proc/self/uid_map
  [ "$outside" = 0 ] || options+=,userxattr
  mount -t overlay -o "$options" overlay "$new" ||
    die "this kernel cannot put an overlay on $root; load its module (modprobe overlay), or use a Linux of 5.11 or later."
fi

# A container may forbid a fresh /proc; then the machine's own has to do.
mount -t proc proc "$new/proc" 2>/dev/null || mount --rbind /proc "$new/proc"
mount --rbind /sys "$new/sys"
mount --rbind /dev "$new/dev"
mount -t tmpfs -o mode=1777 tmpfs "$new/tmp"
for name in resolv.conf hosts; do
  if [ -e "/etc/$name" ]; then
    if [ "$write" = yes ]; then
      [ -e "$new/etc/$name" ] || : >"$new/etc/$name"
      mount --bind "/etc/$name" "$new/etc/$name"
    else
      rm -f "$new/etc/$name"
      cp -L "/etc/$name" "$new/etc/$name"
    fi
  fi
done
for bind in "${binds[@]}"; do
  source=${bind%%:*}
  target=$new${bind#*:}
  if [ -d "$source" ]; then
    mkdir -p "$target"
  elif [ -e "$source" ]; then
    mkdir -p "$(dirname "$target")"
    : >>"$target"
  else
    die "in-root.sh cannot bind $source: it does not exist."
  fi
  mount --rbind "$source" "$target"
done

keep=(TERM="${TERM:-dumb}")
for name in http_proxy https_proxy ftp_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
  [ -z "${!name:-}" ] || keep+=("$name=${!name}")
done
# The outer sh is the first process of the namespace: it waits for CMD and reaps what CMD leaves behind.
# shellcheck disable=SC2016
exec chroot "$new" /usr/bin/env -i "${keep[@]}" PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
  /bin/sh -c 'cd "$1" && shift && "$@"; exit $?' sh "$chdir" "$@"
