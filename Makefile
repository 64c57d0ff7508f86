# SPDX-License-Identifier: GPL-2.0
# Entry points for users. The logic is in scripts/ and `cargo lab`.
#
#   make                build the module, in build/<kernel release>/exitmeter.ko, and the tool
#   make KDIR=FOLDER    build them for the kernel of that build folder, such as /lib/modules/$(uname -r)/build
#   make demo           show the module at work on an emulated host
#   make test           run all tests; KERNEL=7.2.12 selects another kernel for those on emulated hosts
#   make test-amd       run the system tests on the emulated AMD host alone, the fast loop
#   make soak           run the module under load, churn and attack, on both emulated hosts; PERCENT=10 does a tenth
#   make stress         measure at native speed how long callers of the meter's code wait; make test has a short form
#   make soak-loom      test every order in which threads can see a ledger and the table of ledgers
#   make soak-miri      test the pure half in an interpreter that detects undefined behaviour; needs nightly Rust
#   make soak-fuzz      feed damaged snapshots to the reader for five minutes; needs nightly Rust and cargo-fuzz
#   make soak-ibt       run the tests on an Intel host where a call to a function without ENDBR is a fault
#   make soak-debug     run the tests under debug kernels: KASAN, lockdep, kmemleak and more, and KCSAN
#   make soak-cfi       run the tests under kernels with control-flow integrity: kCFI, and FineIBT on Intel
#   make bench          measure the cost of metering, and of other meters
#   make fleet          run Prometheus with a fleet of hosts played from recordings: docs/fleet.md; make fleet-check checks it
#   make boards-check   check Grafana's boards against Grafana's schema; needs Node.js
#   make study          record how guests exit on both emulated hosts: docs/study.md
#   make soak-selftests run KVM's own selftests on both emulated hosts, without and with the module: docs/selftests.md
#   make check          check formats, lints and warnings
#   make rust-analyzer  describe the module to rust-analyzer, in build/rust-project.json: CONTRIBUTING.md
#   make lab            set up everything that the emulated hosts need
#   make install        install module and tool for the running kernel, once they are built
#   make deb            build Debian packages of the tool, and of the module for DKMS, in build/packages
#   make packages-test  install these on a Debian host with two kernels, boot it, and purge them
#   make dist           build a tarball of the static tool with manual pages and completions, in build/packages
#   make packaging-check  lint the RPM spec and the PKGBUILD, and publish the crates as a dry run
#   make clean          remove build results; the set-up stays in its cache (cargo lab prepare --prune)
#
# Without KDIR the module is for the newest kernel of Debian's backports, and the set-up for that is made first.

export PATH := $(HOME)/.cargo/bin:$(PATH)
PREFIX ?= /usr/local
RUNNING := $(shell uname -r)
# Option for another of Debian's kernels, such as 7.2.12.
with_kernel = $(if $(KERNEL),--kernel $(KERNEL))

.PHONY: all module tool demo test test-amd soak stress soak-loom soak-miri soak-fuzz soak-ibt soak-debug soak-cfi bench fleet fleet-check boards-check study soak-selftests check rust-analyzer lab install deb packages-test dist packaging-check clean bootstrap bootstrap-clang bootstrap-test bootstrap-tool

all: module tool

# With KDIR the kernel's own tools build the module, and nothing of the lab is needed.
ifdef KDIR
module:
	scripts/check-kdir.sh "$(KDIR)"
	$(MAKE) -C "$(KDIR)" M="$(CURDIR)" MO="$(CURDIR)/build/$$(cat "$(KDIR)/include/config/kernel.release")" modules

tool: bootstrap-tool
else
module: bootstrap
	cargo lab build

tool: bootstrap-clang
endif

tool:
	cargo build --release -p exitmeter

# The demo uses the profile of programs for hosts, so that both share the same built crates.
demo: bootstrap
	cargo run --profile host --quiet -p demo

test: bootstrap-test
	cargo test --release --workspace
	cargo test --release -p lab --test outcomes --test shell -- --ignored --test-threads 2 --skip kernel_finds
	cargo run --release --quiet -p system-tests -- $(with_kernel)

test-amd: bootstrap-clang
	cargo run --release --quiet -p system-tests -- --host amd $(with_kernel)

soak: bootstrap-clang
	cargo run --release --quiet -p system-tests -- --soak --memory 2048 --percent $(or $(PERCENT),100) --timeout 28800

fleet: bootstrap-clang
	cargo run --release --quiet -p fleet

fleet-check: bootstrap-clang
	cargo run --release --quiet -p fleet -- --check
	cargo run --release --quiet -p fleet -- --check --leaves 3
	cargo run --release --quiet -p fleet -- --check --engine victoria-metrics

boards-check:
	@scripts/bootstrap.sh node npm
	scripts/boards-check.sh "$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/exitmeter/grafana"

stress: bootstrap
	cargo run --release --quiet -p stress

soak-loom: bootstrap
	RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test --release -p exitmeter-meter --test loom

# The table of vCPUs holds addresses as numbers, hence the permissive provenance.
soak-miri: bootstrap
	rustup toolchain install nightly --profile minimal --component miri --component rust-src
	PROPTEST_CASES=2 MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-permissive-provenance" cargo +nightly miri test -p exitmeter-meter

