#!/bin/bash
# Set-up step "bochs": the Bochs PC emulator, built from Debian's source with the corrections in patches/.
#
# Needs: OUT EXITMETER_CACHE JOBS ROOT. Gives OUT/bochs (runs in ROOT by in-root.sh), OUT/bios and OUT/vgabios
# (what romimage and vgaromimage want).
# Inputs: patches/bochs-*.patch
#
# Debian's own binary has neither the corrections nor the speed: it is built with Bochs's debugger, which looks
# at every instruction (facts: 1.55 times slower).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/common.sh"

need_variables OUT EXITMETER_CACHE JOBS ROOT
mkdir -p "$OUT" "$EXITMETER_CACHE/downloads"
need_space "$OUT" 400
log=$OUT/build.log
: >"$log"

inside() {
  "$here/in-root.sh" "$ROOT" --bind "$OUT:/out" --bind "$EXITMETER_CACHE/downloads:/downloads" \
    --bind "$here/patches:/patches" --chdir "${directory:-/out}" -- "$@"
}

# The tarball as it came from Bochs. `apt-get source` would ask for the .dsc too, whose name some mirrors cannot
# serve; apt's own list vouches for the checksum of the tarball alone just as well.
say "Bochs: its source"
# shellcheck disable=SC2016
run "$log" inside bash -euc '
  read -r uri name size sum < <(apt-get source --download-only --print-uris bochs | grep -m 1 "orig\.tar")
  uri=${uri#\"} uri=${uri%\"} uri=${uri#\'"'"'} uri=${uri%\'"'"'} sum=${sum#SHA256:}
  cd /downloads
  if ! echo "$sum $name" | sha256sum --check --status 2>/dev/null; then
    # A name of its own until it is whole: another run may fetch the same file at this moment.
    part=$name.$$.part
    /usr/lib/apt/apt-helper download-file "$uri" "$part" "SHA256:$sum"
    mv "$part" "$name"
  fi
  if [ ! -e /out/source/.patched ]; then
    rm -rf /out/source
    mkdir /out/source
    tar -xf "$name" -C /out/source --strip-components=1
    cd /out/source
    for patch in /patches/bochs-*.patch; do
      echo "$patch"
      patch -p1 --no-backup-if-mismatch --fuzz=0 <"$patch"
    done
    touch .patched
  fi
' || die "the source of Bochs could not be fetched or corrected; check the network and the mirror (the log is $log)."

say "Bochs: configuring"
directory=/out/source
if [ ! -e "$OUT/source/Makefile" ]; then
  options=(
    # The CPUs: 64 bits, VMX with EPT and SVM, several of them, up to the newest models (tigerlake has CET).
    --enable-cpu-level=6 --enable-x86-64 --enable-vmx=2 --enable-svm --enable-smp
    --enable-avx --enable-evex --enable-cet --enable-memtype
    # The board: nothing but PCI with its disks, and no screen.
    --enable-pci --disable-plugins --with-nogui --disable-docbook
    # Speed.
    --enable-repeat-speedups --enable-handlers-chaining --enable-all-optimizations
  )
  run "$log" inside env CC=gcc-14 CXX=g++-14 CFLAGS='-O3 -pipe' CXXFLAGS='-O3 -pipe' \
    ./configure "${options[@]}" ||
    die "Bochs could not be configured; remove $OUT and try again (the log is $log)."
fi
say "Bochs: compiling (2 to 3 minutes)"
run "$log" inside make -j "$JOBS" bochs ||
  die "Bochs could not be built; remove $OUT and try again (the log is $log)."

# shellcheck disable=SC2016
run "$log" inside sh -euc '
  strip -o /out/bochs bochs
  cp /usr/share/bochs/BIOS-bochs-latest /out/bios
  cp /usr/share/vgabios/vgabios.bin /out/vgabios
  # Its help text is the least that shows that it runs.
  /out/bochs --help cpu 2>&1 | grep -q corei7_ivy_bridge_3770k
' || die "the Bochs that was built does not run; remove $OUT and try again (the log is $log)."
as_root rm -rf "$OUT/source"
say "Bochs is ready"
