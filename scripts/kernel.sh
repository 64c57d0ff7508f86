#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Set-up step "kernel": one packaged, unmodified Debian kernel in OUT, taken apart for the lab.
#
# Needs: OUT EXITMETER_CACHE ROOT, and KERNEL: "newest" (of backports), a version ("7.2.12"), a series ("6.12", "6.1": the
# newest of it) or a whole release ("7.2.12+deb13-amd64", "7.3.4+deb13-cloud-amd64"). What Debian 13 does not have is
# looked for in Debian 12. Gives in OUT:
#   release            the kernel's name for itself (uname -r)
#   vmlinuz            as packaged; what the emulated hosts boot
#   vmlinux            the same kernel unpacked, an ELF with a PVH entry; what the guests boot
#   modules/           lib/modules/<release> with the modules that the lab can use, decompressed, and modules.dep
#   config             its configuration, which tells whether it is built with Rust
#   Module.symvers     the symbols that it exports; with config and source.tar.xz, what tree.sh prepares the tree from
#   source.tar.xz      only of a kernel with Rust: no module of ours loads into another
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/common.sh"

# What the hosts load: KVM and what it needs; and the guests: the driver of /dev/cpu/*/cpuid. All modules of a kernel
# are 500 MB and 40 s of unpacking.
wanted_modules='arch/x86/kvm virt drivers/crypto/ccp arch/x86/kernel'

need_variables OUT EXITMETER_CACHE ROOT KERNEL
mkdir -p "$OUT" "$EXITMETER_CACHE/downloads/kernel"
need_space "$OUT" 700
log=$OUT/kernel.log
: >"$log"

inside() {
  "$here/in-root.sh" "$ROOT" --bind "$OUT:/out" --bind "$EXITMETER_CACHE/downloads/kernel:/downloads" \
    --bind "$here:/scripts" --chdir /out -- env KERNEL="$KERNEL" WANTED="$wanted_modules" "$@"
}

# The image is one package or, since 7.2, a binary and its modules. The source has to be of the very same version:
# a tree of another one would give layouts that this kernel does not have.
say "which kernel"
rm -f "$OUT/offline"
# shellcheck disable=SC2016
run "$log" inside bash -euc '
  update() { apt-get -o APT::Update::Error-Mode=any "$@" update || touch offline; }
  # The root may be older than the newest kernel; its lists are fetched anew after an hour. Without a network, what is
  # fetched already may do, but that a kernel is not in the old lists means little. By itself apt counts old lists as a
  # success.
  [ -n "$(find /var/lib/apt/lists/partial -newermt "-1 hour")" ] || update

  # Lines of a version and a release, of the kernels whose release begins so. The version is that of the package, as
  # Debian 12 has 6.1.176 as 6.1.0-50-amd64. Headers are asked for: backports lists images of kernels that it has no
  # more.
  kernels() {
    apt-cache pkgnames "linux-headers-$1" |
      sed -n "/^linux-headers-[0-9.]*\(+[a-z0-9]*\|-[0-9]*\)-amd64$/p" | xargs -r apt-cache show |
      awk "/^Package: linux-headers-/ { release = substr(\$2, 15) }
        /^Version: / { version = \$2; sub(/-.*/, \"\", version); print version, release }" | sort -uV
  }
  find_release() {
    case $KERNEL in
      newest)
        image=$(apt-cache madison linux-image-amd64 | cut -d"|" -f2 | tr -d " " | sort -V | tail -n 1)
        release=$(apt-cache show "linux-image-amd64=$image" | sed -n "s/^Depends:.*linux-image-\([^ ,]*\).*/\1/p")
        ;;
      *-amd64) release=$KERNEL ;;
      *)
        release=$(kernels "$(echo "$KERNEL" | cut -d. -f1,2)" |
          awk -v wanted="$KERNEL" "\$1 == wanted || index(\$1, wanted \".\") == 1 { print \$2 }" | tail -n 1)
        ;;
    esac
    [ -n "$release" ] || return
    version=$(apt-cache show "linux-headers-$release" | sed -n "s/^Version: //p" | head -n 1)
    [ -n "$version" ]
  }
  if ! find_release && [ "$KERNEL" != newest ]; then
    # This line and what it brings are gone when this command ends.
    older=/etc/apt/sources.list.d/older.list
    grep -m 1 "^deb .* trixie main" /etc/apt/sources.list | sed "s/ trixie / bookworm /" >"$older"
    update -o Dir::Etc::SourceList="$older" -o Dir::Etc::SourceParts=- -o APT::Get::List-Cleanup=false
    find_release || true
  fi
  kernels "" | cut -d" " -f1 | uniq | paste -sd " " >known
  if [ -z "${version:-}" ]; then
    echo "no kernel $KERNEL has its headers"
    exit 1
  fi

  names=(linux-headers-"$release" linux-source-"$(echo "$release" | cut -d. -f1,2)")
  for name in linux-binary-"$release" linux-modules-"$release"; do
    if apt-cache show "$name" >/dev/null 2>&1; then names+=("$name"); fi
  done
  [ "${#names[@]}" -gt 2 ] || names+=(linux-image-"$release")
  echo "$release" >release.part
  : >packages
  for name in "${names[@]}"; do
    if ! apt-cache show "$name" | grep -Fqx "Version: $version"; then
      echo "$name is not there in version $version"
      exit 1
    fi
    # The address is quoted for a shell.
    apt-get download --print-uris "$name=$version" | tr -d "\47" >>packages
  done