soak-fuzz: bootstrap
	rustup toolchain install nightly --profile minimal --component rust-src
	cargo install --quiet cargo-fuzz
	cargo +nightly fuzz run --fuzz-dir src/meter/fuzz snapshot -- -max_total_time=300 -max_len=65536

soak-ibt: bootstrap-clang
	cargo test --release -p lab --test outcomes -- --ignored past_an_endbr
	cargo run --release --quiet -p system-tests -- --host intel --model arrow_lake --kvm-args enable_apicv=0 \
		--timeout 7200 --expect 'Indirect Branch Tracking enabled'

# The first command that needs a debug kernel builds it.
soak-debug: bootstrap-clang
	cargo test --release -p lab --test outcomes -- --ignored --test-threads 1 debug_kernel_finds kcsan_kernel_finds
	cargo run --release --quiet -p system-tests -- --host amd --cpus 2 --kernel debug --memory 2048 --slow 10 --timeout 7200 \
		--expect 'KernelAddressSanitizer initialized' --expect 'Lock dependency validator' \
		--expect 'Kernel memory leak detector initialized'
	cargo run --release --quiet -p system-tests -- --host amd --cpus 2 --kernel kcsan --memory 2048 --slow 10 --timeout 7200 \
		--expect 'kcsan: enabled'

# FineIBT needs a CPU with IBT, which the emulated AMD CPU is not.
soak-cfi: bootstrap-clang
	cargo test --release -p lab --test outcomes -- --ignored --test-threads 1 cfi_kernel_finds
	cargo run --release --quiet -p system-tests -- --host amd --cpus 2 --kernel cfi --slow 5 --timeout 7200 \
		--expect 'CFI: Using rehashed retpoline kCFI'
	cargo run --release --quiet -p system-tests -- --host intel --model arrow_lake --kvm-args enable_apicv=0 \
		--kernel cfi --append cfi=fineibt --slow 5 --timeout 14400 \
		--expect 'Indirect Branch Tracking enabled' --expect 'Using FineIBT CFI'

bench: bootstrap-clang
	cargo run --release --quiet -p bench

# The study uses the profile of programs for hosts, since it is copied into hosts.
study: bootstrap
	cargo run --profile host --quiet -p study

soak-selftests: bootstrap
	cargo run --release --quiet -p selftests -- --table docs/selftests.md $(with_kernel)

check: bootstrap-clang
	scripts/bootstrap.sh rustfmt cargo-clippy shellcheck
	cargo fmt --check
	rustfmt --check src/exitmeter_main.rs
	cargo clippy --release --workspace --all-targets -- --deny warnings
	RUSTDOCFLAGS=--deny=warnings cargo doc --quiet --release --no-deps --document-private-items --workspace
	cargo lab build -- W=1 CLIPPY=1
	cargo run --release --quiet -p bench --bin hot-path
	cargo lab root -- perl /tree/scripts/checkpatch.pl --no-tree --strict --quiet --file src/shim.c src/shim.h src/trampolines.S bindings/layout.c
	shellcheck --external-sources scripts/*.sh packaging/*.sh packaging/dkms/*.sh packaging/dkms/kernel*-hook .ci/run

rust-analyzer: bootstrap
	cargo lab rust-project $(with_kernel)

lab: bootstrap
	cargo lab prepare --timings

install:
	install -D -m 644 build/$(RUNNING)/exitmeter.ko "$(DESTDIR)/lib/modules/$(RUNNING)/updates/exitmeter.ko"
	install -D -m 644 scripts/60-exitmeter.rules "$(DESTDIR)/usr/lib/udev/rules.d/60-exitmeter.rules"
	depmod --basedir "$(DESTDIR)/" $(RUNNING)
	cargo install --quiet --no-track --force --path cli --root "$(DESTDIR)$(PREFIX)"
	"$(DESTDIR)$(PREFIX)/bin/exitmeter" man "$(DESTDIR)$(PREFIX)/share/man/man1"
	install -d "$(DESTDIR)$(PREFIX)/share/bash-completion/completions" "$(DESTDIR)$(PREFIX)/share/zsh/site-functions" \
		"$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d"
	"$(DESTDIR)$(PREFIX)/bin/exitmeter" completions bash >"$(DESTDIR)$(PREFIX)/share/bash-completion/completions/exitmeter"
	"$(DESTDIR)$(PREFIX)/bin/exitmeter" completions zsh >"$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_exitmeter"
	"$(DESTDIR)$(PREFIX)/bin/exitmeter" completions fish >"$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/exitmeter.fish"

deb: bootstrap
	packaging/deb.sh

packages-test: deb
	packaging/test.sh

dist: bootstrap
	packaging/dist.sh

packaging-check: bootstrap
	packaging/lint.sh

clean:
	rm -rf build
	cargo clean --quiet

bootstrap:
	@scripts/bootstrap.sh

# The tool's BPF meter needs clang. A first `make demo` does not wait for it.
bootstrap-clang:
	@scripts/bootstrap.sh clang

# `make test` also needs a browser, which shows the exporter's page.
bootstrap-test:
	@scripts/bootstrap.sh clang browser

bootstrap-tool:
	@scripts/bootstrap.sh --tool clang
