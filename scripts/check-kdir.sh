#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Checks that the module can be built against a kernel's build folder. If not, it names what is missing and the remedy.
#
#   scripts/check-kdir.sh KDIR             check everything, with RUSTC and BINDGEN from the environment, as in kbuild
#   scripts/check-kdir.sh --kernel KDIR    check only the kernel and its compilers: packaging/dkms can make the Rust metadata
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/common.sh
. "$here/common.sh"

without="or unset KDIR to build against a tree that this project prepares"
metadata=needed
if [ "${1:-}" = --kernel ]; then
  metadata=later
  without="or do without exitmeter on this kernel"
  shift
fi
[ $# = 1 ] || die "usage: check-kdir.sh [--kernel] KDIR."
kdir=$1

[ -d "$kdir" ] ||
  die "KDIR=$kdir is not a folder; install the headers of that kernel, $without."
config=$kdir/include/config/auto.conf
for file in "$config" "$kdir/include/config/kernel.release"; do
  [ -s "$file" ] ||
    die "$kdir is not a prepared kernel build folder: it has no $file; run \`make modules_prepare\` there, $without."
done

# setting NAME: prints its value in the kernel's configuration, without quotes, or nothing if it is off.
setting() { sed -n "s/^CONFIG_$1=\"\{0,1\}\([^\"]*\)\"\{0,1\}$/\1/p" "$config"; }

# needs NAME WHY: fails if the setting is off.
needs() {
  [ -n "$(setting "$1")" ] ||
    die "the kernel of $kdir is built without CONFIG_$1, $2; take one with it, $without."
}

# needs_module NAME WHY: fails if the setting is not m.
needs_module() {
  [ "$(setting "$1")" = m ] ||
    die "the kernel of $kdir has CONFIG_$1=$(setting "$1"), $2; take one with CONFIG_$1=m, $without."
}

# refuses NAME WHY: fails if the setting is on.
refuses() {
  [ -z "$(setting "$1")" ] ||
    die "the kernel of $kdir is built with CONFIG_$1, $2; take one without it, $without."
}

needs MODULES "and so loads no modules"
needs MODULE_UNLOAD "and the module knows kvm_intel and kvm_amd by the functions that unload them"
needs RUST "and so cannot load a module in Rust"
needs KVM "which is what this module meters"
needs_module KVM "and the module hooks kvm.ko"
[ -n "$(setting KVM_INTEL)$(setting KVM_AMD)" ] ||
  die "the kernel of $kdir is built without CONFIG_KVM_INTEL and CONFIG_KVM_AMD, one of which runs the guests; take one with either as a module, $without."
[[ $(setting KVM_INTEL)$(setting KVM_AMD) = *m* ]] ||
  die "the kernel of $kdir has both CONFIG_KVM_INTEL and CONFIG_KVM_AMD built in or off, and the module looks for kvm_intel.ko or kvm_amd.ko; take one with either as a module, $without."
needs KALLSYMS "by which the module finds the functions of KVM"
needs TRACEPOINTS "by which the module sees VM exits"
needs KPROBES "by which the module finds what names the exits of AMD"
needs DYNAMIC_FTRACE_WITH_ARGS "by which the module sees vCPUs come and go and answers CPUID"
refuses PREEMPT_RT "where the spinlocks of the module, taken with interrupts off, would sleep"
refuses LTO_CLANG "which may inline functions of KVM from file to file, so that hooks miss calls"

rmeta=$kdir/rust/libkernel.rmeta
[ "$metadata" = later ] || [ -s "$rmeta" ] ||
  die "$kdir has no Rust metadata ($rmeta): headers of Debian leave it out, Ubuntu has it in linux-lib-rust-*, Arch in linux-headers; install that, $without."

# Only the exact compiler that wrote the metadata can read it.
rustc=${RUSTC:-rustc}
wanted=$(setting RUSTC_VERSION_TEXT)
command -v "$rustc" >/dev/null ||
  die "there is no $rustc; install the one that built this kernel ($wanted), $without."
found=$("$rustc" --version)
[ "$found" = "$wanted" ] ||
  die "this kernel is built with $wanted, and $rustc is $found; name the same one by \`make RUSTC=...\`, $without."
bindgen=${BINDGEN:-bindgen}
command -v "$bindgen" >/dev/null ||
  die "there is no $bindgen; install it ($(setting BINDGEN_VERSION_TEXT)), $without."