' || {
  [ ! -e "$OUT/offline" ] ||
    die "the lists of packages could not be fetched, and the old ones have no kernel $KERNEL; check the network and the mirror (the log is $log)."
  die "Debian has no kernel $KERNEL with its source; it has $(cat "$OUT/known" 2>/dev/null) (the log is $log)."
}
release=$(cat "$OUT/release.part")

say "$release: fetching"
# shellcheck disable=SC2016
run "$log" inside bash -euc '
  . /scripts/common.sh
  cd /downloads
  : >/out/fetched
  # The headers come first, and their configuration tells whether the source is of any use.
  while read -r uri file size sum; do
    case $file in
      linux-source-*) grep -q "^CONFIG_RUST=y" /out/config || continue ;;
    esac
    fetch "$uri" "$file" "$sum"
    echo "$file" >>/out/fetched
    case $file in
      linux-headers-*) dpkg-deb --fsys-tarfile "$file" | tar -xO "./usr/src/linux-headers-$1/.config" >/out/config ;;
    esac
  done </out/packages
' bash "$release" ||
  die "the packages of the kernel $release could not be fetched; check the network and the mirror (the log is $log)."

say "$release: unpacking"
# shellcheck disable=SC2016
run "$log" inside bash -euc '
  release=$1
  rm -rf /out/unpacked /out/modules
  mkdir -p /out/unpacked "/out/modules/lib/modules/$release"
  while read -r file; do
    case $file in
      linux-modules-*|linux-image-*)
        patterns=()
        for part in $WANTED; do patterns+=("./*/modules/$release/kernel/$part/*"); done
        dpkg-deb --fsys-tarfile "/downloads/$file" | tar -x -C /out/unpacked --wildcards \
          "${patterns[@]}" "./*/modules/$release/modules.*" "./boot/*" 2>/dev/null || true ;;
      *) dpkg-deb --extract "/downloads/$file" /out/unpacked ;;
    esac
  done <fetched
  cd /out/unpacked
  cp "$(find . -path "*/vmlinuz*" -type f | head -n 1)" /out/vmlinuz
  cp "usr/src/linux-headers-$release/Module.symvers" /out/
  if grep -q "^CONFIG_RUST=y" /out/config; then mv usr/src/linux-source-*.tar.xz /out/source.tar.xz; fi
  modules=$(find . -type d -path "*/modules/$release" | head -n 1)
  cp -a "$modules/." "/out/modules/lib/modules/$release/"
  # busybox cannot load compressed modules, and they load sooner in an emulator when they are not.
  find /out/modules -name "*.ko.xz" -print0 | xargs -0 -r -n 16 -P "$(nproc)" xz --decompress
  depmod -b /out/modules "$release"
  grep -q kvm-intel /out/modules/lib/modules/"$release"/modules.dep
' bash "$release" || die "the packages of the kernel $release could not be unpacked; remove $OUT and try again (the log is $log)."

# Documentation/arch/x86/boot.rst: the setup header tells where the compressed kernel lies in the file.
say "$release: the guest's vmlinux"
# shellcheck disable=SC2016
run "$log" inside bash -euc '
  python3 - >payload <<"END"
import struct, sys
image = open("vmlinuz", "rb").read()
sectors = image[0x1f1] or 4
offset, length = struct.unpack_from("<II", image, 0x248)
start = (sectors + 1) * 512 + offset
# The last four bytes are the size of what was compressed.
sys.stdout.buffer.write(image[start:start + length - 4])
END
  case $(head -c 6 payload | od -An -tx1 | tr -d " ") in
    28b52ffd*) zstd -dcq payload >vmlinux ;;
    fd377a585a00) xz -dc --single-stream payload >vmlinux ;;
    1f8b*) gzip -dc payload >vmlinux ;;
    02214c18*)
      # The root has no lz4, and no kernel but that of Debian 12 for clouds takes it.
      apt-get install --yes --no-install-recommends lz4
      lz4 -dcq payload >vmlinux
      ;;
    *) echo "unknown compression of vmlinuz"; exit 1 ;;
  esac
  head -c 4 vmlinux | grep -q ELF
  rm payload
' || die "the kernel in $OUT/vmlinuz could not be unpacked; its compression may be new (the log is $log)."

as_root rm -rf "$OUT/unpacked" "$OUT/packages" "$OUT/fetched" "$OUT/known" "$OUT/offline"
mv "$OUT/release.part" "$OUT/release"
