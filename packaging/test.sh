#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Tests the packages of build/packages on a Debian 13 host with two kernels. `make packages-test` runs this. It takes about 15
# minutes on two cores, 10 GB of disk, and the network.
#
# It installs them without a network, where no kernel gets the module and nothing fails. Then it upgrades the kernels' packages
# with a network, where 6.12 gets a reason and the other kernel the module. It boots the result on an emulated AMD host
# (check-host.sh), and compares the list of files before the packages and after their purge.
#
#   packaging/test.sh [STEP]...    install, image, metered, without, refused, trusted, purge; all of them if none is named
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
debs=$PWD/build/packages
work=$PWD/build/packages-test
base=${XDG_CACHE_HOME:-$HOME/.cache}/exitmeter/packages-host
host=$work/host
steps=${*:-install image metered without refused trusted purge}
mkdir -p "$work"
need_space "$work" 8000

in_host() { scripts/in-root.sh "$host" --write --bind "$debs:/debs" --bind "$work:/work" -- "$@"; }

# expect TEXT CMD...: checks that CMD succeeds.
expect() {
  local text=$1
  shift
  "$@" || die "$text: no."
  say "ok: $text"
}

# files: lists the system's files, without those that any use of it writes.
files() {
  as_root find "$host" -xdev \( -path "$host/debs" -o -path "$host/work" -o -path "$host/tmp" -o -path "$host/var/cache" \
    -o -path "$host/run" -o -path "$host/var/lib/apt" -o -path "$host/var/log/apt" -o -path "$host/var/log/dpkg.log" \) -prune -o -printf '%P %y %m %U %G\n' | LC_ALL=C sort
}

install_packages() {
  [ -e "$base/.made" ] || { say "making a Debian host in $base" && packaging/host-root.sh "$base"; }
  say "a fresh host"
  as_root rm -rf "$host"
  as_root cp -a "$base" "$host"
  # DKMS would make its signing key with its first module, and keep it. It is made here, before the list of files.
  in_host sh -c 'apt-get update --quiet=2 && openssl req -new -x509 -nodes -days 36500 -subj "/CN=DKMS module signing key" \
    -newkey rsa:2048 -keyout /var/lib/dkms/mok.key -addext extendedKeyUsage=codeSigning -outform DER -out /var/lib/dkms/mok.pub \
    2>/dev/null'
  files >"$work/before"
  new=$(basename "$(dirname "$(as_root sh -c "echo $host/lib/modules/7.*/build")")")
  old=$(basename "$(dirname "$(as_root sh -c "echo $host/lib/modules/6.*/build")")")

  say "installing without a network"
  in_host unshare --net dpkg -i "/debs/exitmeter_${version}_amd64.deb" "/debs/exitmeter-dkms_${version}_all.deb" >"$work/install.log" 2>&1 ||
    die "the packages do not install without a network; see $work/install.log."
  expect "$old goes without, since it has no Rust" grep -q "no module for $old: .* is built without CONFIG_RUST," "$work/install.log"
  expect "$new goes without, since its source is not to be had" grep -q "no module for $new: .* could not be fetched" "$work/install.log"
  expect "no package is left half-configured" test -z "$(in_host dpkg --audit)"
  expect "why is in the log" as_root grep -q "^exitmeter: .*CONFIG_RUST" "$host/var/log/exitmeter-dkms/$old.log"

  say "upgrading the packages of both kernels, with a network (some minutes)"
  in_host env DEBIAN_FRONTEND=noninteractive apt-get install --yes --reinstall "linux-image-$old" "linux-headers-$old" "linux-headers-$new" \
    >"$work/upgrade.log" 2>&1 || die "the kernels' packages cannot be upgraded beside exitmeter-dkms; see $work/upgrade.log."
  expect "$old still goes without" grep -q "no module for $old: .* is built without CONFIG_RUST," "$work/upgrade.log"
  expect "$new has the module" grep -q "the module for $new is installed" "$work/upgrade.log"
  expect "no package is left half-configured" test -z "$(in_host dpkg --audit)"
  expect "DKMS has it installed for $new alone" test "$(in_host dkms status)" = "exitmeter/$version, $new, x86_64: installed"
  as_root rm -rf "$host/var/cache/apt/archives/"*.deb
}

# make_image: makes a disk image of the host.
make_image() {
  say "the host as a disk"
  as_root install -m 755 packaging/check-host.sh "$host/usr/local/sbin/check-host"
  # shellcheck disable=SC2016
  as_root sh -c 'cat >"$1/etc/systemd/system/check-host.service" <<UNIT && mkdir -p "$1/etc/systemd/system/multi-user.target.wants" &&
[Unit]
After=multi-user.target systemd-udev-settle.service
[Service]
ExecStart=/usr/local/sbin/check-host
UNIT
    ln -sf ../check-host.service "$1/etc/systemd/system/multi-user.target.wants/check-host.service"' sh "$host"
  # BPF starts at boot in the check without the module, and in others once the check asks for it.
  # shellcheck disable=SC2016
  as_root sh -c 'mkdir -p "$1/etc/systemd/system/exitmeter-bpf.service.d" && cat >"$1/etc/systemd/system/exitmeter-bpf.service.d/check.conf" <<UNIT
[Unit]
ConditionKernelCommandLine=|check=without
ConditionPathExists=|/run/bpf-too
UNIT' sh "$host"
  in_host systemctl --quiet enable exitmeter-bpf.service
  rm -f "$work/host.img"
  scripts/in-root.sh "$(packaging/root.sh)" --bind "$host:/host" --bind "$work:/work" -- \
    mke2fs -q -t ext4 -d /host /work/host.img 6G
  for kernel in "$host"/boot/vmlinuz-* "$host"/boot/initrd.img-*; do
    as_root install -m 644 "$kernel" "$work/$(basename "$kernel")"
  done
  in_host systemctl --quiet disable exitmeter-bpf.service
  as_root rm -rf "$host/usr/local/sbin/check-host" "$host"/etc/systemd/system/{check-host.service,multi-user.target.wants/check-host.service,exitmeter-bpf.service.d}
}

