#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Builds exitmeter.ko in the current folder for one kernel. DKMS calls this as its build step.
#
#   dkms/build.sh RELEASE KDIR    (RELEASE as `uname -r` prints it; KDIR is /lib/modules/RELEASE/build; DKMS may add
#                                 LLVM=1, which goes to make)
#
# A module in Rust is built against the metadata of the kernel's own crates. If KDIR has the metadata (Ubuntu with
# linux-lib-rust-RELEASE, Arch), the module is built directly. Debian's headers leave it out. There the kernel's tree is
# prepared from the source package of the same version, which apt fetches unless linux-source-X.Y is installed. That needs
# the network, 2.5 GB of disk in this folder and some minutes. The tree is removed at the end.
#
# If the build fails, the last line gives the reason in one sentence that begins with "exitmeter: ", and the status is 1.
set -euo pipefail
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/common.sh
. "$source/scripts/common.sh"

[ $# -ge 2 ] || die "usage: build.sh RELEASE KDIR."
release=$1 kdir=$2
shift 2
config=$kdir/include/config/auto.conf
without="or do without exitmeter on this kernel"

# setting NAME: prints its value in the kernel's configuration, without quotes.
setting() { sed -n "s/^CONFIG_$1=\"\{0,1\}\([^\"]*\)\"\{0,1\}$/\1/p" "$config"; }

# find_tool TOOL TEXT: prints the command, TOOL or TOOL-1.85 and the like, whose --version is TEXT; TOOL itself if there is none.
find_tool() {
  local candidate
  for candidate in "$1" "$1-$(sed -n 's/^[a-z]* \([0-9]*\.[0-9]*\)\..*/\1/p' <<<"$2")" "/usr/bin/$1"; do
    if [ "$("$candidate" --version 2>/dev/null)" = "$2" ]; then
      echo "$candidate"
      return
    fi
  done
  echo "$1"
}

RUSTC=rustc BINDGEN=bindgen
if [ -s "$config" ]; then
  RUSTC=$(find_tool rustc "$(setting RUSTC_VERSION_TEXT)")
  BINDGEN=$(find_tool bindgen "$(setting BINDGEN_VERSION_TEXT)")
fi
export RUSTC BINDGEN
"$source/scripts/check-kdir.sh" --kernel "$kdir"

tools=(RUSTC="$RUSTC" BINDGEN="$BINDGEN")
compiler=$(setting CC_VERSION_TEXT)
compiler=${compiler%% *}
if [ -n "$(setting CC_IS_GCC)" ] && command -v "$compiler" >/dev/null; then
  tools+=(CC="$compiler" HOSTCC="$compiler")
fi
tools+=("$@")

tree=$PWD/linux
trap 'rm -rf "$tree" "$PWD/linux-source"' EXIT

# Fetches the kernel's source, in the version of the headers, and prepares a tree like that of the packaged kernel.
prepare_tree() {
  local headers version series archive
  headers=linux-headers-$release
  command -v dpkg-query >/dev/null ||
    die "$kdir has no Rust metadata (rust/libkernel.rmeta); install what has it, $without."
  version=$(dpkg-query --show --showformat '${Version}' "$headers" 2>/dev/null) ||
    die "$kdir has no Rust metadata, and is not of a package $headers whose source could be fetched; install that, $without."
  series=$(cut -d. -f1,2 <<<"$release")
  need_space "$PWD" 2500

  # An installed source of another version would give layouts that this kernel does not have.
  if [ "$(dpkg-query --show --showformat '${Version}' "linux-source-$series" 2>/dev/null)" = "$version" ]; then
    say "the source of $release is installed: linux-source-$series"
    archive=/usr/src/linux-source-$series.tar.xz
  else
    say "fetching linux-source-$series $version"
    mkdir -p linux-source
    (cd linux-source && apt-get download "linux-source-$series=$version" && dpkg-deb --extract linux-source-*.deb .) ||
      die "the headers of $release have no Rust metadata, and its source (linux-source-$series $version) could not be fetched to make it; check the network and the sources of apt and run dkms install exitmeter -k $release, $without."
    archive=$(find linux-source -name 'linux-source-*.tar.xz')
  fi

  say "preparing the tree of $release (some minutes)"
  mkdir -p "$tree"
  tar -xJf "$archive" -C "$tree" --strip-components=1 --exclude=Documentation/devicetree/bindings
  rm -rf linux-source
  cp "$kdir/.config" "$tree/.config"
  (
    cd "$tree"
    # LOCALVERSION is the part of the packaged kernel's release after its version.
    local_version=${release#"$(make -s kernelversion)"}
    make "${tools[@]}" LOCALVERSION="$local_version" olddefconfig
    make -j "$(nproc)" "${tools[@]}" LOCALVERSION="$local_version" modules_prepare
    made=$(make -s "${tools[@]}" LOCALVERSION="$local_version" kernelrelease)
    [ "$made" = "$release" ] || { echo "the tree calls itself $made" && exit 1; }
    test -s rust/libkernel.rmeta
    # modpost checks the module's symbols against this list of exported ones.
    cp "$kdir/Module.symvers" .
  ) || die "the tree of $release could not be prepared from its source; what went wrong is above; install what is missing, $without."
}

if [ ! -s "$kdir/rust/libkernel.rmeta" ]; then
  prepare_tree
  kdir=$tree
fi
# DKMS sometimes calls this from make, whose settings must not apply here.
unset MAKEFLAGS
make -j "$(nproc)" -C "$kdir" M="$PWD" "${tools[@]}" modules ||
  die "the module does not compile for $release; what the compilers say is above; see whether there is a newer exitmeter, $without."
[ "$(modinfo --field vermagic exitmeter.ko | cut -d ' ' -f 1)" = "$release" ] ||
  die "the module came out for another kernel than $release ($(modinfo --field vermagic exitmeter.ko)); report this, $without."
