# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# What the set-up steps share: progress lines, errors of one sentence, checks before a step starts.
# Sourced by the scripts beside it, never run by itself.

# chroot and its like are not in the PATH of Debian's users.
PATH=$PATH:/usr/sbin:/sbin

# Prints a line of progress. The engine shows the last one with time and size.
say() { printf '%s\n' "$*"; }

# Ends the step. The text is one sentence that names the thing and the remedy.
die() {
  printf 'exitmeter: %s\n' "$*" >&2
  exit 1
}

# need_variables NAME...: a step is not called by hand without its environment.
need_variables() {
  local name
  for name; do
    [ -n "${!name:-}" ] || die "$0 wants $name in its environment; run \`cargo lab prepare\`, which sets it."
  done
}

# need_space FOLDER MIB: fails before the work when the disk cannot hold the result.
need_space() {
  local free
  free=$(df --output=avail -m "$1" | tail -n 1 | tr -d ' ')
  [ "$free" -ge "$2" ] ||
    die "$1 has $free MiB free and this step needs $2 MiB; free some, or point XDG_CACHE_HOME to a larger disk."
}

# need_command COMMAND PACKAGE
need_command() {
  command -v "$1" >/dev/null ||
    die "the command $1 is missing; run scripts/bootstrap.sh as root, or install the package $2."
}

# Fails unless this process may make mount namespaces with several users in them.
need_namespaces() {
  need_command unshare util-linux
  if [ "$(id -u)" = 0 ]; then
    unshare --mount --pid --fork true 2>/dev/null ||
      die "root may not make mount namespaces here; in a container, run it with the capability SYS_ADMIN (--privileged)."
    return
  fi
  need_command newuidmap uidmap
  if ! grep -q "^\($(id -un)\|$(id -u)\):" /etc/subuid 2>/dev/null; then
    die "$(id -un) is not root and has no sub-ids in /etc/subuid; run as root, or run once as root: usermod --add-subuids 200000-265535 --add-subgids 200000-265535 $(id -un)."
  fi
  unshare --map-root-user --map-auto --mount --pid --fork true 2>/dev/null ||
    die "this user may not make user namespaces; run as root, or allow them (sysctl kernel.unprivileged_userns_clone=1, and kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu)."
}

# as_root CMD...: runs CMD as root, or as root of a user namespace with all our sub-ids: what it takes
# to read, fill and remove folders that hold files of several users.
as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  else
    unshare --map-root-user --map-auto -- "$@"
  fi
}

# apt_config: the machine's own settings for downloads (proxies, time-outs), as lines of apt.conf.
# Nothing when the machine has no apt.
apt_config() {
  command -v apt-config >/dev/null || return 0
  apt-config dump 2>/dev/null |
    grep -iE '^Acquire::(https?|ftp|Retries|Queue-Mode|ForceIPv)[^ ]* "[^"]+";$' || true
}

# debian_mirror: the machine's own mirror of Debian. Nothing when it has none, which leaves mmdebstrap its default.
debian_mirror() {
  # shellcheck disable=SC2016
  apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
    sed -n 's/^Debian|Debian|\(https\?:.*\)$/\1/p' | head -n 1 || true
}

# fetch URI FILE SUM: FILE in the current folder is what URI gives, with this SHA-256. Inside a root only, where apt's
# settings hold. Several runs may want the same file at once: one fetches, the others wait and find it.
fetch() (
  exec 9>>.lock
  flock 9
  sum=${3#SHA256:}
  if ! echo "$sum  $2" | sha256sum --check --status 2>/dev/null; then
    /usr/lib/apt/apt-helper download-file "$1" "$2.part" "SHA256:$sum" && mv "$2.part" "$2"
  fi
)

# run LOG CMD...: runs CMD with its output in LOG; when it fails, shows the end of LOG and returns its status.
run() {
  local log=$1 status=0
  shift
  "$@" >>"$log" 2>&1 || status=$?
  if [ "$status" != 0 ]; then
    printf '%s\n' "--- the end of $log:" >&2
    tail -n 15 "$log" >&2
  fi
  return "$status"
}
