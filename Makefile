# The people's entry. No logic in here: it is in scripts/ and `cargo lab`.
#
#   make                the module, in build/<kernel release>/exitmeter.ko, and the tool
#   make KDIR=FOLDER    the module for the kernel of that build folder, such as /lib/modules/$(uname -r)/build
#   make demo           shows on an emulated host what the module does
#   make test           all tests; KERNEL=7.2.12 takes another kernel for those on emulated hosts
#   make test-amd       the tests on the emulated AMD host alone, the fast loop
#   make soak           the module under load, churn and attack, on both emulated hosts; PERCENT=10 does a tenth
#   make stress         the meter's own code at native speed: how long each caller waits; make test has a short form
#   make soak-loom      every order in which threads can see a ledger and the table of ledgers
#   make soak-miri      the pure half under an interpreter that knows undefined behaviour; takes nightly Rust
#   make soak-fuzz      damaged snapshots for the reader, for five minutes; takes nightly Rust and cargo-fuzz
#   make soak-ibt       the tests on an Intel host where a call to a function without ENDBR is a fault
#   make soak-debug     the tests under kernels that check themselves: KASAN, lockdep, kmemleak and more, and KCSAN
#   make soak-cfi       under a kernel where a call to a function of another type is a fault: kCFI, and FineIBT on Intel
#   make bench          measures what metering costs, beside other meters
#   make fleet          Prometheus with a fleet of hosts that recordings play: docs/fleet.md; make fleet-check checks it
#   make boards-check   holds Grafana's boards against Grafana's schema; takes Node.js
#   make study          records how guests exit on both emulated hosts: docs/study.md
#   make soak-selftests KVM's own selftests on both emulated hosts, without the module and with it: docs/selftests.md
#   make check          formats, lints and warnings
#   make lab            sets up all that the emulated hosts need
#   make install        module and tool for the running kernel, once they are built
#   make deb            Debian packages of the tool, and of the module for DKMS, in build/packages
#   make packages-test  installs these on a Debian host with two kernels, boots it, and purges them
#   make dist           the static tool with manual pages and completions, as a tarball in build/packages
#   make packaging-check lints the RPM spec and the PKGBUILD, and tries to publish the crates without doing so
#   make clean          removes what was built; the set-up stays in its cache (cargo lab prepare --prune)
#
# Without KDIR the module is for the newest kernel of Debian's backports, and whatever that takes is set up first.

export PATH := $(HOME)/.cargo/bin:$(PATH)
PREFIX ?= /usr/local
RUNNING := $(shell uname -r)
# Another kernel of Debian's for the tests, such as 7.2.12.
with_kernel = $(if $(KERNEL),--kernel $(KERNEL))

.PHONY: all module tool demo test test-amd soak stress soak-loom soak-miri soak-fuzz soak-ibt soak-debug soak-cfi bench fleet fleet-check boards-check study soak-selftests check lab install deb packages-test dist packaging-check clean bootstrap bootstrap-clang bootstrap-test bootstrap-tool

all: module tool

# The kernel of a KDIR comes with its tools, and the tool takes few: nothing of the lab's.
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

# Built as what goes into a host, so that both have the same crates.
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

# The table of vCPUs holds addresses as numbers, hence permissive.
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

# The kernels are built by the first command that wants them.
soak-debug: bootstrap-clang
	cargo test --release -p lab --test outcomes -- --ignored --test-threads 1 debug_kernel_finds kcsan_kernel_finds
	cargo run --release --quiet -p system-tests -- --host amd --cpus 2 --kernel debug --memory 2048 --slow 10 --timeout 7200 \
		--expect 'KernelAddressSanitizer initialized' --expect 'Lock dependency validator' \
		--expect 'Kernel memory leak detector initialized'
	cargo run --release --quiet -p system-tests -- --host amd --cpus 2 --kernel kcsan --memory 2048 --slow 10 --timeout 7200 \
		--expect 'kcsan: enabled'

# FineIBT takes a CPU with IBT; the emulated AMD CPU has none.
soak-cfi: bootstrap-clang
	cargo test --release -p lab --test outcomes -- --ignored --test-threads 1 cfi_kernel_finds
	cargo run --release --quiet -p system-tests -- --host amd --cpus 2 --kernel cfi --slow 5 --timeout 7200 \
		--expect 'CFI: Using rehashed retpoline kCFI'
	cargo run --release --quiet -p system-tests -- --host intel --model arrow_lake --kvm-args enable_apicv=0 \
		--kernel cfi --append cfi=fineibt --slow 5 --timeout 14400 \
		--expect 'Indirect Branch Tracking enabled' --expect 'Using FineIBT CFI'

bench: bootstrap-clang
	cargo run --release --quiet -p bench

# Built as what goes into a host, since it does.
study: bootstrap
	cargo run --profile host --quiet -p study

soak-selftests: bootstrap
	cargo run --release --quiet -p selftests -- --table docs/selftests.md $(with_kernel)

check: bootstrap-clang
	scripts/bootstrap.sh rustfmt cargo-clippy shellcheck
	cargo fmt --check
	rustfmt --check src/exitmeter_main.rs
	cargo clippy --release --workspace --all-targets -- --deny warnings
	RUSTDOCFLAGS=--deny=warnings cargo doc --quiet --release --no-deps --workspace
	cargo lab build -- W=1 CLIPPY=1
	cargo run --release --quiet -p bench --bin hot-path
	cargo lab root -- perl /tree/scripts/checkpatch.pl --no-tree --strict --quiet --file src/shim.c src/shim.h src/trampolines.S bindings/layout.c
	shellcheck --external-sources scripts/*.sh packaging/*.sh packaging/dkms/*.sh packaging/dkms/kernel*-hook .ci/run

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

# For the tool with its BPF meter, which the first `make demo` does not wait for.
bootstrap-clang:
	@scripts/bootstrap.sh clang

# For what `make test` takes besides: a browser that shows the exporter's page.
bootstrap-test:
	@scripts/bootstrap.sh clang browser

bootstrap-tool:
	@scripts/bootstrap.sh --tool clang