# Command line of the kernels.
words="root=/dev/vda rw console=ttyS0 mitigations=off tsc=reliable no_timer_check systemd.show_status=0"

# boot MODE KERNEL [QEMU-ARGUMENT]...: boots a kernel of the host, and runs the checks of MODE in it.
boot() {
  local mode=$1 kernel=$2
  shift 2
  say "booting Linux $kernel: $mode"
  rm -f "$work/$mode".{result,console}
  # The emulator is the lab's. The host's writes are lost with it, so each boot begins with the same disk. It ends with the lab,
  # and the lab by Ctrl-C, which reaches it only with --foreground, or with this script.
  setpriv --pdeathsig TERM -- timeout --foreground --kill-after 10 1500 cargo lab root -- qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none \
    -cpu EPYC,+svm,+npt,check=off -smp 2 -m 2048 -accel tcg,thread=multi \
    -drive file=/src/build/packages-test/host.img,if=virtio,format=raw,snapshot=on \
    -serial "file:/src/build/packages-test/$mode.console" -serial "file:/src/build/packages-test/$mode.result" "$@" ||
    say "the emulator ended with $?"
  # UEFI writes to this port, too: skip its lines.
  sed -n '/^the host is up/,$ s/^/  /p' "$work/$mode.result"
  [ "$(tail -n 1 "$work/$mode.result" | tr -d '\r')" = passed ] || die "the check $mode failed; the console is $work/$mode.console."
}

# direct MODE KERNEL [WORD]...: like boot, with the emulator's own loader and more words for the kernel's command line.
direct() {
  local mode=$1 kernel=$2
  shift 2
  boot "$mode" "$kernel" -machine pc,hpet=off -kernel "/src/build/packages-test/vmlinuz-$kernel" \
    -initrd "/src/build/packages-test/initrd.img-$kernel" \
    -append "$words check=$mode $*"
}

# make_firmware KERNEL: makes a UEFI firmware with the keys that machines are sold with, and a disk with Debian's signed shim,
# GRUB and KERNEL. The firmware's list of machine owner's keys (MOK) has the key of DKMS, as mokutil and the next boot's
# console would add it.
make_firmware() {
  as_root cp "$host/var/lib/dkms/mok.pub" "$work/mok.pub"
  # The owner of the key in the list is shim's own number, SHIM_LOCK_GUID.
  # shellcheck disable=SC2016
  run "$work/firmware.log" scripts/in-root.sh "$(packaging/root.sh)" --bind "$work:/work" --chdir /work -- sh -euc '
    openssl x509 -inform DER -in mok.pub -out mok.pem
    cp /usr/share/OVMF/OVMF_CODE_4M.secboot.fd firmware
    virt-fw-vars --input /usr/share/OVMF/OVMF_VARS_4M.ms.fd --output variables --add-mok 605dab50-e046-4300-abb6-3dd810dd8b23 mok.pem
    rm -f esp.img
    truncate --size 512M esp.img
    mformat -i esp.img -F ::
    mmd -i esp.img ::EFI ::EFI/BOOT ::EFI/debian
    mcopy -i esp.img /usr/lib/shim/shimx64.efi.signed ::EFI/BOOT/BOOTX64.EFI
    mcopy -i esp.img /usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed ::EFI/BOOT/grubx64.efi
    printf "%s\n" "linux /vmlinuz $2" "initrd /initrd" boot >grub.cfg
    mcopy -i esp.img grub.cfg ::EFI/debian/grub.cfg
    mcopy -i esp.img "vmlinuz-$1" ::vmlinuz
    mcopy -i esp.img "initrd.img-$1" ::initrd
  ' sh "$1" "$words check=trusted" || die "the firmware and its disk could not be made; the log is $work/firmware.log."
}

kernel_of() { (cd "$work" && printf '%s\n' vmlinuz-"$1".* | sed 's/^vmlinuz-//'); }

for step in $steps; do
  case $step in
    install) install_packages ;;
    image) make_image ;;
    metered) direct metered "$(kernel_of 7)" ;;
    without) direct without "$(kernel_of 6)" ;;
    refused) direct refused "$(kernel_of 7)" module.sig_enforce=1 ;;
    trusted)
      make_firmware "$(kernel_of 7)"
      boot trusted "$(kernel_of 7)" -machine q35,smm=on -global driver=cfi.pflash01,property=secure,value=on \
        -drive if=pflash,unit=0,format=raw,readonly=on,file=/src/build/packages-test/firmware \
        -drive if=pflash,unit=1,format=raw,file=/src/build/packages-test/variables \
        -drive file=/src/build/packages-test/esp.img,if=virtio,format=raw,snapshot=on
      ;;
    purge)
      in_host dpkg --purge exitmeter-dkms exitmeter >"$work/purge.log" 2>&1 || die "the packages do not go; see $work/purge.log."
      files >"$work/after"
      diff "$work/before" "$work/after" || die "the purge leaves something: see above."
      say "ok: the purge leaves nothing"
      ;;
    *) die "there is no step $step." ;;
  esac
done
